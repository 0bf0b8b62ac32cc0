"""All Hypothesis strategies of the tests, from a target's letters to whole rules."""

from __future__ import annotations

from math import prod
from typing import Any, Final, NamedTuple

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor

from freezehooks import Region, Rule, center, entries, keep, random
from freezehooks._rules.patterns import pattern_named
from freezehooks._rules.patterns.pattern import Pattern
from freezehooks._rules.region import And, Index, IndexItem, Not, Or, Slice, Union
from freezehooks._rules.rule import TARGET
from freezehooks._rules.ties import Mirrored, Symmetric, Tie, Tied

LARGEST: Final = 10**30
"""The largest integers in an index: far beyond the last position of any tensor."""

# --------------------------------------------------------------------------------------------------------------------
# Rules

_names = st.text("abcw_019*?", min_size=1, max_size=6)
_any_target = st.text(min_size=1, max_size=8).filter(lambda text: bool(TARGET.fullmatch(text)))


def targets() -> SearchStrategy[str]:
    """Names as models have them, with wildcards; and any other text that a target may be."""
    return st.lists(_names, min_size=1, max_size=4).map(".".join) | _any_target


_small = st.integers(-5, 5)
_integers = _small | st.integers(-LARGEST, LARGEST)
_steps = _integers.filter(lambda step: step != 0)
_slices = st.builds(Slice, st.none() | _integers, st.none() | _integers, st.none() | _steps)
_lists = st.lists(_integers, max_size=4).map(tuple)
_unions = st.lists(_integers | _slices, min_size=2, max_size=3).map(lambda parts: Union(tuple(parts)))


@st.composite
def indices(draw: DrawFn) -> Index:
    """Any index that has a text form, for no particular tensor; a single union is a union of regions, not an index."""
    items: list[IndexItem] = draw(st.lists(_integers | _slices | _lists | _unions, max_size=4))
    if not items or (len(items) == 1 and isinstance(items[0], Union)) or draw(st.booleans()):
        items.insert(draw(st.integers(0, len(items))), ...)
    return Index(tuple(items))


@st.composite
def patterns(draw: DrawFn) -> Pattern:
    """Every pattern, with arguments it takes."""
    arguments: tuple[Any, ...]
    name = draw(st.sampled_from(list(Pattern.known)))
    match name:
        case "cross":
            arguments = draw(st.sampled_from([(), (2,), (3,), (LARGEST,)]))
        case "diagonal" | "triu" | "tril":
            arguments = draw(st.just(()) | st.tuples(_integers))
        case "band":
            arguments = draw(st.tuples(st.integers(0, LARGEST), st.integers(0, 3)))
        case "block_diagonal":
            arguments = (draw(st.integers(1, LARGEST)),)
        case "each":
            arguments = (draw(st.integers(1, 5)), draw(combinations(indices() | st.just(center), max_leaves=3)))
        case "random":
            fraction = draw(st.just(1) | st.floats(0, 1, exclude_min=True))
            return random(fraction, seed=draw(_integers))
        case "smallest" | "largest":
            arguments = (draw(st.just(1) | st.floats(0, 1, exclude_min=True)),)
        case "nm":
            n = draw(st.integers(1, 8) | st.integers(1, LARGEST - 1))
            arguments = (n, draw(st.integers(n + 1, n + 8).filter(lambda m: m <= LARGEST)))
        case _:
            arguments = ()
    return pattern_named(name, arguments)


def combinations(leaves: SearchStrategy[Region], max_leaves: int = 8) -> SearchStrategy[Region]:
    """Regions built from `leaves` with the three operators."""
    return st.recursive(
        leaves,
        lambda part: st.builds(Not, part) | st.builds(And, part, part) | st.builds(Or, part, part),
        max_leaves=max_leaves,
    )


def regions() -> SearchStrategy[Region]:
    """Any region that has a text form."""
    return combinations(indices() | patterns())


_floats = st.floats(allow_nan=False, allow_infinity=False)


def values() -> SearchStrategy[Any]:
    """Any value of a region that has a text form; both zeros and the extremes of a float are drawn often."""
    ends = st.sampled_from([0.0, -0.0, 1.0, 5e-324, 1.7976931348623157e308])
    numbers = ends | _floats | st.integers(-(2**63), 2**63) | st.builds(complex, ends | _floats, ends | _floats)
    lists = st.integers(1, 3).flatmap(
        lambda size: st.recursive(
            st.lists(numbers, min_size=size, max_size=size),
            lambda inner: inner.flatmap(lambda one: st.integers(1, 2).map(lambda count: [one] * count)),
            max_leaves=3,
        )
    )
    return st.just(keep) | numbers | lists


def ties() -> SearchStrategy[Tie]:
    """Any tie that has a text form."""
    starts = st.sampled_from([None, "first", "mean"])
    return (
        st.builds(Tied, _integers, groups=st.integers(1, LARGEST), start=starts)
        | st.builds(Mirrored, _integers, start=starts)
        | st.builds(Symmetric, start=starts)
    )


def rules() -> SearchStrategy[Rule]:
    """Any rule that has a text form."""
    return st.builds(Rule, targets(), regions(), values()) | st.builds(Rule, targets(), value=ties())


_FRAGMENTS: Final = (
    *(
        "w",
        "conv.weight",
        "a.*.b?",
        "center",
        "cross",
        "smallest",
        "nm",
        "each",
        "random",
        "keep",
        "tied",
        "symmetric",
        "2j",
        "inf",
        "nan",
        "import os",
    ),
    *("[", "]", "(", ")", "=", ":", ",", "...", "..", ".", "~", "|", "&", "-", "+", " ", "\t", "\n", "#", "'", '"'),
    *("0", "1", "-3", "0.5", "1e3", "1e999", "1.", ".5e-2", "007", "9" * 19, "\u0663", "\u00b2", "\x00", "\ud800"),
)


def rule_like_texts() -> SearchStrategy[str]:
    """Text made of fragments of rules in any order: most of it nonsense, some of it almost right."""
    head = st.sampled_from(["", "w[", "w[0,", "w = ", "w[center] = ", "w[~(", " "])
    return st.builds(str.__add__, head, st.lists(st.sampled_from(_FRAGMENTS), max_size=12).map("".join))


# --------------------------------------------------------------------------------------------------------------------
# Indices and shapes


class Indexed(NamedTuple):
    """An index in Python's notation, and the shape of a tensor that it may or may not fit."""

    key: tuple[Any, ...]
    shape: tuple[int, ...]

    @property
    def region(self) -> Index:
        return _index(self.key)


def shapes(min_dims: int = 0, max_dims: int = 4, min_size: int = 1) -> SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(min_size, 4), min_size=min_dims, max_size=max_dims).map(tuple)


_ends = st.sampled_from([None, None, None]) | st.integers(-6, 6)
_near_slices = st.builds(slice, _ends, _ends, st.sampled_from([None, 1, 2, 5, -1, -1, -2, -3, -5]))


def _positions(size: int) -> SearchStrategy[int]:
    """A position within a dimension, sometimes just outside."""
    inside = st.integers(-size, size - 1) if size else st.just(0)
    return st.integers(0, 19).flatmap(lambda n: st.sampled_from([size, -size - 1]) if n == 13 else inside)


@st.composite
def indices_and_shapes(draw: DrawFn) -> Indexed:
    """An index and a shape, which fit more often than not: else a position or a dimension is one too far."""
    shape = draw(shapes(min_size=draw(st.sampled_from([1, 1, 1, 0]))))
    with_ellipsis = draw(st.booleans())
    spoken = min(len(shape), draw(st.sampled_from([4, 4, 3, 2, 1, 0 if with_ellipsis else 1])))
    split = draw(st.integers(0, spoken))
    sizes = [*shape[:split], *shape[len(shape) - spoken + split :]] if with_ellipsis else list(shape[:spoken])
    sizes += [1] * (draw(st.integers(0, 19)) == 13)
    length = draw(st.sampled_from([2, 3, 1, 0]))
    key: list[Any] = [draw(_items(size, length)) for size in sizes]
    if with_ellipsis or not key:
        key.insert(split, ...)
    return Indexed(tuple(key), shape)


@st.composite
def _items(draw: DrawFn, size: int, length: int) -> Any:
    """An integer, a slice or a list; the lists of one index have one length, or 1, or now and then another."""
    kind = draw(st.sampled_from(["integer", "integer", "slice", "slice", "slice", "slice", "list", "list"]))
    if kind == "slice":
        return draw(_near_slices)
    if kind == "integer":
        return draw(_positions(size))
    count = draw(st.sampled_from([length, length, length, length, 1, 2]))
    return [draw(_positions(size)) for _ in range(count)]


def near_indices(shape: tuple[int, ...]) -> SearchStrategy[Index]:
    """Indices of a tensor of the given shape, now and then a position too far."""
    keys = st.integers(1, 2).flatmap(lambda length: st.tuples(*(_items(size, length) for size in shape)))
    return keys.map(_index)


def _index(key: tuple[Any, ...]) -> Index:
    index = entries[key]
    assert isinstance(index, Index)
    return index


def boxes(shape: tuple[int, ...]) -> SearchStrategy[tuple[slice, ...]]:
    """Slices that run forward, one a dimension, that select something of a tensor of the given shape."""
    return st.tuples(*(_spans(size) for size in shape))


@st.composite
def _spans(draw: DrawFn, size: int) -> slice:
    start = draw(st.integers(0, size - 1))
    return slice(start, draw(st.integers(start + 1, size)), draw(st.integers(1, size)))


@st.composite
def masks(draw: DrawFn, shape: tuple[int, ...]) -> Tensor:
    """A bool tensor of the given shape with at least one True."""
    flat = draw(st.lists(st.booleans(), min_size=prod(shape), max_size=prod(shape)).filter(any))
    return torch.tensor(flat).view(shape)


@st.composite
def weights(draw: DrawFn, shape: tuple[int, ...]) -> Tensor:
    """A float32 tensor of the given shape, of few different magnitudes, so that ties are common; -0.0 is one."""
    numbers = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 2.0, -3.0])
    return torch.tensor(draw(st.lists(numbers, min_size=prod(shape), max_size=prod(shape)))).view(shape)
