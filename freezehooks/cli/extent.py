"""How many entries of a tensor of some shape a rule freezes, and which, as far as the shape alone can say."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Final

import torch
from torch import Tensor

from .._entries.select import select
from .._errors import RegionError
from .._rules.patterns.matrices import MatrixPattern
from .._rules.patterns.pattern import Pattern
from .._rules.region import WHOLE, And, Not, Or, Region
from .words import chosen_by_numbers, has_pattern, leaves

_MOST: Final = 2**31
_MOST_TRIANGULAR: Final = 2**28
"""Of the entries of a tensor: a bool takes a byte for each, and a triangle a number of eight bytes."""


@dataclass(frozen=True, slots=True)
class Extent:
    """What a region takes of a tensor of a given shape.

    Attributes:
        surely: True where an entry is taken, whatever the numbers are.
        possibly: True where it is taken for some numbers; the same tensor where numbers have no say.
        least, most: How many entries are taken, at least and at most.
    """

    surely: Tensor
    possibly: Tensor
    least: int
    most: int


def extent(region: Region, shape: tuple[int, ...]) -> Extent:
    """Return what a region takes of any tensor of the given shape.

    Raises:
        RegionError: It does not fit the shape, or takes nothing of it; or the shape is too large to say.
    """
    _check_size(region, shape)
    tensor = torch.zeros(()).expand(shape)  # no number is looked at, so none needs memory
    if not chosen_by_numbers(region):
        frozen = select(region, tensor)
        return Extent(frozen, frozen, _count(frozen), _count(frozen))
    _check_patterns(region, shape)
    possibly = select(_bound(region, True), tensor)
    surely = _or_nothing(_bound(region, False), tensor)
    count = _known_count(region, prod(shape))
    if count is None:
        return Extent(surely, possibly, _count(surely), _count(possibly))
    if not count:
        raise RegionError("the region selects no entry", "correct it, or leave the rule out")
    return Extent(surely, possibly, count, count)


def _check_size(region: Region, shape: tuple[int, ...]) -> None:
    limit = _MOST_TRIANGULAR if has_pattern(region, MatrixPattern) else _MOST
    if prod(shape) > limit:
        raise RegionError(
            f"`--shape` of {prod(shape):,} entries is too large to count here, which takes {limit:,}",
            "give a smaller shape of the same kind, or leave it out for words alone",
        )


def _check_patterns(region: Region, shape: tuple[int, ...]) -> None:
    """Raise where a pattern does not fit, also one whose numbers are not there to be looked at."""
    for leaf in leaves(region):
        if isinstance(leaf, Pattern):
            leaf.check(shape)


def _bound(region: Any, most: bool) -> Region:
    """Return the region with all, or nothing, in place of what numbers choose: the most it takes, or the least."""
    if isinstance(region, And | Or):
        return type(region)(_bound(region.left, most), _bound(region.right, most))
    if isinstance(region, Not):
        return Not(_bound(region.operand, not most))
    if chosen_by_numbers(region):
        return WHOLE if most else Not(WHOLE)
    fixed: Region = region
    return fixed


def _or_nothing(region: Region, tensor: Tensor) -> Tensor:
    try:
        return select(region, tensor)
    except RegionError:  # all of its parts have been selected from before: what is left to refuse is that none remains
        return torch.zeros(tensor.shape, dtype=torch.bool)


def _count(frozen: Tensor) -> int:
    return int(frozen.count_nonzero())  # `sum` would make integers of all of them first


def _known_count(region: Any, entries: int) -> int | None:
    """Return how many entries a pattern takes that counts them beforehand, or its outside; None for other regions."""
    if isinstance(region, Not):
        inside = _known_count(region.operand, entries)
        return None if inside is None else entries - inside
    return region.count(entries) if isinstance(region, Pattern) else None
