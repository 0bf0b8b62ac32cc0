"""Writes rules for the entries that are the same in two checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from .._entries.bits import differ
from .._rules.region import WHOLE, Index, IndexItem, Not, Region, Slice
from .._rules.rule import TARGET, Keep, Rule, keep
from .base import overlap
from .checkpoints import is_freezable
from .comparison import all_alike
from .output import shown

_LONGEST: Final = 120
"""The longest text of a region that is still readable."""


def unchanged_rules(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], names: Mapping[str, str]
) -> Iterator[str]:
    """Yield rules, one a line, that freeze exactly the entries that are the same in both files.

    If there is no short rule for a tensor, a comment is written instead.

    Args:
        first: The tensors of one file.
        second: The tensors of the other file, whose names the rules use.
        names: The names in the first file, by those in the second.
    """
    for name, now in second.items():
        before = first[names[name]] if name in names else None
        if before is None or before.dtype != now.dtype or before.ndim != now.ndim:
            continue
        if not is_freezable(now) or now.element_size() == 1:  # no rule can freeze it
            continue
        same, box = torch.zeros(now.shape, dtype=torch.bool), overlap(before, now)
        same[box] = ~differ(before[box], now[box])
        if bool(same.any()):
            yield _rule(name, before, now, same)


def _rule(name: str, before: Tensor, now: Tensor, same: Tensor) -> str:
    unchanged = f"# {shown(name)}: {int(same.sum()):,} of {same.numel():,} entries unchanged"
    if any(was > size for was, size in zip(before.shape, now.shape, strict=True)):
        return f"{unchanged}, but it has lost others: freeze what both files have"
    if not TARGET.fullmatch(name) or {"*", "?"} & set(name) or not name.isprintable():
        return f"# {shown(name)}: no rule can name it alone: freeze it through a mapping"
    region = region_of(same)
    if region is None:
        return f"{unchanged}, no short rule: freeze them by the mask `before == after`"
    return str(Rule(name, region, _one_number(now[same]))).removesuffix(" = keep")


def _one_number(numbers: Tensor) -> float | Keep:
    """Return the number that all entries hold, bit for bit, in as few digits as are exact, or else `keep`."""
    number: Any = numbers[0].item()
    number = number.real if isinstance(number, complex) else number
    if not math.isfinite(number) or not all_alike(numbers):
        return keep
    largest = torch.finfo(numbers.dtype).max  # rounding up to fewer digits may leave the dtype's range
    tries = (float(f"{number:.{digits}g}") for digits in range(1, 18))
    entry = numbers[:1]
    exact = (n for n in tries if abs(n) <= largest and not bool(differ(entry, torch.full_like(entry, n)).any()))
    return next(exact, keep)


def region_of(wanted: Tensor) -> Region | None:
    """Return a region for exactly the True entries: the whole tensor, a box, or all but a box; None if not short.

    Args:
        wanted: A bool tensor with at least one True entry.

    Example:
        >>> str(region_of(torch.tensor([[False, True, True], [False, True, True]])))
        ':, 1:'
    """
    if bool(wanted.all()):
        return WHOLE
    inside, outside = _box(wanted), _box(~wanted)
    found = (inside, None if outside is None else Not(outside))
    short = [region for region in found if region is not None and len(str(region)) <= _LONGEST]
    return min(short, key=lambda region: len(str(region)), default=None)


def _box(wanted: Tensor) -> Index | None:
    """Return an index of the True entries if they are a product of positions, with at most one list, or None."""
    every = range(wanted.ndim)
    hits = [wanted.any(dim=[d for d in every if d != along]) if wanted.ndim > 1 else wanted for along in every]
    positions = [hit.nonzero().flatten().tolist() for hit in hits]
    if math.prod(map(len, positions)) != int(wanted.sum()):
        return None
    items = [_item(taken, size) for taken, size in zip(positions, wanted.shape, strict=True)]
    if sum(isinstance(item, tuple) for item in items) > 1:  # two lists in one index would be read side by side
        return None
    while items[-1] == _ALL:
        items.pop()
    full = next(n for n, item in enumerate(items) if item != _ALL)
    return Index((..., *items[full:]) if full > 2 and len(items) == wanted.ndim else tuple(items))


_ALL: Final = Slice(None, None, None)


def _item(taken: list[int], size: int) -> IndexItem:
    """Write the positions along a dimension as an integer, a slice or a list."""
    first, end = taken[0], taken[-1] + 1
    if len(taken) == 1 and size > 1:
        return first
    if end - first > len(taken):
        return tuple(taken)
    return Slice(first or None, end if end < size else None, None)
