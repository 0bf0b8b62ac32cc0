"""Draws a parameter with its frozen entries marked; needs matplotlib, so it is imported only when used.

Small parameters are drawn entry by entry on tiles, with a cross on each frozen entry: a tile is a slice of a
convolution kernel, or a whole matrix. A larger matrix is drawn in cells of several entries, beside a panel with the
frozen share.
"""

from __future__ import annotations

import math
import sys
import textwrap
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d

from .._counted import counted
from .._entries.bits import count_true
from .._errors import SpecError, UnsupportedParameterError, shown
from .._held.parameter import FrozenParameter
from .._ranks.sharding import local

try:
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.markers import MarkerStyle
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import MaxNLocator
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("frozen.plot needs matplotlib: pip install 'freezehooks[plot]'") from error

_MOST_MARKED: Final = 48  # entries along a side that are marked one by one
_MOST_TAPS: Final = 128  # across all kernels together
_MOST_CELLS: Final = 192  # cells along a side of a larger matrix
_RARE: Final = 0.02  # cells that differ from all others are drawn larger if they are at most this fraction
_GAP: Final = 0.35  # between the slices of a kernel, in taps; between kernels it is 1

_VALUES: Final = colormaps["RdBu"].with_extremes(bad="gold")  # nan and inf are neither red nor blue
_MAGNITUDES: Final = colormaps["Blues"].with_extremes(bad="gold")
_STEPS: Final = [0.0, 1e-9, 0.25, 0.5, 0.75, 1 - 1e-7, 1.0]  # none and all have shades of their own
_SHARES: Final = {"cmap": ListedColormap(["1", "0.78", "0.64", "0.5", "0.36", "0"]), "norm": BoundaryNorm(_STEPS, 6)}

_Scale: TypeAlias = "dict[str, Any]"
_Drawn: TypeAlias = "tuple[Picture, list[str]]"  # with the notes that belong below it


class Picture(Figure):
    """A figure that notebooks show, without pyplot's global state."""

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def plot_parameter(
    held: FrozenParameter, parameter: Tensor, path: str | Path | None = None, *, owner: Any = None
) -> Figure:
    """Draw a parameter with marks on its frozen entries.

    Args:
        held: What is frozen.
        parameter: The parameter.
        path: Where to write the picture; the suffix gives the format.
        owner: The module that owns the parameter; transposed convolutions have their input channels first.

    Raises:
        SpecError: The path's suffix names no format.
        UnsupportedParameterError: The parameter is on the meta device.
        ParameterChangedError: It has another shape than the one that was frozen.
    """
    file = None if path is None else _checked(path)
    held.check_shape(parameter)
    if parameter.is_meta:
        raise UnsupportedParameterError(
            f"`{held.name}` is on the meta device and has no numbers to draw", "give it numbers with `to_empty` first"
        )
    numbers, frozen = local(parameter.detach()), held.frozen
    picture, notes = _draw(numbers, frozen, owner) if numbers.numel() else (_sheet(4, 1), ["this rank has no entries"])
    if held.is_sharded:
        notes.append(f"this rank's shard: {tuple(numbers.shape)}, {count_true(frozen):,} of its entries frozen")
    _write(picture, _title(held), notes)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.savefig(file)
    return picture


def _checked(given: str | Path) -> Path:
    if not isinstance(given, str | PathLike):
        raise SpecError(f"`path` must be text or a Path, found {type(given).__name__}", "give where to write, or None")
    path = Path(given)
    known = sorted(set(Figure().canvas.get_supported_filetypes()) - {"pgf"})  # which needs LaTeX
    if path.suffix[1:].lower() not in known:
        raise SpecError(
            f"`path` must end in the suffix of a picture format, found {shown(path.name)}",
            f"use one of {', '.join(known)}",
        )
    return path


def _title(held: FrozenParameter) -> list[str]:
    shape = " x ".join(map(str, held.shape)) or "scalar"
    also = f", also {', '.join(held.names[1:])}" if held.names[1:] else ""
    total = counted(held.shape.numel(), "entry", "entries")
    free = f", {held.free_count:,} free" if held.free_count else ""
    rules = "; ".join(map(str, held.rules))
    return [f"{held.name}, {shape}{also}", rules, f"{held.frozen_count:,} of {total} frozen{free}"]


def _draw(numbers: Tensor, frozen: Tensor, owner: Any) -> _Drawn:
    broken, largest = _survey(numbers)
    limit = min(largest or 1.0, sys.float_info.max / 4)  # matplotlib subtracts one end of a scale from the other
    scale: _Scale = {"cmap": _VALUES, "vmin": -limit, "vmax": limit}
    also = [f"yellow or circled: nan or inf, {counted(broken, 'entry', 'entries')} of all"] if broken else []
    if numbers.is_complex():
        numbers, scale = numbers.abs(), {"cmap": _MAGNITUDES, "vmin": 0, "vmax": limit}
        also.append("complex entries by their magnitude")
    channels = "output channel", "input channel"
    if isinstance(owner, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        channels = channels[::-1]
    draw = _draw_kernels if _looks_like_kernels(numbers.shape) else _draw_matrix
    picture, notes = draw(numbers, frozen, channels, scale)
    return picture, notes + also


def _survey(numbers: Tensor) -> tuple[int, float]:
    """Return how many entries are nan or inf, and the largest finite magnitude."""
    broken, largest = 0, 0.0
    for chunk in numbers.reshape(-1).split(2**22):  # all at once would be a large copy
        sizes = chunk.abs()
        broken += len(sizes) - int(sizes.isfinite().sum())
        largest = max(largest, float(sizes.nan_to_num(0, 0, 0).max()))
    return broken, largest


def _looks_like_kernels(shape: torch.Size) -> bool:
    """Return whether all dimensions but the first two are short, and not all 1."""
    return shape[2:].numel() > 1 and max(shape[2:]) <= _MOST_MARKED and shape[2:-2].numel() * shape[-1] <= _MOST_TAPS


def _draw_kernels(numbers: Tensor, frozen: Tensor, names: tuple[str, str], scale: _Scale) -> _Drawn:
    """Draw kernels, or some of them: first channels across, second ones down; a single row or column is wrapped."""
    total, inner = numbers.shape[:2], (1, *numbers.shape[2:])
    depth, height, width = math.prod(inner[:-2]), inner[-2], inner[-1]
    wide, high = depth * (width + _GAP) - _GAP + 1, height + 1.0  # from a kernel to the next
    first, second, columns = _choose(total, wide, high)
    count = len(first) * len(second)
    across = [n * wide + layer * (width + _GAP) for n in range(columns) for layer in range(depth)]
    corners = [(x, row * high) for row in range(math.ceil(count / columns)) for x in across][: count * depth]
    slices = [t[first][:, second].transpose(0, 1).reshape(-1, height, width) for t in (numbers, frozen)]
    picture = _draw_tiles(slices[0], slices[1], torch.tensor(corners, dtype=torch.float64), scale)
    axis = picture.axes[0]
    axis.set(xticks=[], yticks=[])
    notes = ["a cross marks a frozen entry"]
    if min(total) > 1:
        axis.set_xticks([(n + 0.5) * wide - 0.5 for n in range(len(first))], list(map(str, first)))
        axis.set_yticks([(n + 0.5) * high - 0.5 for n in range(len(second))], list(map(str, second)))
        axis.set(xlabel=names[0], ylabel=names[1])
    elif count > 1:
        notes.append(f"kernels in reading order, by {names[total[0] == 1]}")
    if depth > 1:
        notes.append(f"the {depth} slices of a kernel side by side")
    if count < math.prod(total):
        notes.append(f"showing {count:,} of {math.prod(total):,} kernels, evenly spaced")
    return picture, notes


def _choose(total: torch.Size, wide: float, high: float) -> tuple[list[int], list[int], int]:
    """Choose the channels to draw, few enough to see each tap, and return how many kernels are in a row."""
    columns, rows = max(1, min(16, int(_MOST_TAPS / wide))), max(1, min(12, int(96 / high)))
    if min(total) == 1:
        return _spaced(total[0], columns * rows), _spaced(total[1], columns * rows), columns
    first = _spaced(total[0], columns)
    return first, _spaced(total[1], rows), len(first)


def _spaced(size: int, most: int) -> list[int]:
    """Return at most `most` numbers below `size`, evenly spaced, including the first and the last."""
    return sorted({round(n * (size - 1) / max(most - 1, 1)) for n in range(most)})


def _draw_tiles(numbers: Tensor, frozen: Tensor, corners: Tensor, scale: _Scale) -> Picture:
    """Draw tiles, ``(tiles, rows, columns)``, at their upper left corners, ``(tiles, 2)``, and mark entries."""
    numbers, frozen, (rows, columns) = numbers.cpu(), frozen.cpu(), numbers.shape[1:]
    left, top = corners[0].tolist()
    right, bottom = (corners.amax(0) + torch.tensor([columns, rows])).tolist()
    inches = min(0.4, 8 / (right - left), 6.5 / (bottom - top))  # of an entry
    picture = _sheet((right - left) * inches, (bottom - top) * inches)
    (axis,) = picture.axes
    for (x, y), tile in zip(corners.tolist(), numbers, strict=True):
        image = _show(axis, tile, (x, x + columns, y + rows, y), **scale)
        axis.add_patch(Rectangle((x, y), columns, rows, fill=False, ec="0.35", lw=0.6, clip_on=False))
    size = min(9.0, 32 * inches)
    look = {"linewidths": 0.14 * size, "path_effects": [withStroke(linewidth=0.35 * size, foreground="white")]}
    for sign, which in (("x", frozen), ("o", ~numbers.isfinite())):
        tiles, row, column = which.nonzero().T
        across, down = (corners[tiles] + torch.stack([column, row], 1) + 0.5).T.numpy()
        axis.scatter(across, down, size**2, "black", marker=MarkerStyle(sign, fillstyle="none"), gid=sign, **look)
    axis.set(xlim=(left, right), ylim=(bottom, top), aspect="equal", anchor="N", frame_on=False)
    _add_bar(image)
    return picture


def _draw_matrix(numbers: Tensor, frozen: Tensor, channels: tuple[str, str], scale: _Scale) -> _Drawn:
    """Draw a tensor as a matrix, the last dimension across and all others down, entry by entry or in cells."""
    last = numbers.ndim - 1
    names = {-1: ("", ""), 0: ("entry", ""), 1: ("column", "row")}.get(last, (f"dimension {last}", "all others"))
    columns = numbers.shape[-1] if numbers.ndim else 1
    if numbers.ndim > 2 and numbers.shape[2:].numel() == 1:  # kernels of one tap: the matrix of their channels
        names, columns = channels[::-1], numbers.shape[1]
    numbers, frozen = numbers.reshape(-1, columns), frozen.reshape(-1, columns)
    if max(numbers.shape) > _MOST_MARKED:
        return _draw_cells(numbers, frozen, names, scale)
    picture = _draw_tiles(numbers[None], frozen[None], torch.full((1, 2), -0.5), scale)
    picture.axes[0].set(xlabel=names[0], ylabel=names[1])
    return picture, ["a cross marks a frozen entry"]


def _draw_cells(numbers: Tensor, frozen: Tensor, names: tuple[str, str], scale: _Scale) -> _Drawn:
    """Draw blocks of entries as cells: what they contain in one panel, their frozen share in another."""
    rows, columns = numbers.shape
    high, wide = math.ceil(rows / _MOST_CELLS), math.ceil(columns / _MOST_CELLS)
    largest, share = _pooled(numbers, frozen, high, wide)
    seen = _with_rare_grown(share)
    width, across = (4.0, 2) if rows > columns / 3 else (7.0, 1)
    picture = _sheet(width, min(max(width * rows / columns, 1.2), 4.0), across, 2 // across)
    first, second = picture.axes
    ends = -0.5, len(share[0]) * wide - 0.5, len(share) * high - 0.5, -0.5  # past the matrix, if it ends within a cell
    _add_bar(_show(first, largest, ends, **scale))
    bar = _add_bar(_show(second, seen, ends, **_SHARES), "share frozen")
    bar.set_ticks([_STEPS[1] / 2, 0.5, (_STEPS[-2] + 1) / 2], labels=["none", "half", "all"])
    for axis in (first, second):
        axis.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5), aspect="auto", xlabel=names[0], ylabel=names[1])
        axis.spines[:].set_position(("outward", 2))  # a thin row at the edge must not lie under the frame
    notes = ["black is frozen, gray is partly frozen"]
    if not torch.equal(seen, share):
        notes.append("rare cells are drawn larger than they are")
    if high * wide > 1:
        notes.append(f"each cell is the entry of largest magnitude of {high} x {wide}, and the share of them frozen")
    return picture, notes


def _pooled(numbers: Tensor, frozen: Tensor, high: int, wide: int) -> tuple[Tensor, Tensor]:
    """Return the entry of largest magnitude and the frozen share of each block of entries."""
    largest, share = [], []
    for band, held in zip(numbers.split(high), frozen.split(high), strict=True):  # all at once would be a large copy
        block = len(band), wide
        most, least = max_pool2d(torch.stack([band, -band]).cpu().double(), block, ceil_mode=True)
        largest.append(torch.where(most >= least, most, -least))  # nan where one is nan
        share.append(avg_pool2d(held[None].cpu().double(), block, ceil_mode=True)[0])
    return torch.cat(largest), torch.cat(share)


def _with_rare_grown(share: Tensor) -> Tensor:
    """Enlarge the cells that differ from all others if they are few, so that one row in thousands can be seen."""
    common = float((share == 1).double().mean() > 0.5)
    rare = (share != common).double()
    if rare.mean() > _RARE:
        return share
    window = [3 if size > _MOST_CELLS // 2 else 1 for size in share.shape]  # a short side is drawn large as it is
    grown = max_pool2d(rare[None], window, stride=1, padding=[size // 2 for size in window])[0]
    return torch.where(grown > 0, 1 - common, share)


def _sheet(width: float, height: float, across: int = 1, down: int = 1) -> Picture:
    """Return a picture with empty panels of the given size in inches, and room for a color bar beside each."""
    size = max(across * (width + 1.4), 4.5), down * (max(height, 0.8) + 0.5) + 1
    picture = Picture(figsize=size, dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    for axis in picture.subplots(down, across, squeeze=False).flat:
        axis.grid(False)  # some styles draw one, over the entries
        axis.tick_params(labelsize=7, length=2)
        axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
        axis.yaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    return picture


def _show(axis: Axes, numbers: Tensor, extent: tuple[float, float, float, float], **style: Any) -> Any:
    """Draw numbers as colors, with row 0 at the top in every matplotlib style."""
    finite = torch.where(numbers.isfinite(), numbers, torch.nan).double().numpy()
    return axis.imshow(finite, interpolation="nearest", origin="upper", extent=extent, **style)


def _add_bar(image: Any, label: str = "value") -> Any:
    bar = image.figure.colorbar(image, ax=image.axes, fraction=0.05, aspect=30, pad=0.02, label=label)
    bar.ax.tick_params(labelsize=7)
    return bar


def _write(picture: Picture, title: list[str], notes: list[str]) -> None:
    """Write the title above and the notes below, each text in up to four lines that fit."""
    fit: dict[str, Any] = {"max_lines": 4, "placeholder": " ...", "break_on_hyphens": False}
    width = picture.get_figwidth()
    top = [line for text in title for line in textwrap.wrap(text, int(width * 13), **fit)]
    bottom = textwrap.wrap("; ".join(notes), int(width * 16), **fit)
    picture.suptitle("\n".join(top), x=0.02, ha="left", fontsize=10, parse_math=False)
    picture.supxlabel("\n".join(bottom), x=0.02, ha="left", fontsize=8, parse_math=False)
    picture.set_figheight(picture.get_figheight() + 0.16 * (len(top) + len(bottom) - 4))
