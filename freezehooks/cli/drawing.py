"""Draws which entries are frozen as a few lines of text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from .._counted import counted

_ROWS: Final = 24
_COLUMNS: Final = 64
"""The most cells that a drawing has in either direction."""

_MOST_KINDS: Final = 4

_LEGEND: Final = {"#": "frozen", "·": "free", "+": "some of both"}


def draw(frozen: Tensor, spatial: int | None = None) -> str:
    """Draw a bool tensor: equal kernels only once, and large ones in cells of several entries.

    Args:
        frozen: True where an entry is frozen.
        spatial: How many of the last dimensions make up a drawing, at most 2. Left out: those of a kernel or a plane
            of it, or all of a vector or a matrix.

    Returns:
        Lines of text: each kernel under its heading, what a cell stands for, and a legend.

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
    leading = frozen.ndim - (spatial or {0: 0, 1: 1, 3: 1}.get(frozen.ndim, 2))
    lines = list(_lines(frozen.flatten(0, leading - 1) if leading else frozen[None], frozen.shape[:leading]))
    cells = "".join(line for line in lines if line.startswith(" "))  # without the headings
    legend = "   ".join(f"{sign} {meaning}" for sign, meaning in _LEGEND.items() if sign in cells)
    return "\n".join([*lines, "", legend])


def _lines(kernels: Tensor, lead: torch.Size) -> Iterator[str]:
    """Yield the lines of all kernels; `lead` is the shape of the tensor without the kernels' own dimensions."""
    one, several = {1: ("matrix", "matrices"), 2: ("kernel", "kernels")}.get(len(lead), ("plane", "planes"))
    kinds, rest = _kinds(kernels)
    scale = [
        -(-size // most) for size, most in zip(kernels.shape[1:], (_ROWS, _COLUMNS)[3 - kernels.ndim :], strict=True)
    ]
    for position, others in kinds:
        if lead:
            yield _heading(position, others, lead, one, several)
        yield from _drawn(kernels[position], scale)
    if rest:
        yield f"{counted(rest, f'more {one} differs', f'more {several} differ')} from these"
    if any(size > 1 for size in scale):
        uneven = any(size % cell for size, cell in zip(kernels.shape[1:], scale, strict=True))
        entries = " x ".join(f"{size:,}" for size in scale)
        yield f"each cell stands for {entries} entries{', the last ones for what is left' if uneven else ''}"


def _kinds(kernels: Tensor) -> tuple[list[tuple[int, int]], int]:
    """Return the first few distinct kernels, each with the number of its duplicates, and how many are left over."""
    rows = kernels.flatten(1) if kernels.ndim > 1 else kernels[:, None]
    if len(rows) == 1 or bool((rows == rows[:1]).all()):  # by far the most common case
        return [(0, len(rows) - 1)], 0
    left = torch.arange(len(rows))
    kinds: list[tuple[int, int]] = []
    while len(left) and len(kinds) < _MOST_KINDS:
        first = int(left[0])
        alike = (rows[left] == rows[first]).all(dim=1)
        kinds.append((first, int(alike.sum()) - 1))
        left = left[~alike]
    return kinds, len(left)


def _heading(position: int, others: int, lead: torch.Size, one: str, several: str) -> str:
    if others + 1 == lead.numel():
        return f"all {'x'.join(map(str, lead))} {several}:" if others else f"the one {one}:"
    where = ", ".join(str(int(index)) for index in torch.unravel_index(torch.tensor(position), lead))
    more = f" and {others:,} more" if others else ""
    return f"{one} [{where}]{more}:"


def _drawn(kernel: Tensor, scale: list[int]) -> Iterator[str]:
    """Yield the rows of a kernel, with a sign for each cell."""
    every, some = kernel, kernel
    for dimension, size in enumerate(scale):
        every = torch.stack([cell.all(dimension) for cell in every.split(size, dimension)], dimension)
        some = torch.stack([cell.any(dimension) for cell in some.split(size, dimension)], dimension)
    signs = torch.full(every.shape, ord("+"))
    signs[~some], signs[every] = ord("·"), ord("#")
    rows = signs.reshape(-1, signs.shape[-1] if scale else 1)
    between = " " if 2 * rows.shape[1] <= _COLUMNS + 1 else ""
    yield from (f"  {between.join(map(chr, row))}" for row in rows.tolist())
