"""The figure that pictures are drawn on: of the size that its contents need, outside pyplot's state."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Final, TypeAlias

from torch import Tensor

from .._errors import SpecError

try:
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import MaxNLocator
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("frozen.plot needs matplotlib: pip install 'freezehooks[plot]'") from error

_BROKEN: Final = "gold"  # of nan and inf: neither red nor blue
_NUMBERS: Final = colormaps["RdBu"].with_extremes(bad=_BROKEN)
_MAGNITUDES: Final = colormaps["Blues"].with_extremes(bad=_BROKEN)
_SHARES: Final = ListedColormap(["1", "0.78", "0.64", "0.5", "0.36", "0"])
_STEPS: Final = [0.0, 1e-9, 0.25, 0.5, 0.75, 1 - 1e-7, 1.0]  # none and all are shades of their own

SHARE_NAMES: Final = {_STEPS[1] / 2: "none", 0.5: "half", (_STEPS[-2] + 1) / 2: "all"}
"""What stands at the scale of `shares`."""


class Picture(Figure):
    """A figure outside pyplot's state that notebooks show as it is."""

    def _repr_png_(self) -> bytes:
        drawn = BytesIO()
        self.savefig(drawn, format="png")
        return drawn.getvalue()


def checked_path(path: Path) -> Path:
    known = sorted(set(Figure().canvas.get_supported_filetypes()) - {"pgf"})  # which needs LaTeX
    if path.suffix[1:].lower() not in known:
        raise SpecError(
            f"`path` must end in the suffix of a picture format, found {path.name!r}", f"use one of {', '.join(known)}"
        )
    return path


def save(figure: Figure, file: Path) -> None:
    """Write a picture, and make the folder for it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


@dataclass(frozen=True, slots=True)
class Sheet:
    figure: Figure
    cell: float  # inches

    @staticmethod
    def blank(width: float, height: float, *, cell: float = 1, side_by_side: bool = True, panels: int = 1) -> Sheet:
        """Make a sheet for panels of so many inches, with room for a colour bar beside each."""
        across, down = (panels, 1) if side_by_side else (1, panels)
        size = max(across * (width + 1.4), 4.5), down * (height + 0.5) + 1.0
        figure = Picture(figsize=size, dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
        for axis in figure.subplots(down, across, squeeze=False).flat:
            axis.grid(False)  # some styles draw one, over the entries
        return Sheet(figure, cell)

    def axes(self) -> list[Axes]:
        return list(self.figure.axes)

    def write(self, title: list[str], notes: list[str]) -> None:
        """Write the title above and the notes below, in lines that fit."""
        across = self.figure.get_figwidth()
        top = [line for text in title for line in _lines(text, int(across * 13))]
        bottom = _lines("; ".join(notes), int(across * 16))
        self.figure.suptitle("\n".join(top), x=0.02, ha="left", fontsize=10, parse_math=False)
        self.figure.supxlabel("\n".join(bottom), x=0.02, ha="left", fontsize=8, parse_math=False)
        self.figure.set_figheight(self.figure.get_figheight() + 0.16 * (len(top) + len(bottom) - 4))

    def mark(self, axis: Axes, points: Iterable[tuple[float, float]], sign: str) -> None:
        """Put a sign on the middle of each cell, in black with a white rim, so that it reads on every colour."""
        across, down = zip(*points, strict=True) if (points := list(points)) else ((), ())
        side = min(9.0, 0.45 * 72 * self.cell)
        rim = withStroke(linewidth=0.35 * side, foreground="white")
        style: dict[str, Any] = {"facecolors": "none", "edgecolors": "black"} if sign == "o" else {"color": "black"}
        axis.scatter(across, down, side**2, marker=sign, linewidths=0.14 * side, path_effects=[rim], gid=sign, **style)

    def frame(self, axis: Axes, corner: tuple[float, float], width: float, height: float) -> None:
        """Draw a thin line around some cells."""
        axis.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="0.35", linewidth=0.6))

    def add_bar(self, image: Any, axis: Axes, text: str, names: dict[float, str] | None = None) -> None:
        """Put the scale of an image beside it; with names for numbers, where it has some."""
        bar = self.figure.colorbar(image, ax=axis, fraction=0.05, aspect=30, pad=0.02)
        bar.set_label(text, fontsize=9)
        bar.ax.tick_params(labelsize=7)
        if names is not None:
            bar.set_ticks(list(names), labels=list(names.values()))
            bar.ax.tick_params(length=0)


def _lines(text: str, width: int) -> list[str]:
    """Break a text into at most four lines."""
    return textwrap.wrap(text, width, max_lines=4, placeholder=" ...", break_on_hyphens=False)


Scale: TypeAlias = "dict[str, Any]"
MakeScale: TypeAlias = "Callable[[Tensor], Scale]"


def values(numbers: Tensor) -> Scale:
    """Return colours that are symmetric around 0, to the largest finite magnitude."""
    limit = _limit(numbers)
    return {"cmap": _NUMBERS, "vmin": -limit, "vmax": limit, "label": "value"}


def magnitudes(numbers: Tensor) -> Scale:
    """Return colours from 0 to the largest finite magnitude."""
    return {"cmap": _MAGNITUDES, "vmin": 0, "vmax": _limit(numbers), "label": "magnitude"}


def shares() -> Scale:
    """Return greys for shares from none to all, both of which stand out from what lies between."""
    return {"cmap": _SHARES, "norm": BoundaryNorm(_STEPS, len(_STEPS) - 1), "label": "share"}


_MOST: Final = sys.float_info.max / 4  # matplotlib subtracts one end of a scale from the other


def _limit(numbers: Tensor) -> float:
    return min(float(numbers.nan_to_num(0, 0, 0).abs().max()) or 1.0, _MOST)


def name_sides(axis: Axes, names: tuple[str, str]) -> None:
    """Say what lies across and what lies down, with whole numbers at the ticks."""
    for side, name in zip((axis.xaxis, axis.yaxis), names, strict=True):
        side.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
        side.set_label_text(name, fontsize=9)
        side.set_tick_params(labelsize=7)
        if not name:
            side.set_ticks([])
