"""What to draw of a parameter: some of its kernels, or a matrix of cells few enough to see."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

MOST_ACROSS: Final = 16
"""Kernels that are drawn beside one another."""

MOST_DOWN: Final = 12
"""Kernels that are drawn below one another."""

_WIDEST, _HIGHEST = 128, 96  # taps that all kernels together may take, so that each can be seen
_LONGEST: Final = 48  # taps along a side of what is taken for a kernel
_FINEST: Final = 192  # cells along a side of a matrix
_RARE: Final = 0.02  # the share of cells up to which those that differ from the others are drawn larger
_STROKE: Final = 1  # by how many cells to every side


@dataclass(frozen=True, slots=True)
class Kernels:
    """Kernels of a convolution, each a stack of slices.

    Attributes:
        numbers: What the taps hold, ``(outputs, inputs, depth, height, width)``.
        frozen: Where they are frozen, of the same shape.
        channels: Which channels they are of, along the first dimension and along the second.
        total: How many channels the parameter has there.
    """

    numbers: Tensor
    frozen: Tensor
    channels: tuple[list[int], list[int]]
    total: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Matrix:
    """Rows and columns of cells, each of one entry or of a block of entries.

    Attributes:
        numbers: For each cell the entry of largest magnitude; nan where an entry is not finite.
        share: The share of frozen entries in each cell.
        shape: The rows and columns of entries.
        cell: The rows and columns of entries that a cell stands for.
    """

    numbers: Tensor
    share: Tensor
    shape: tuple[int, int]
    cell: tuple[int, int]


def looks_like_kernels(shape: torch.Size) -> bool:
    """Return whether a tensor is drawn kernel by kernel: all but its first two dimensions are short, and not all 1."""
    inner = shape[2:]
    return math.prod(inner) > 1 and max(inner) <= _LONGEST and math.prod(inner[:-2]) * inner[-1] <= _WIDEST


def kernels_of(numbers: Tensor, frozen: Tensor) -> Kernels:
    """Return as many kernels as can be seen, evenly spaced over the channels."""
    outputs, inputs, *inner = numbers.shape
    height, width = inner[-2:] if len(inner) > 1 else (1, inner[0])
    depth = math.prod(inner[:-2])
    across = min(MOST_ACROSS, _WIDEST // (depth * (width + 1)) or 1)
    down = min(MOST_DOWN, _HIGHEST // (height + 1) or 1)
    if min(outputs, inputs) == 1:  # in reading order, over all rows
        across = down = across * down
    channels = _spaced(outputs, across), _spaced(inputs, down)

    def picked(tensor: Tensor) -> Tensor:
        chosen = tensor[channels[0]][:, channels[1]]
        return chosen.reshape(len(channels[0]), len(channels[1]), depth, height, width)

    return Kernels(_readable(picked(numbers)).double(), picked(frozen).cpu(), channels, (outputs, inputs))


def _spaced(size: int, most: int) -> list[int]:
    """Return at most so many numbers below `size`, evenly spaced, the first and the last among them."""
    if size <= most:
        return list(range(size))
    return [round(n * (size - 1) / max(most - 1, 1)) for n in range(most)]


def matrix_of(numbers: Tensor, frozen: Tensor) -> Matrix:
    """Return a tensor as a matrix of cells: the last dimension across, all others down.

    A vector is a row, and a convolution of single taps is the matrix of its channels. It goes from band to band, so
    that a large one takes no memory but its cells'.
    """
    is_pointwise = numbers.ndim > 2 and numbers.shape[2:].numel() == 1  # a convolution of single taps
    columns = numbers.shape[1 if is_pointwise else -1] if numbers.ndim else 1
    numbers, frozen = numbers.reshape(-1, columns), frozen.reshape(-1, columns)
    rows = len(numbers)
    high, wide = math.ceil(rows / _FINEST), math.ceil(columns / _FINEST)
    bands = [(numbers[top : top + high], frozen[top : top + high]) for top in range(0, rows, high)]
    largest = torch.stack([_largest(band, wide) for band, _ in bands])
    share = torch.stack([_by_cell(held.count_nonzero(0) / len(held), wide, _mean) for _, held in bands])
    return Matrix(largest.cpu(), share.cpu(), (rows, columns), (high, wide))


def _largest(band: Tensor, wide: int) -> Tensor:
    """Return for each cell of a band the entry of largest magnitude, or nan where one is not finite."""
    numbers = _readable(band)
    low, high = numbers.amin(0), numbers.amax(0)
    broken = ~(low.isfinite() & high.isfinite())
    low = _by_cell(low.masked_fill(broken, 0), wide, lambda cells: cells.amin(1))
    high = _by_cell(high.masked_fill(broken, 0), wide, lambda cells: cells.amax(1))
    largest = torch.where(high >= -low, high, low).double()
    return largest.masked_fill(_by_cell(broken, wide, lambda cells: cells.any(1)), torch.nan)


def stressed(share: Tensor) -> Tensor:
    """Return shares with the few cells that differ from all the others grown, so that a thin line can be seen.

    A row of free entries below thousands of frozen ones would otherwise be a hair of dark grey on black.
    """
    common = 1.0 if bool((share == 1).float().mean() > 0.5) else 0.0
    rare = share != common
    reach = [_STROKE if size > _FINEST // 2 else 0 for size in share.shape]  # a short side is drawn large as it is
    if not any(reach) or not 0 < float(rare.double().mean()) <= _RARE:
        return share
    window = [2 * each + 1 for each in reach]
    grown = torch.nn.functional.max_pool2d(rare[None].double(), window, stride=1, padding=reach)[0].bool()
    return torch.where(grown, 1 - common, share)


def count_broken(numbers: Tensor) -> int:
    """Return how many entries are nan or inf; it takes little memory where none is."""
    if not numbers.numel() or (not numbers.is_complex() and _ends_are_finite(numbers)):
        return 0
    return numbers.numel() - int(numbers.isfinite().sum())


def _ends_are_finite(numbers: Tensor) -> bool:
    return bool(numbers.amin().isfinite() & numbers.amax().isfinite())


def _by_cell(line: Tensor, wide: int, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Reduce the columns of a row of numbers to cells; the last cell may have fewer of them."""
    full = len(line) // wide * wide
    cells = [reduce(line[:full].view(-1, wide))] if full else []
    rest = [reduce(line[full:].view(1, -1))] if full < len(line) else []
    return torch.cat(cells + rest)


def _mean(cells: Tensor) -> Tensor:
    return cells.mean(1)


def _readable(tensor: Tensor) -> Tensor:
    """Return real numbers in a precision that can be drawn: magnitudes of complex ones, on the CPU."""
    real = tensor.abs() if tensor.is_complex() else tensor
    return real.cpu() if real.dtype == torch.float64 else real.cpu().float()
