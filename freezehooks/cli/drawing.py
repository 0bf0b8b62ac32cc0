"""Which entries are frozen, as a drawing of a few lines of text."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Final, NamedTuple

import torch
from torch import Tensor

from .._counted import counted

_COLUMNS: Final = 64
_ROWS: Final = 24
_SIDE_COLUMNS: Final = 16
_SIDE_ROWS: Final = 12
_SIDES: Final = 16
"""At most so many cells a plane, smaller ones where a kernel has several planes, and so many of those."""

_WIDTH: Final = 80
_MOST_KINDS: Final = 4

_FREE, _FROZEN, _UNKNOWN = 0, 1, 2  # the largest of a cell's tells whether one of them is unknown

_SINGULAR: Final = {"kernels": "kernel", "matrices": "matrix"}

_LEGEND: Final = {"#": "frozen", "·": "free", "+": "some of both", "?": "depends on the numbers"}


class _Kind(NamedTuple):
    """Kernels that are alike: one of them, which of all it is, and how many more there are."""

    kernel: Tensor
    position: int
    others: int


def draw(frozen: Tensor, unknown: Tensor | None = None, spatial: int | None = None) -> str:
    """Draw a bool tensor: kernels that are alike once, large ones in cells that stand for several entries.

    Args:
        frozen: True where an entry is frozen.
        unknown: True where that cannot be said; left out: nowhere.
        spatial: How many of the last dimensions make one kernel. Left out: all but the first two, and all of a
            vector or a matrix.

    Returns:
        Lines of text: each kernel under its heading, what a cell stands for, and a legend.

    Shape:
        `frozen` and `unknown`: the same, any.

    Example:
        >>> import torch
        >>> print(draw(torch.eye(3, dtype=torch.bool)))
          # · ·
          · # ·
          · · #
        <BLANKLINE>
        # frozen   · free
    """
    if not frozen.numel():
        return "no entries, nothing to draw"
    codes = frozen.view(torch.uint8)  # as it is: it may be large
    if unknown is not None:
        codes = codes.masked_fill(unknown, _UNKNOWN)
    depth = spatial or (codes.ndim - 2 if codes.ndim > 2 else codes.ndim)
    blocks = list(_blocks(codes, codes.ndim - depth))
    drawn = "\n".join(blocks)
    legend = "   ".join(f"{sign} {meaning}" for sign, meaning in _LEGEND.items() if sign in _cells_only(drawn))
    return f"{drawn}\n\n{legend}"


def _cells_only(drawn: str) -> str:
    """Return a drawing's rows without its headings, which are the lines that do not begin with a space."""
    return "\n".join(line for line in drawn.splitlines() if line.startswith(" "))


def _blocks(codes: Tensor, leading: int) -> Iterator[str]:
    lead, spatial = codes.shape[:leading], codes.shape[leading:]
    kernels = codes.reshape(lead.numel(), *spatial)
    kinds, rest = _kinds(kernels)
    scale = _scale(spatial)
    noun = "kernels" if leading == 2 else "matrices"
    for kind in kinds:
        heading = _heading(kind, lead, noun)
        yield from filter(None, [heading, _plane_rows(kind.kernel, scale)])
    if rest:
        yield f"{counted(rest, f'more {_SINGULAR[noun]} differs', f'more {noun} differ')} from these"
    if any(size > 1 for size in scale):
        uneven = any(size % cell for size, cell in zip(spatial, scale, strict=True))
        yield f"each cell stands for {_product(scale)} entries{', the last ones for what is left' if uneven else ''}"


def _product(sizes: list[int]) -> str:
    return " x ".join(f"{size:,}" for size in sizes)


def _kinds(kernels: Tensor) -> tuple[list[_Kind], int]:
    """Return the first few different kernels, in order, and how many kernels are like none of them."""
    rows = kernels.reshape(len(kernels), -1)
    if len(rows) == 1 or bool((rows == rows[:1]).all()):  # by far the most common, and worth no index
        return [_Kind(kernels[0], 0, len(kernels) - 1)], 0
    left = torch.arange(len(rows))
    kinds: list[_Kind] = []
    while len(left) and len(kinds) < _MOST_KINDS:
        first = int(left[0])
        alike = (rows[left] == rows[first]).all(dim=1)
        kinds.append(_Kind(kernels[first], first, int(alike.sum()) - 1))
        left = left[~alike]
    return kinds, len(left)


def _heading(kind: _Kind, lead: torch.Size, noun: str) -> str:
    if not lead:
        return ""
    if kind.others + 1 == lead.numel():
        return f"all {'x'.join(map(str, lead))} {noun}:" if kind.others else f"the one {_SINGULAR[noun]}:"
    where = ", ".join(str(int(position)) for position in torch.unravel_index(torch.tensor(kind.position), lead))
    more = f" and {kind.others:,} more" if kind.others else ""
    return f"{_SINGULAR[noun]} [{where}]{more}:"


# --------------------------------------------------------------------------------------------------------------------
# One kernel


def _scale(shape: torch.Size) -> list[int]:
    """Return how many entries a cell stands for along each dimension."""
    planes = shape[:-2]
    columns, rows = (_SIDE_COLUMNS, _SIDE_ROWS) if planes.numel() > 1 else (_COLUMNS, _ROWS)
    sides = max(1, int(_SIDES ** (1 / len(planes)))) if planes else 1
    most = [*[sides] * len(planes), rows, columns][-len(shape) :] if shape else []
    return [-(-size // cells) for size, cells in zip(shape, most, strict=True)]


def _plane_rows(kernel: Tensor, scale: list[int]) -> str:
    signs = _signs(kernel, scale)
    if len(scale) < 3 or signs.shape[:-2].numel() == 1:
        return "\n".join(f"  {line}" for line in _lines(signs.reshape(-1, signs.shape[-1] if scale else 1)))
    return "\n\n".join(_side_by_side(signs, _planes(kernel.shape[:-2], scale)))


def _signs(kernel: Tensor, scale: list[int]) -> Tensor:
    """Return the character codes of a kernel's cells."""
    lowest, highest = kernel, kernel
    for dimension, size in enumerate(scale):
        lowest = torch.stack([part.amin(dimension) for part in lowest.split(size, dimension)], dimension)
        highest = torch.stack([part.amax(dimension) for part in highest.split(size, dimension)], dimension)
    signs = torch.full_like(lowest, ord("+"))
    signs[highest == _FREE] = ord("·")
    signs[lowest == _FROZEN] = ord("#")
    signs[highest == _UNKNOWN] = ord("?")
    return signs


def _lines(plane: Tensor) -> list[str]:
    between = " " if 2 * plane.shape[1] <= _COLUMNS + 1 else ""
    return [between.join(map(chr, row)) for row in plane.tolist()]


def _side_by_side(signs: Tensor, names: list[str]) -> Iterator[str]:
    """Yield the planes of a kernel next to each other, as many at a time as a line holds."""
    planes = signs.reshape(-1, *signs.shape[-2:])
    drawn = [[name, *_lines(plane)] for name, plane in zip(names, planes, strict=True)]
    width = max(len(line) for lines in drawn for line in lines)
    together = max(1, (_WIDTH - 2) // (width + 3))
    for first in range(0, len(drawn), together):
        rows = zip(*drawn[first : first + together], strict=True)
        yield "\n".join("  " + "   ".join(line.ljust(width) for line in row).rstrip() for row in rows)


def _planes(shape: torch.Size, scale: list[int]) -> list[str]:
    """Return an index for each plane of cells, as Python writes it; a cell may stand for several positions."""
    starts = [range(0, size, cell) for size, cell in zip(shape, scale, strict=False)]
    parts = [
        [str(start) if cell == 1 else f"{start}:{min(start + cell, size)}" for start in run]
        for run, size, cell in zip(starts, shape, scale, strict=False)
    ]
    return [f"[{', '.join(position)}, :, :]" for position in product(*parts)]
