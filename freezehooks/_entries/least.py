"""Selects the least numbers of a tensor chunk by chunk: sorting takes nine times the memory of a 16-bit weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from typing import Final, TypeAlias

import torch
from torch import Tensor

from .bits import bits, count_true

_DIGIT: Final = 16
"""How many bits of each number one pass looks at."""

_CHUNK: Final = 1 << 22
"""How many numbers are in a chunk."""

Chunks: TypeAlias = Callable[[], Iterable[Tensor]]
"""Returns the numbers in chunks: flat tensors of integers that are not negative."""


def of_least_magnitude(parameter: Tensor, count: int, *, largest: bool = False) -> Tensor:
    """Return True at the `count` entries of least (or largest) magnitude; earlier entries win ties.

    Positive floating-point numbers are in the same order as their bits read as integers, with nan last.
    """
    flat = parameter.reshape(-1)
    width = 8 * bits(flat[:0].abs()).element_size()
    highest = (1 << width - 1) - 1

    def chunks() -> Iterator[Tensor]:
        for chunk in flat.split(_CHUNK):
            magnitude = bits(chunk.abs())
            yield highest - magnitude if largest else magnitude

    return least(chunks, width, count).view(parameter.shape)


def least_drawn(parameter: Tensor, count: int, draw: Callable[[Tensor], Tensor]) -> Tensor:
    """Return True at the `count` entries with the least draws.

    Args:
        parameter: The parameter.
        count: How many entries.
        draw: A function from positions in the flat parameter to integers of 32 bits.
    """

    def chunks() -> Iterator[Tensor]:
        for start in range(0, max(parameter.numel(), 1), _CHUNK):  # of no entries, one empty chunk
            yield draw(torch.arange(start, min(start + _CHUNK, parameter.numel()), device=parameter.device))

    return least(chunks, 32, count).view(parameter.shape)


def least(chunks: Chunks, width: int, count: int) -> Tensor:
    """Return True at the `count` least numbers; earlier numbers win ties.

    Args:
        chunks: The numbers.
        width: How many bits each has.
        count: How many to select.

    Shape:
        ``(numbers,)``, bool.
    """
    threshold, below = _threshold(chunks, width, count)
    selected, wanted = [], count - below
    for chunk in chunks():
        equal = chunk == threshold
        taken = min(count_true(equal), wanted)
        selected.append((chunk < threshold) | (equal & (equal.cumsum(0) <= taken)))
        wanted -= taken
    return torch.cat(selected)


def _threshold(chunks: Chunks, width: int, count: int) -> tuple[int, int]:
    """Return the largest of the `count` least numbers, found digit by digit, and how many are below it."""
    found, below = 0, 0
    for shift in range(width - _DIGIT, -1, -_DIGIT) if width > _DIGIT else [0]:
        counted = (_counts(chunk, found, shift, shift + _DIGIT < width) for chunk in chunks())
        counts = reduce(torch.add, counted).cumsum(0)
        digit = int((counts < count - below).sum())
        below += int(counts[digit - 1]) if digit else 0
        found = found << _DIGIT | digit
    return found, below


def _counts(chunk: Tensor, found: int, shift: int, has_higher: bool) -> Tensor:
    """Count the numbers of a chunk by their digit at a shift, leaving out those whose higher digits are not `found`."""
    inside = chunk[chunk >> shift + _DIGIT == found] if has_higher else chunk
    return torch.bincount(inside >> shift & (1 << _DIGIT) - 1, minlength=1 << _DIGIT)
