"""Draw the frozen entries of a parameter; imported by what draws alone, because it needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from .._counted import counted
from .._errors import UnsupportedParameterError
from .._held.parameter import FrozenParameter
from .._ranks.sharding import local
from .cells import Kernels, Matrix, count_broken, kernels_of, looks_like_kernels, matrix_of, stressed
from .sheet import SHARE_NAMES, MakeScale, Scale, Sheet, checked_path, magnitudes, name_sides, save, shares, values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_MARKED: Final = 48  # entries along a side that are marked one by one
_GAP: Final = 0.35  # between the slices of a kernel, in taps


def plot_part(part: FrozenParameter, parameter: Tensor, path: str | Path | None = None, *, owner: Any = None) -> Figure:
    """Draw what a parameter holds, with a mark on what is frozen of it.

    Args:
        part: What is frozen.
        parameter: The parameter.
        path: Where to write the picture; the suffix says the format.
        owner: The module that the parameter is of; transposed convolutions have their input channels first.

    Raises:
        SpecError: The path's suffix names no format.
        UnsupportedParameterError: The parameter is on the meta device.
        ParameterChangedError: It has another shape than the one that was frozen.
    """
    file = None if path is None else checked_path(Path(path))
    part.check_shape(parameter)
    if parameter.is_meta:
        raise UnsupportedParameterError(
            f"`{part.name}` is on the meta device and has no numbers to draw", "give it numbers with `to_empty` first"
        )
    part.follow(parameter)
    numbers = local(parameter.detach())
    figure = _drawn(part, numbers, part.frozen.to(numbers.device), owner)
    if file is not None:
        save(figure, file)
    return figure


def _drawn(part: FrozenParameter, numbers: Tensor, frozen: Tensor, owner: Any) -> Figure:
    make_scale = magnitudes if numbers.is_complex() else values
    if not numbers.numel():
        sheet, notes = Sheet.blank(4, 1), ["no entries lie here"]
        sheet.axes()[0].set_axis_off()
    elif looks_like_kernels(numbers.shape):
        sheet, notes = _draw_kernels(kernels_of(numbers, frozen), _channel_names(owner), make_scale)
    else:
        sheet, notes = _draw_matrix(matrix_of(numbers, frozen), _side_names(numbers.shape, owner), make_scale)
    if numbers.is_complex():
        notes.append("complex entries by their magnitude")
    broken = count_broken(numbers)
    if broken:
        notes.append(f"yellow or circled: nan or inf, {counted(broken, 'entry', 'entries')} of all")
    if part.is_spread:
        notes.append(f"this rank's part: {tuple(numbers.shape)}, {int(frozen.sum()):,} of its entries frozen")
    sheet.write(_title(part), notes)
    return sheet.figure


def _channel_names(owner: Any) -> tuple[str, str]:
    names = ("output channel", "input channel")
    return names[::-1] if isinstance(owner, nn.modules.conv._ConvTransposeNd) else names


def _title(part: FrozenParameter) -> list[str]:
    shape = " x ".join(map(str, part.shape)) or "scalar"
    also = f", also {', '.join(part.names[1:])}" if part.names[1:] else ""
    total = part.shape.numel()
    free = f", {part.free_count:,} free" if part.free_count else ""
    return [
        f"{part.name}, {shape}{also}",
        "; ".join(map(str, part.rules)),
        f"{part.frozen_count:,} of {counted(total, 'entry', 'entries')} frozen{free}",
    ]


# --------------------------------------------------------------------------------------------------------------------
# Kernels


def _draw_kernels(kernels: Kernels, names: tuple[str, str], make_scale: MakeScale) -> tuple[Sheet, list[str]]:
    """Draw kernels as tiles: first channels across, second ones down, or all of them in reading order."""
    outputs, inputs, depth, height, width = kernels.numbers.shape
    wide, high = depth * (width + _GAP) - _GAP + 1, height + 1.0
    places = _places(outputs, inputs)
    across, down = (max(place[n] for place in places.values()) + 1 for n in (0, 1))
    cell = min(0.35, 8 / (across * wide), 7 / (down * high))
    sheet = Sheet.blank(across * wide * cell, max(down * high * cell, 1), cell=cell)
    (axis,) = sheet.axes()
    slices = [
        ((column * wide + n * (width + _GAP), row * high), kernels.numbers[kernel][n], kernels.frozen[kernel][n])
        for kernel, (column, row) in places.items()
        for n in range(depth)
    ]
    scale = make_scale(kernels.numbers)
    for corner, numbers, _ in slices:
        image = _draw_slice(sheet, axis, numbers, corner, scale)
    sheet.mark(axis, [place for corner, _, held in slices for place in _middles(held, *corner)], "x")
    sheet.mark(axis, [place for corner, numbers, _ in slices for place in _middles(~numbers.isfinite(), *corner)], "o")
    axis.set(xlim=(-0.5, across * wide - 0.5), ylim=(down * high - 0.5, -0.5), aspect="equal", frame_on=False)
    axis.set_anchor("N")
    _name_channels(axis, kernels, names, (wide, high))
    sheet.add_bar(image, axis, scale["label"])
    return sheet, list(_kernel_notes(kernels, names, depth))


def _draw_slice(sheet: Sheet, axis: Axes, numbers: Tensor, corner: tuple[float, float], scale: Scale) -> Any:
    """Draw one slice of a kernel with its left upper corner at a place, and return its image."""
    (left, top), (height, width) = corner, numbers.shape
    image = axis.imshow(
        torch.where(numbers.isfinite(), numbers, torch.nan).numpy(),
        interpolation="nearest",
        origin="upper",  # whatever the style says: the extent has row 0 on top
        extent=(left, left + width, top + height, top),
        **scale,
    )
    sheet.frame(axis, corner, width, height)
    return image


def _places(outputs: int, inputs: int) -> dict[tuple[int, int], tuple[int, int]]:
    """Map each kernel to its column and row."""
    pairs = [(output, input_) for output in range(outputs) for input_ in range(inputs)]
    if min(outputs, inputs) > 1:
        return {pair: pair for pair in pairs}
    columns = 16 if len(pairs) > 32 else min(len(pairs), 8)
    return {pair: (n % columns, n // columns) for n, pair in enumerate(pairs)}


def _middles(which: Tensor, left: float, top: float) -> list[tuple[float, float]]:
    return [(left + column + 0.5, top + row + 0.5) for row, column in which.nonzero().tolist()]


def _name_channels(axis: Axes, kernels: Kernels, names: tuple[str, str], tile: tuple[float, float]) -> None:
    """Say which kernel is which, where rows and columns have a meaning."""
    if min(len(channels) for channels in kernels.channels) == 1:
        axis.set(xticks=[], yticks=[])
        return
    for side, name, channels, size in zip((axis.xaxis, axis.yaxis), names, kernels.channels, tile, strict=True):
        side.set_ticks([n * size + (size - 1) / 2 for n in range(len(channels))], list(map(str, channels)), fontsize=7)
        side.set_tick_params(length=0)
        side.set_label_text(name, fontsize=9)


def _kernel_notes(kernels: Kernels, names: tuple[str, str], depth: int) -> Iterator[str]:
    yield "a cross marks a frozen entry"
    if sorted(map(len, kernels.channels))[0] == 1 < max(map(len, kernels.channels)):
        yield f"kernels in reading order, by {names[kernels.total[0] == 1]}"
    if depth > 1:
        yield f"the {depth} slices of a kernel side by side"
    shown = [len(channels) for channels in kernels.channels]
    if shown != list(kernels.total):
        total = kernels.total[0] * kernels.total[1]
        yield f"showing {shown[0] * shown[1]:,} of {total:,} kernels, evenly spaced"


# --------------------------------------------------------------------------------------------------------------------
# Matrices


def _draw_matrix(matrix: Matrix, names: tuple[str, str], make_scale: MakeScale) -> tuple[Sheet, list[str]]:
    """Draw a matrix with a cross on each frozen entry, or, where that cannot be seen, with a panel of its own."""
    rows, columns = matrix.shape
    is_marked = max(matrix.shape) <= _MOST_MARKED
    width, height = _panel_size(rows, columns, is_marked)
    beside = rows > columns / 3
    cell = min(width / columns, height / rows)
    sheet = Sheet.blank(width, height, cell=cell, side_by_side=beside, panels=1 if is_marked else 2)
    first, *second = sheet.axes()
    scale = make_scale(matrix.numbers)
    sheet.add_bar(_show(first, matrix.numbers, matrix, **scale), first, scale["label"])
    if is_marked:
        sheet.mark(first, _middles(matrix.share > 0, -0.5, -0.5), "x")
        sheet.mark(first, _middles(matrix.numbers.isnan(), -0.5, -0.5), "o")
    for axis in second:
        sheet.add_bar(_show(axis, stressed(matrix.share), matrix, **shares()), axis, "share frozen", SHARE_NAMES)
    for axis in [first, *second]:
        name_sides(axis, names)
    return sheet, list(_matrix_notes(matrix, is_marked))


def _panel_size(rows: int, columns: int, is_marked: bool) -> tuple[float, float]:
    """Return the inches of a panel: square cells for a small matrix, a readable panel for any other."""
    if is_marked:
        side = min(0.4, 6.5 / columns, 6 / rows)
        return side * columns, side * rows
    wide, high = (4.0, 4.0) if rows > columns / 3 else (7.0, 2.0)
    return min(wide, high * max(columns / rows, 0.5)), max(
        0.5 if rows == 1 else 1.2, min(high, wide * rows / columns * 2)
    )


def _show(axis: Axes, numbers: Tensor, matrix: Matrix, **style: Any) -> Any:
    """Draw cells where the entries that they stand for lie."""
    rows, columns = matrix.shape
    down, across = (size * count for size, count in zip(matrix.cell, matrix.numbers.shape, strict=True))
    image = axis.imshow(
        numbers.numpy(),
        interpolation="nearest",
        origin="upper",  # whatever the style says: the extent has row 0 on top
        aspect="auto",
        extent=(-0.5, across - 0.5, down - 0.5, -0.5),
        **style,
    )
    axis.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))  # the last cell may stand for fewer
    axis.spines[:].set_position(("outward", 2))  # a thin row at the edge must not lie under the frame
    return image


def _side_names(shape: torch.Size, owner: Any) -> tuple[str, str]:
    """Say what lies across and what lies down."""
    if len(shape) < 2:
        return ("entry" if shape else "", "")
    if len(shape) == 2:
        return "column", "row"
    if shape[2:].numel() == 1:
        down, across = _channel_names(owner)
        return across, down
    return f"dimension {len(shape) - 1}", f"dimensions 0 to {len(shape) - 2}"


def _matrix_notes(matrix: Matrix, is_marked: bool) -> Iterator[str]:
    if is_marked:
        yield "a cross marks a frozen entry"
    else:
        yield "black is frozen, grey in part"
        if not torch.equal(stressed(matrix.share), matrix.share):
            yield "what is rare is drawn larger than it is"
    if matrix.cell != (1, 1):
        high, wide = matrix.cell
        yield f"each cell is the entry of largest magnitude of {high} x {wide}, and the share of them that is frozen"
