"""Compares two tensors bit for bit: how many entries differ, which, and by how much."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from .._entries.bits import differ
from .output import shown

_AT_ONCE: Final = 1 << 20
"""How many entries are compared at once, which bounds the memory that a comparison needs."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry that differs: its index, and what each tensor holds there, as exact text."""

    index: tuple[int, ...]
    found: str
    expected: str

    def told(self, name: str, form: str) -> str:
        """Fill a format string with the entry as a rule would name it, what was found, and what was expected."""
        index = f"[{', '.join(map(str, self.index))}]" if self.index else ""
        return form.format(shown(name) + index, self.found, self.expected)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What differs between two tensors.

    Attributes:
        count: How many entries differ.
        compared: How many entries were compared.
        examples: The first entries that differ.
        worst: The entry that differs most, or None if none does.
        gap: By how much that entry differs; infinite if either tensor holds nan there.
    """

    count: int
    compared: int
    examples: tuple[Entry, ...]
    worst: Entry | None
    gap: float

    def listed(self, name: str, form: str) -> Iterator[str]:
        """Yield a line for each example, as `Entry.told` formats it, and one with the number of all others."""
        yield from (f"    {entry.told(name, form)}" for entry in self.examples)
        left = self.count - len(self.examples)
        if left and self.examples:
            yield f"    and {left:,} more"


def all_alike(numbers: Tensor) -> bool:
    """Return whether all numbers of a flat tensor that is not empty are the same, bit for bit."""
    return not bool(differ(numbers, numbers[:1].expand_as(numbers)).any())


def compare(found: Tensor, expected: Tensor, limit: int, where: Tensor | None = None) -> Comparison:
    """Compare two tensors of the same shape and dtype.

    Args:
        found: The tensor to check.
        expected: What it should hold.
        limit: How many examples to return.
        where: The mask of the entries to compare. Left out: all.
    """
    if found.dtype == getattr(torch, "float4_e2m1fn_x2", None):  # two numbers in each byte: compare the bytes
        found, expected = found.view(torch.uint8), expected.view(torch.uint8)
    ours, theirs, asked = found.reshape(-1), expected.reshape(-1), None if where is None else where.reshape(-1)
    wide = torch.complex128 if found.is_complex() else torch.float64
    count, gap, worst = 0, -1.0, -1
    first: list[int] = []
    for start in range(0, ours.numel(), _AT_ONCE):
        a, b = ours[start : start + _AT_ONCE], theirs[start : start + _AT_ONCE]
        wrong = differ(a, b)
        places = (wrong if asked is None else wrong & asked[start : start + _AT_ONCE]).nonzero().flatten()
        if len(places):
            count += len(places)
            first += (start + places[: limit - len(first)]).tolist() if len(first) < limit else []
            gaps = (a[places].to(wide) - b[places].to(wide)).abs().nan_to_num(nan=math.inf, posinf=math.inf)
            if float(gaps.max()) > gap:
                gap, worst = float(gaps.max()), start + int(places[gaps.argmax()])
    examples = tuple(_entry(found, expected, place) for place in first)
    compared = ours.numel() if asked is None else int(asked.sum())
    return Comparison(count, compared, examples, _entry(found, expected, worst) if count else None, max(gap, 0.0))


def _entry(found: Tensor, expected: Tensor, place: int) -> Entry:
    index = _index(place, found.shape)
    ours, theirs = repr(found[index].item()), repr(expected[index].item())
    if ours == theirs:  # different bit patterns of nan
        ours, theirs = (f"{text} ({_hex(t[index])})" for text, t in ((ours, found), (theirs, expected)))
    return Entry(index, ours, theirs)


def _index(place: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Convert a position in the flat tensor to an index, far quicker than torch does for a single number."""
    index: list[int] = []
    for size in reversed(shape):
        place, along = divmod(place, size)
        index.append(along)
    return tuple(reversed(index))


def _hex(number: Tensor) -> str:
    return f"bits 0x{bytes(number.reshape(1).view(torch.uint8).tolist()[::-1]).hex()}"
