"""The least of a tensor's numbers, found in pieces: a sort would take nine times the memory of a 16-bit weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final, TypeAlias

import torch
from torch import Tensor

from .bits import bits, count_true

_DIGIT: Final = 16
"""How many bits of each number are looked at in one pass."""

_PIECE: Final = 1 << 22
"""How many numbers are looked at at once."""

Pieces: TypeAlias = Callable[[], Iterable[Tensor]]
"""Goes through numbers in pieces: flat tensors of integers that are not negative."""


def of_least_magnitude(parameter: Tensor, count: int, *, largest: bool = False) -> Tensor:
    """Return True at so many entries of least magnitude, or of largest; of equal ones, at the first.

    The bits of positive floating-point numbers are in the order of the numbers, and nan comes last.
    """
    flat = parameter.reshape(-1)
    width = 8 * bits(flat[:0].abs()).element_size()
    highest = (1 << width - 1) - 1

    def pieces() -> Iterator[Tensor]:
        for piece in flat.split(_PIECE):
            magnitude = bits(piece.abs())
            yield highest - magnitude if largest else magnitude

    return least(pieces, width, count).view(parameter.shape)


def least_drawn(parameter: Tensor, count: int, draw: Callable[[Tensor], Tensor]) -> Tensor:
    """Return True at so many entries of least draw.

    Args:
        parameter: The parameter.
        count: How many.
        draw: From positions in the flattened parameter to numbers of 32 bits, as integers.
    """

    def pieces() -> Iterator[Tensor]:
        for start in range(0, parameter.numel(), _PIECE):
            yield draw(torch.arange(start, min(start + _PIECE, parameter.numel()), device=parameter.device))

    return least(pieces, 32, count).view(parameter.shape)


def least(pieces: Pieces, width: int, count: int) -> Tensor:
    """Return True at so many of the least numbers; of equal ones, at the first.

    Args:
        pieces: The numbers.
        width: How many bits they have.
        count: How many.

    Shape:
        ``(numbers,)``, bool.
    """
    threshold, below = _threshold(pieces, width, count)
    selected, wanted = [], count - below
    for piece in pieces():
        equal = piece == threshold
        taken = min(count_true(equal), wanted)
        selected.append((piece < threshold) | (equal & (equal.cumsum(0) <= taken)))
        wanted -= taken
    return torch.cat(selected)


def _threshold(pieces: Pieces, width: int, count: int) -> tuple[int, int]:
    """Return the number that comes last of so many least ones, and how many are below it: digit by digit."""
    found, below = 0, 0
    for shift in range(width - _DIGIT, -1, -_DIGIT) if width > _DIGIT else [0]:
        counts = sum(_counts(piece, found, shift, shift + _DIGIT < width) for piece in pieces()).cumsum(0)
        digit = int((counts < count - below).sum())
        below += int(counts[digit - 1]) if digit else 0
        found = found << _DIGIT | digit
    return found, below


def _counts(piece: Tensor, found: int, shift: int, has_higher: bool) -> Tensor:
    """Count the numbers of a piece by the digit at a shift; those alone whose higher digits were found."""
    inside = piece[piece >> shift + _DIGIT == found] if has_higher else piece
    return torch.bincount(inside >> shift & (1 << _DIGIT) - 1, minlength=1 << _DIGIT)
