"""A bool tensor -> the shortest region, as a rule would write it, that says exactly where it is True."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Final

import torch
from torch import Tensor

from .._entries.select import select
from .._errors import RegionError
from .._rules.patterns.kernels import border, center, cross
from .._rules.patterns.magnitudes import zeros
from .._rules.patterns.matrices import diagonal, tril, triu
from .._rules.region import And, Index, IndexItem, Not, Or, Region, Slice

_LONGEST: Final = 120
"""The longest text of a region that is still worth reading."""

_SEARCHED: Final = 1 << 16
"""Below how many entries two regions are tried together: it takes some hundred passes over them."""

_CHANCE: Final = 20
"""How many letters a region of the shape alone may be longer than `zeros`, which may lie there by chance."""

_FIXED: Final = (center, cross, cross(3), border)


def describe(wanted: Tensor, numbers: tuple[Tensor, ...] = ()) -> Region | None:
    """Return the shortest region found that selects exactly what is True, or None where none is short.

    Args:
        wanted: A bool tensor, with something True and something False in it.
        numbers: The tensors, of its shape, that the region may be chosen on: `zeros` is used where all of them have
            their zeros in the same places. Left out: it is not used.
    """
    found = _Search(wanted.shape, numbers).regions(wanted)
    short = sorted({str(region): region for region in found}.items(), key=lambda item: (_cost(item[0]), item[0]))
    for text, region in short:
        if len(text) <= _LONGEST and all(torch.equal(select(region, tensor), wanted) for tensor in numbers or [wanted]):
            return region
    return None


def _cost(text: str) -> int:
    return len(text) + _CHANCE * text.count("zeros")


class _Search:
    """Regions of tensors of one shape, and where each is True."""

    def __init__(self, shape: torch.Size, numbers: tuple[Tensor, ...]) -> None:
        self._shape = shape
        blank = numbers[0] if numbers else torch.empty(shape)
        self._fixed: list[tuple[Region, Tensor]] = []
        for pattern in (*_FIXED, zeros) if numbers else _FIXED:
            try:
                mask = select(pattern, blank)
            except RegionError:  # it does not fit the shape, or selects nothing
                continue
            if pattern != zeros or all(torch.equal(mask, tensor.eq(0)) for tensor in numbers):
                self._fixed.append((pattern, mask))
        rows, columns = (torch.arange(size, dtype=torch.int32) for size in (*shape[-2:], 0, 0)[:2])
        self._distance = columns - rows[:, None] if len(shape) > 1 else None

    def regions(self, wanted: Tensor) -> Iterator[Region]:
        """Yield regions that are True where `wanted` is: one, or one that is negated, or two of them."""
        yield from self._signed(wanted)
        if wanted.numel() < _SEARCHED:
            yield from self._pairs(wanted)
            yield from map(Not, self._pairs(~wanted))

    def _signed(self, wanted: Tensor) -> Iterator[Region]:
        yield from self._single(wanted)
        yield from map(Not, self._single(~wanted))

    def _single(self, wanted: Tensor) -> Iterator[Region]:
        if bool(wanted.any()):
            yield from _products(wanted)
            around = [*self._fixed, *self._banded(wanted, inside=False)]
            yield from (region for region, mask in around if torch.equal(mask, wanted))

    def _pairs(self, wanted: Tensor) -> Iterator[Region]:
        for part, mask in self._parts(wanted):
            yield from (Or(part, rest) for rest in self._signed(wanted & ~mask))
            yield from (Or(part, other) for other, own in self._fixed if torch.equal(mask | own, wanted))
        for whole, mask in self._covers(wanted):
            for rest in self._signed(mask & ~wanted):
                yield And(whole, rest.operand if isinstance(rest, Not) else Not(rest))

    def _parts(self, wanted: Tensor) -> Iterator[tuple[Region, Tensor]]:
        """Yield regions inside `wanted` that are a good part of it."""
        for region, mask in [*self._fixed, *self._banded(wanted, inside=True)]:
            if not bool((mask & ~wanted).any()):
                yield region, mask
        for mask in _grown_boxes(wanted):
            yield from ((region, mask) for region in _products(mask))
        for mask in _full_slices(wanted):
            yield from ((region, mask) for region in _products(mask))

    def _covers(self, wanted: Tensor) -> Iterator[tuple[Region, Tensor]]:
        """Yield regions around `wanted` that are not much more."""
        for region, mask in [*self._fixed, *self._banded(wanted, inside=False)]:
            if not bool((wanted & ~mask).any()):
                yield region, mask
        mask = _bounding(wanted)
        if not bool(mask.all()):
            yield from ((region, mask) for region in _products(mask))

    def _banded(self, wanted: Tensor, inside: bool) -> Iterator[tuple[Region, Tensor]]:
        """Yield what diagonals bound: the largest such regions inside `wanted`, or the smallest around it."""
        if self._distance is None or not wanted.any() or (inside and wanted.all()):
            return
        seen = ~wanted if inside else wanted
        seen = seen.flatten(0, -3).any(dim=0) if seen.ndim > 2 else seen
        lowest, highest = _outermost_diagonals(seen)
        upper, lower = (highest + 1, lowest - 1) if inside else (lowest, highest)
        found = [(triu(upper), self._distance >= upper), (tril(lower), self._distance <= lower)]
        found += [(diagonal(k), self._distance == k) for k in ({0} if inside else {lowest} & {highest})]
        for pattern, mask in found:
            if bool(mask.any()) and not bool(mask.all()):
                yield pattern, mask.expand(self._shape)


def _outermost_diagonals(seen: Tensor) -> tuple[int, int]:
    """Return the lowest and the highest diagonal that a matrix, True somewhere, is True on."""
    height, width = seen.shape
    ahead = torch.arange(1, width + 1, dtype=torch.int32)
    last, first = (seen * ahead).amax(dim=1) - 1, width - (seen * ahead.flip(0)).amax(dim=1)
    rows = torch.arange(height)[last >= 0]
    return int((first[rows] - rows).min()), int((last[rows] - rows).max())


# --------------------------------------------------------------------------------------------------------------------
# Products: some positions along each dimension, in every combination


def _others(mask: Tensor, dimension: int) -> tuple[int, ...]:
    return tuple(d for d in range(mask.ndim) if d != dimension)


def _any_along(mask: Tensor, dimension: int) -> Tensor:
    return mask.any(dim=_others(mask, dimension)) if mask.ndim > 1 else mask


def _products(wanted: Tensor) -> Iterator[Region]:
    """Yield the region of `wanted` where it is every combination of some positions along each dimension."""
    hits = [_any_along(wanted, d).nonzero().flatten() for d in range(wanted.ndim)]
    if (
        not hits
        or math.prod(map(len, hits)) != int(wanted.sum())
        or any(len(h) > _LONGEST and _step(h) is None for h in hits)
    ):
        return
    items = [_item(h, size) for h, size in zip(hits, wanted.shape, strict=True)]
    lists = [d for d, item in enumerate(items) if isinstance(item, tuple)]
    region: Region = _index(items if len(lists) < 2 else [_ALL if d in lists[1:] else i for d, i in enumerate(items)])
    for d in lists[1:]:  # two lists in one index would be read side by side
        region = And(region, _index([*[_ALL] * d, items[d]]))
    yield region


_ALL: Final = Slice(None, None, None)


def _index(items: Iterable[IndexItem]) -> Index:
    """Return an index without the full dimensions at its end, those of a kernel's channels written out."""
    kept = list(items)
    while len(kept) > 1 and kept[-1] == _ALL:
        kept.pop()
    leading = next((n for n, item in enumerate(kept) if item != _ALL), 0)
    return Index((..., *kept[leading:])) if leading > 2 else Index(tuple(kept))


def _item(positions: Tensor, size: int) -> IndexItem:
    if len(positions) == size:
        return _ALL
    if len(positions) == 1:
        return int(positions[0])
    step = _step(positions)
    if step is None:
        return tuple(positions.tolist())
    first, end = int(positions[0]), int(positions[-1]) + 1
    reaches_end = len(range(first, size, step)) == len(positions)
    return Slice(first or None, None if reaches_end else end, None if step == 1 else step)


def _step(positions: Tensor) -> int | None:
    """Return how far positions are from one another, or None where that differs."""
    steps = positions.diff()
    if not len(steps):
        return 1
    return int(steps[0]) if bool((steps == steps[0]).all()) and (len(steps) > 1 or steps[0] == 1) else None


def _bounding(wanted: Tensor) -> Tensor:
    """Return the mask of the smallest product around `wanted`."""
    mask = torch.ones_like(wanted)
    for dimension in range(wanted.ndim):
        shape = [-1 if d == dimension else 1 for d in range(wanted.ndim)]
        mask &= _any_along(wanted, dimension).view(shape)
    return mask


def _full_slices(wanted: Tensor) -> Iterator[Tensor]:
    """Yield for each dimension the mask of its positions at which `wanted` is True throughout."""
    for dimension in range(wanted.ndim if wanted.ndim > 1 else 0):
        full = ~_any_along(~wanted, dimension)
        if bool(full.any()):
            yield full.view([-1 if d == dimension else 1 for d in range(wanted.ndim)]).expand(wanted.shape).clone()


def _grown_boxes(wanted: Tensor) -> Iterator[Tensor]:
    """Yield masks of boxes from the first entry of `wanted` on, grown along the first dimension first, or the last."""
    first = wanted.nonzero()[0].tolist()
    for order in (range(wanted.ndim), range(wanted.ndim - 1, -1, -1)):
        box = [slice(place, place + 1) for place in first]
        for dimension in order:
            box[dimension] = slice(first[dimension], wanted.shape[dimension])
            held = ~_any_along(~wanted[tuple(box)], dimension)
            box[dimension] = slice(first[dimension], first[dimension] + int(held.int().cumprod(0).sum()))
        mask = torch.zeros_like(wanted)
        mask[tuple(box)] = True
        yield mask
