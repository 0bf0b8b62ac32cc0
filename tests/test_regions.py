"""A region selects what its definition says: indices as in numpy, patterns as loops over coordinates, sets as sets."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import freezehooks
from freezehooks import (
    Region,
    RegionError,
    Rule,
    SpecError,
    band,
    block_diagonal,
    border,
    center,
    cross,
    diagonal,
    each,
    entries,
    largest,
    nm,
    parse_region,
    random,
    smallest,
    tril,
    triu,
    zeros,
)
from freezehooks._entries.select import positions, select
from freezehooks._rules.patterns import pattern_named
from freezehooks._rules.patterns.pattern import Integer, Pattern, Selector
from freezehooks._rules.region import And, Index, Not, Or
from freezehooks.cli.explain import in_words

from .strategies import Indexed, combinations, indices_and_shapes, masks, shapes, weights

many = settings(max_examples=200, deadline=None)

# --------------------------------------------------------------------------------------------------------------------
# Indices


@given(indices_and_shapes())
@settings(max_examples=500, deadline=None)
def test_an_index_selects_what_it_selects_in_numpy(indexed: Indexed) -> None:
    frozen = np.zeros(indexed.shape, dtype=bool)
    tensor = torch.zeros(indexed.shape)
    try:
        frozen[indexed.key] = True
    except (IndexError, DeprecationWarning):  # numpy 1 warns of a list out of range where nothing is selected
        with pytest.raises(RegionError, match=r"out of range|an index of|need one length"):
            select(indexed.region, tensor)
        return
    if not frozen.any():  # lists that are cut down to nothing are not looked at by numpy, but are here
        with pytest.raises(RegionError, match=r"the region selects no entry|out of range"):
            select(indexed.region, tensor)
        return
    assert np.array_equal(select(indexed.region, tensor).cpu().numpy(), frozen)


def _has_lists(indexed: Indexed) -> bool:
    return any(isinstance(item, list) for item in indexed.key)


@st.composite
def _with_unions(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[list[int | slice], ...]]:
    shape = draw(shapes(min_dims=1, max_dims=3))
    spans = st.builds(slice, st.integers(-4, 4), st.integers(-4, 4), st.sampled_from([None, 1, 2, -1]))
    unions = [draw(st.lists(st.integers(-size, size - 1) | spans, min_size=1, max_size=3)) for size in shape]
    return shape, tuple([*union, slice(0, 0)] for union in unions)


@given(_with_unions())
@many
def test_a_union_selects_its_positions_in_every_combination(
    case: tuple[tuple[int, ...], tuple[list[int | slice], ...]],
) -> None:
    shape, unions = case
    along = [
        list(dict.fromkeys(p for part in union for p in np.atleast_1d(np.arange(size)[part]).tolist()))
        for union, size in zip(unions, shape, strict=True)
    ]
    numbers = np.arange(np.prod(shape)).reshape(shape)[np.ix_(*along)]
    index = Index(tuple(entries[..., union].items[1] for union in unions))  # type: ignore[attr-defined]
    assert np.array_equal(positions(index, torch.Size(shape)).numpy(), numbers)
    if numbers.size:
        assert np.array_equal(
            select(index, torch.zeros(shape)).cpu().numpy().nonzero(), np.unravel_index(np.sort(numbers.ravel()), shape)
        )


@given(indices_and_shapes().filter(lambda indexed: not _has_lists(indexed)))
@many
def test_positions_have_the_shape_and_order_of_numpy_s_slices(indexed: Indexed) -> None:
    flat = np.arange(prod(indexed.shape)).reshape(indexed.shape)
    try:
        expected = np.asarray(flat[indexed.key])
    except IndexError:
        with pytest.raises(RegionError):
            positions(indexed.region, torch.Size(indexed.shape))
        return
    found = positions(indexed.region, torch.Size(indexed.shape)).numpy()
    assert found.shape == expected.shape
    assert np.array_equal(found, expected)


@given(indices_and_shapes().filter(_has_lists))
@many
def test_positions_have_the_shape_and_order_of_torch_s_lists(indexed: Indexed) -> None:
    """For an index with lists and integers, torch and numpy order the dimensions differently; torch's counts."""
    shape = torch.Size(indexed.shape)
    backward = any(isinstance(item, slice) and (item.step or 1) < 0 for item in indexed.key)
    try:
        select(indexed.region, torch.zeros(shape))
    except RegionError:
        return
    found = positions(indexed.region, shape)
    if backward:  # which torch cannot say
        expected = torch.from_numpy(np.arange(prod(shape)).reshape(shape)[indexed.key])
        assert sorted(found.flatten().tolist()) == sorted(expected.flatten().tolist())
        return
    expected = torch.arange(prod(shape), device=found.device).view(shape)[indexed.key]
    assert found.shape == expected.shape
    assert found.equal(expected)


# --------------------------------------------------------------------------------------------------------------------
# Patterns

Coordinates = tuple[int, ...]


def _where(shape: tuple[int, ...], holds: Callable[[Coordinates], bool]) -> Tensor:
    """Evaluate at every coordinate whether the entry there is frozen."""
    return torch.tensor([holds(place) for place in _places(shape)], dtype=torch.bool).view(shape)


def _places(shape: tuple[int, ...]) -> Iterator[Coordinates]:
    return product(*map(range, shape))


def _off_middle(place: Coordinates, shape: tuple[int, ...], dims: int) -> int:
    return sum(2 * at + 1 != size for at, size in zip(place[-dims:], shape[-dims:], strict=True))


_odd = st.sampled_from([1, 3, 5])
_channels = st.tuples(st.integers(1, 2), st.integers(1, 2))


def _kernels(min_dims: int = 1, sizes: st.SearchStrategy[int] = _odd) -> st.SearchStrategy[tuple[int, ...]]:
    kernel = st.lists(sizes, min_size=min_dims, max_size=3).map(tuple)
    return st.builds(lambda channels, size: (*channels, *size), _channels, kernel)


@given(_kernels())
@many
def test_center_is_the_middle_of_every_kernel(shape: tuple[int, ...]) -> None:
    expected = _where(shape, lambda place: _off_middle(place, shape, len(shape) - 2) == 0)
    assert select(center, torch.zeros(shape)).equal(expected)


@given(_kernels(min_dims=2), st.sampled_from([2, 3]))
@many
def test_cross_is_what_lies_off_the_middle_in_one_dimension_at_most(shape: tuple[int, ...], dims: int) -> None:
    dims = min(dims, len(shape) - 2)
    expected = _where(shape, lambda place: _off_middle(place, shape, dims) <= 1)
    assert select(cross(dims), torch.zeros(shape)).equal(expected)


def test_cross_speaks_of_the_last_two_dimensions_whatever_the_others_are() -> None:
    shape = (1, 1, 4, 3, 3)
    plus = torch.tensor([[0, 1, 0], [1, 1, 1], [0, 1, 0]], dtype=torch.bool)
    assert select(cross, torch.zeros(shape)).equal(plus.expand(shape))


@given(_kernels(sizes=st.integers(1, 5)))
@many
def test_border_is_what_touches_an_end_of_some_spatial_dimension(shape: tuple[int, ...]) -> None:
    expected = _where(
        shape, lambda place: any(at in (0, size - 1) for at, size in zip(place[2:], shape[2:], strict=True))
    )
    assert select(border, torch.zeros(shape)).equal(expected)


@pytest.mark.parametrize(
    ("pattern", "reference"),
    [
        (diagonal, lambda shape, k: np.broadcast_to(np.eye(shape[-2], shape[-1], k, dtype=bool), shape)),
        (triu, lambda shape, k: np.triu(np.ones(shape, dtype=bool), k)),
        (tril, lambda shape, k: np.tril(np.ones(shape, dtype=bool), k)),
    ],
    ids=["diagonal", "triu", "tril"],
)
@given(shape=shapes(min_dims=2, min_size=1), k=st.integers(-5, 5))
@many
def test_matrix_patterns_mean_what_they_mean_in_numpy(
    pattern: Callable[[int], Pattern], reference: Callable[..., Any], shape: tuple[int, ...], k: int
) -> None:
    expected = reference(shape, k)
    if not expected.any():
        with pytest.raises(RegionError, match="the region selects no entry"):
            select(pattern(k), torch.zeros(shape))
        return
    assert np.array_equal(select(pattern(k), torch.zeros(shape)).cpu().numpy(), expected)


_some_shape = shapes(min_size=1, max_dims=3)


@given(_some_shape.flatmap(weights))
@many
def test_zeros_is_what_equals_zero_of_either_sign(weight: Tensor) -> None:
    expected = _where(tuple(weight.shape), lambda place: weight[place].item() == 0)
    if not expected.any():
        with pytest.raises(RegionError, match="the region selects no entry"):
            select(zeros, weight)
        return
    assert select(zeros, weight).equal(expected)


@given(_some_shape.flatmap(weights), st.floats(0.01, 1) | st.just(1))
@many
def test_smallest_is_the_first_of_the_entries_sorted_by_magnitude(weight: Tensor, fraction: float) -> None:
    order = sorted(_places(tuple(weight.shape)), key=lambda place: (abs(weight[place].item()), place))
    count = round(fraction * len(order))
    if not count:
        with pytest.raises(RegionError, match="the region selects no entry"):
            select(smallest(fraction), weight)
        return
    chosen = set(order[:count])
    assert select(smallest(fraction), weight).equal(_where(tuple(weight.shape), chosen.__contains__))


@st.composite
def _grouped(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """A weight whose dimension 1 is a multiple of m, and n and m."""
    m = draw(st.integers(2, 4))
    rest = draw(st.lists(st.integers(1, 2), max_size=2))
    shape = (draw(st.integers(1, 2)), m * draw(st.integers(1, 2)), *rest)
    return draw(weights(shape)), draw(st.integers(1, m - 1)), m


@given(_grouped())
@many
def test_nm_frees_the_n_largest_of_every_m_along_dimension_1(grouped: tuple[Tensor, int, int]) -> None:
    weight, n, m = grouped

    def frozen(place: Coordinates) -> bool:
        first = place[1] - place[1] % m
        group = [(place[0], column, *place[2:]) for column in range(first, first + m)]
        group.sort(key=lambda other: (abs(weight[other].item()), other))
        return place in group[: m - n]

    assert select(nm(n, m), weight).equal(_where(tuple(weight.shape), frozen))


@given(shapes(2, 4), st.integers(0, 5), st.integers(0, 5))
@many
def test_band_is_what_lies_neither_too_far_below_nor_above(shape: tuple[int, ...], lower: int, upper: int) -> None:
    ones = np.ones(shape, dtype=bool)
    expected = np.triu(ones, -lower) & np.tril(ones, upper)
    assert np.array_equal(select(band(lower, upper), torch.zeros(shape)).cpu().numpy(), expected)


@given(st.integers(1, 4), shapes(2, 4))
@many
def test_block_diagonal_is_the_product_of_kronecker(n: int, block: tuple[int, ...]) -> None:
    expected = np.kron(np.eye(n), np.ones(block)) == 1
    assert np.array_equal(select(block_diagonal(n), torch.zeros(expected.shape)).cpu().numpy(), expected)


@given(shapes(1, 3).flatmap(weights), st.floats(0.2, 1))
@many
def test_largest_is_the_first_of_the_entries_sorted_by_falling_magnitude(weight: Tensor, fraction: float) -> None:
    order = np.argsort(-weight.abs().flatten().cpu().numpy(), kind="stable")
    expected = np.zeros(weight.numel(), dtype=bool)
    expected[order[: round(fraction * weight.numel())]] = True
    assume(expected.any())
    assert np.array_equal(select(largest(fraction), weight).flatten().cpu().numpy(), expected)


def order_of_draws(count: int, seed: int) -> Any:
    """Return the positions of a tensor's entries in the order in which `random` chooses them.

    References:
        Mueller, https://stackoverflow.com/a/12996028
    """

    def mixed(number: Any) -> Any:
        for _ in range(2):
            number = ((number >> 16) ^ number) * np.uint32(0x45D9F3B)
        return (number >> 16) ^ number

    low, high = (np.array([half & 0xFFFFFFFF], dtype=np.uint32) for half in (seed, seed >> 32))
    return np.argsort(mixed(np.arange(count, dtype=np.uint32) ^ mixed(mixed(low) ^ high)), kind="stable")


@given(shapes(0, 4), st.integers(-(2**70), 2**70), st.floats(0, 1))
@many
def test_random_is_the_first_of_the_entries_sorted_by_their_draws(
    shape: tuple[int, ...], seed: int, fraction: float
) -> None:
    expected = np.zeros(prod(shape), dtype=bool)
    expected[order_of_draws(expected.size, seed)[: round(fraction * expected.size)]] = True
    assume(expected.any())
    assert np.array_equal(
        select(random(fraction, seed=seed), torch.zeros(shape)).cpu().numpy(), expected.reshape(shape)
    )


def test_random_is_the_same_on_every_machine() -> None:
    found = select(random(0.5, seed=3), torch.zeros(4, 6))
    assert found.int().tolist() == [
        [1, 0, 0, 1, 0, 1],
        [0, 1, 0, 1, 0, 0],
        [1, 1, 1, 0, 1, 0],
        [1, 1, 0, 0, 1, 0],
    ]


@given(shapes(0, 4), st.integers(-(2**70), 2**70), st.floats(0, 1))
@many
def test_random_is_so_many_entries_whatever_they_hold(shape: tuple[int, ...], seed: int, fraction: float) -> None:
    count = round(fraction * torch.Size(shape).numel())
    assume(count)
    found = select(random(fraction, seed=seed), torch.zeros(shape))
    assert int(found.sum()) == count
    assert found.equal(select(random(fraction, seed=seed), torch.full(shape, torch.nan)))


def test_random_seeds_choose_alike_no_more_than_by_chance() -> None:
    masks = [select(random(0.5, seed=seed), torch.zeros(300, 300)) for seed in (0, 1, 2, 2**32, -1)]
    for n, first in enumerate(masks):
        assert abs(first.float().mean(0) - 0.5).max() < 0.15
        for second in masks[:n]:
            assert abs((first == second).float().mean() - 0.5) < 0.01


@given(st.integers(1, 3), shapes(2, 3), st.sampled_from([diagonal, ~triu(1), entries[0] | entries[:, -1]]))
@many
def test_each_is_the_region_within_every_chunk(k: int, shape: tuple[int, ...], region: Region) -> None:
    chunk = torch.zeros(shape)
    assume(bool((expected := select(region | entries[0], chunk)).any()))
    found = select(each(k, region | entries[0]), torch.zeros(k * shape[0], *shape[1:]))
    assert found.equal(torch.cat([expected] * k))


def test_each_chooses_by_the_numbers_of_each_chunk() -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0], [8.0, 7.0], [6.0, 5.0]])
    assert select(each(2, smallest(0.25)), weight).nonzero().tolist() == [[0, 0], [3, 1]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("pattern", [center, zeros, smallest(0.3), nm(1, 2), triu(1)], ids=str)
def test_patterns_select_the_same_in_every_dtype(pattern: Pattern, dtype: torch.dtype) -> None:
    weight = torch.tensor([0.0, -2.0, 1.0, -0.5, 3.0, -0.0] * 9).view(3, 2, 3, 3)
    assert select(pattern, weight.to(dtype)).equal(select(pattern, weight))


@pytest.mark.parametrize("pattern", [center, cross, border, zeros, smallest(0.3), nm(1, 2), triu(1)], ids=str)
def test_patterns_select_the_same_in_every_memory_layout(pattern: Pattern) -> None:
    weight = torch.tensor([0.0, -2.0, 1.0, -0.5, 3.0, -0.0] * 9).view(3, 2, 3, 3)
    for other in (weight.to(memory_format=torch.channels_last), weight.permute(3, 2, 1, 0).clone().permute(3, 2, 1, 0)):
        assert select(pattern, other).equal(select(pattern, weight))


_WEIGHTS = [torch.tensor(numbers * 9).view(2, 2, 3, 3) for numbers in ([0.0, 1.0, 2.0, 3.0], [3.0, 0.0, 1.0, 0.0])]
_EVERY = [
    *(center, cross, border, diagonal, triu, tril, band(0, 1), block_diagonal(3)),
    *(zeros, smallest(0.3), largest(0.3), nm(1, 2), random(0.3, seed=1), each(2, border)),
]


@pytest.mark.parametrize("pattern", _EVERY, ids=str)
def test_a_pattern_says_whether_numbers_decide_what_it_selects(pattern: Pattern) -> None:
    first, second = (select(pattern, weight) for weight in _WEIGHTS)
    assert first.equal(second) != pattern.depends_on_numbers


@pytest.mark.parametrize("pattern", _EVERY, ids=str)
def test_a_pattern_that_counts_beforehand_selects_so_many(pattern: Pattern) -> None:
    count = pattern.count(36)
    assert count is None or int(select(pattern, _WEIGHTS[0]).sum()) == count


@pytest.mark.parametrize("pattern", _EVERY, ids=str)
def test_a_pattern_says_its_inside_and_its_outside_in_words(pattern: Pattern) -> None:
    assert pattern.in_words() != pattern.in_words(outside=True)
    assert pattern.in_words() in in_words(Rule("w", pattern))


def test_the_patterns_are_those_tested_here_and_have_public_names() -> None:
    assert [pattern.name for pattern in _EVERY] == list(Pattern.known)
    assert set(Pattern.known) <= set(freezehooks.__all__)


def test_one_class_adds_a_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pattern, "known", dict(Pattern.known))

    @dataclass(frozen=True, slots=True)
    class Column(Pattern):
        name = "column"
        at: Integer = 0

        def select(self, parameter: Tensor, selector: Selector) -> Tensor:
            (along,) = selector.coordinates(parameter, 1)
            found: Tensor = along == self.at
            return found

        def in_words(self, outside: bool = False) -> str:
            return f"{'outside' if outside else 'in'} column {self.at}"

    assert parse_region("column(1)") == Column(1)
    assert str(~Column(1)) == "~column(1)"
    assert select(parse_region("column"), torch.zeros(2, 3)).tolist() == [[True, False, False]] * 2
    assert "in column 0 is held at 1" in in_words(Rule("w", Column(), 1))
    with pytest.raises(RegionError, match=r"^`at` of `column` must be an integer, found 0\.5; write `column\(at=0\)`"):
        Column(0.5)  # type: ignore[arg-type]  # what is tested


# --------------------------------------------------------------------------------------------------------------------
# Masks and functions


@given(_some_shape.flatmap(masks))
@many
def test_a_mask_selects_where_it_is_true(mask: Tensor) -> None:
    weight = torch.zeros(mask.shape)
    assert select(mask, weight).equal(mask)
    assert select(lambda parameter: mask, weight).equal(mask)


@given(
    shapes(1, 4).flatmap(
        lambda shape: st.tuples(st.just(shape), st.integers(1, len(shape)).flatmap(lambda n: masks(shape[:n])))
    )
)
@many
def test_a_mask_of_the_first_dimensions_selects_as_torch_indexes_by_it(case: tuple[tuple[int, ...], Tensor]) -> None:
    shape, mask = case
    assume(mask.shape != shape[-mask.ndim :] or mask.ndim == len(shape))
    expected = torch.zeros(shape, dtype=torch.bool)
    expected[mask] = True
    assert select(mask, torch.zeros(shape)).equal(expected)
    assert select(mask.cpu().numpy(), torch.zeros(shape)).equal(expected)


@given(
    shapes(1, 4).flatmap(
        lambda shape: st.tuples(
            st.just(shape), st.tuples(*(st.sampled_from([1, size]) for size in shape)).flatmap(masks)
        )
    )
)
@many
def test_a_mask_of_as_many_dimensions_selects_as_numpy_broadcasts_it(case: tuple[tuple[int, ...], Tensor]) -> None:
    shape, mask = case
    expected = np.broadcast_to(mask.cpu().numpy(), shape)
    assert np.array_equal(select(mask, torch.zeros(shape)).cpu().numpy(), expected)
    assert np.array_equal(select(mask.cpu().numpy(), torch.zeros(shape)).cpu().numpy(), expected)


def test_a_mask_of_as_many_dimensions_broadcasts() -> None:
    mask = torch.tensor([[True], [False]])
    assert select(mask, torch.zeros(2, 3)).tolist() == [[True] * 3, [False] * 3]
    assert select(torch.ones(2).bool(), torch.zeros(2, 2)).all()  # rows or columns: the same


def test_a_mask_is_copied_so_that_later_writes_to_it_change_nothing() -> None:
    mask = torch.ones(3, dtype=torch.bool)
    selected = [select(mask, torch.zeros(3)), select(lambda parameter: mask, torch.zeros(3))]
    mask[0] = False
    assert all(bool(frozen.all()) for frozen in selected)


def test_a_function_is_given_the_parameter_s_numbers() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    assert select(lambda parameter: parameter < 0, weight).tolist() == [False, True, False]


# --------------------------------------------------------------------------------------------------------------------
# Operators

_WEIGHT = torch.tensor([0.0, -2.0, 1.0, -0.5, 3.0, -0.0, 0.25, 4.0] * 9).view(2, 4, 3, 3)
_SHAPE = (2, 4, 3, 3)
_ALL = frozenset(_places(_SHAPE))


def _set_of(region: Region) -> frozenset[Coordinates]:
    """The coordinates of a region by the algebra of sets, from leaves whose meaning is tested above."""
    match region:
        case Not(operand=operand):
            return _ALL - _set_of(operand)
        case And(left=left, right=right):
            return _set_of(left) & _set_of(right)
        case Or(left=left, right=right):
            return _set_of(left) | _set_of(right)
    return frozenset(tuple(place) for place in select(region, _WEIGHT).nonzero().tolist())


_leaves = st.sampled_from(
    [
        *(center, cross, border, diagonal(0), triu(1), tril(-1), zeros, smallest(0.5), nm(2, 4)),
        *(entries[0], entries[:, 1:3], entries[..., -1], entries[:, [0, 2]], entries[1, ..., ::-2], entries[...]),
    ]
)


@given(combinations(_leaves))
@many
def test_operators_on_regions_are_the_algebra_of_sets(region: Region) -> None:
    expected = _set_of(region)
    if not expected:
        with pytest.raises(RegionError, match="the region selects no entry"):
            select(region, _WEIGHT)
        return
    assert select(region, _WEIGHT).equal(_where(_SHAPE, expected.__contains__))


@given(combinations(_leaves, 3), combinations(_leaves, 3))
@many
def test_python_s_operators_build_the_regions_that_text_builds(first: Region, second: Region) -> None:
    assert ~first == Not(first)
    assert first & second == And(first, second)
    assert first | second == Or(first, second)
    assert hash(first & second) == hash(And(first, second))


@pytest.mark.parametrize("other", [0, "center", ..., torch.ones(1, dtype=torch.bool)], ids=repr)
def test_a_region_combines_with_regions_alone(other: Any) -> None:
    for combine in (lambda: center | other, lambda: center & other, lambda: other | center, lambda: other & center):
        with pytest.raises(TypeError):
            combine()


def test_an_empty_part_of_a_region_is_no_error_where_the_whole_selects_something() -> None:
    assert select(entries[2:2] | entries[0], torch.zeros(3)).tolist() == [True, False, False]
    assert select(~entries[[]], torch.zeros(3)).all()


# --------------------------------------------------------------------------------------------------------------------
# Errors

_CONVOLUTION = "needs a convolution weight (out, in/groups, *kernel), found 2 dimensions; name only the convolutions"
_TRUE = torch.ones(3, 4, dtype=torch.bool)

_MISFITS: list[tuple[str, Any, tuple[int, ...], str]] = [
    ("integer", entries[12], (8, 3), "index 12 is out of range for dimension 0 of size 8; use 0 to 7"),
    ("negative integer", entries[:, -4], (8, 3), "index -4 is out of range for dimension 1 of size 3; use 0 to 2"),
    ("integer after ...", entries[..., 3], (8, 3), "index 3 is out of range for dimension 1 of size 3; use 0 to 2"),
    ("in a list", entries[[0, 9]], (8, 3), "index 9 is out of range for dimension 0 of size 8; use 0 to 7"),
    ("huge integer", entries[10**30], (8,), f"index {10**30} is out of range for dimension 0 of size 8; use 0 to 7"),
    ("empty dimension", entries[0], (0, 3), "index 0 is out of range for dimension 0 of size 0; the dimension is"),
    ("too many", entries[0, 0, 0], (8, 3), "an index of 3 dimensions on a tensor of 2"),
    ("too many with ...", entries[0, ..., 0], (8,), "an index of 2 dimensions on a tensor of 1"),
    ("on a number", entries[0], (), "an index of 1 dimension on a tensor of 0"),
    ("lists", entries[[0, 1], [0, 1, 2]], (8, 3),
     "lists in one index are read side by side and need one length, found [2, 3]; "
     "join two rules with `&` to take every combination"),
    ("inside an operator", ~(center | entries[12]), (8, 3, 3), "index 12 is out of range for dimension 0 of size 8"),
    ("empty slice", entries[3:3], (8,), "the region selects no entry; correct it, or leave the rule out"),
    ("empty list", entries[[]], (8,), "the region selects no entry; correct it, or leave the rule out"),
    ("empty tensor", entries[...], (0,), "the region selects no entry"),
    ("empty mask", ~_TRUE, (3, 4), "the region selects no entry"),
    *((f"{region} of a tensor without entries", region, (0, 4), "the region selects no entry")
      for region in (random(0.5, seed=1), smallest(0.5), largest(1.0), zeros, diagonal, nm(2, 4), band(1, 1))),
    ("empty intersection", center & border, (1, 1, 3, 3), "the region selects no entry"),
    ("outside of all", ~entries[...], (8,), "the region selects no entry"),
    ("center of a matrix", center, (8, 3), f"pattern `center` {_CONVOLUTION}"),
    ("center of a vector", center, (8,), f"pattern `center` {_CONVOLUTION.replace('2 dimensions', '1 dimension')}"),
    ("cross of a matrix", cross, (8, 3), f"pattern `cross` {_CONVOLUTION}"),
    ("border of a matrix", border, (8, 3), f"pattern `border` {_CONVOLUTION}"),
    ("center of an even kernel", center, (1, 1, 3, 2),
     "pattern `center` needs a kernel of odd size, found 3x2; write the entries as an index"),
    ("cross of an even kernel", cross, (1, 1, 4, 4), "pattern `cross` needs a kernel of odd size, found 4x4"),
    ("cross of one dimension", cross, (1, 1, 3),
     "pattern `cross(2)` needs a kernel of 2 spatial dimensions, found 1; write `cross(1)`"),
    ("cross(3) of two", cross(3), (1, 1, 3, 3),
     "pattern `cross(3)` needs a kernel of 3 spatial dimensions, found 2; write `cross(2)`"),
    ("diagonal of a vector", diagonal(0), (3,), "pattern `diagonal` needs a tensor of 2 or more dimensions, found 1"),
    ("triu of a vector", triu(1), (3,), "pattern `triu` needs a tensor of 2 or more dimensions, found 1"),
    ("tril of a number", tril(1), (), "pattern `tril` needs a tensor of 2 or more dimensions, found 0"),
    ("nm of a vector", nm(2, 4), (4,), "pattern `nm` needs a tensor of 2 or more dimensions, found 1"),
    ("nm of another width", nm(2, 4), (4, 6), "pattern `nm(2, 4)` needs dimension 1 to be a multiple of 4, found 6"),
    ("smallest of too few", smallest(0.01), (3,), "the region selects no entry"),
    ("mask of another shape", _TRUE, (4, 3),
     "a mask must have the parameter's shape (4, 3) or that of its first dimensions, found (3, 4); "
     "transpose it: `mask.T`"),
    ("mask of a kernel", torch.ones(3, 3).bool(), (8, 4, 3, 3),
     "a mask must have the parameter's shape (8, 4, 3, 3) or that of its first dimensions, found (3, 3); give "
     "`mask[None, None]` to repeat it"),
    ("mask of the last dimension", _TRUE[0], (3, 4),
     "a mask must have the parameter's shape (3, 4) or that of its first dimensions, found (4,); give "
     "`mask[None]` to repeat it"),
    ("mask of rows or columns", torch.tensor([True, False]), (2, 2),
     "a mask of shape (2,) fits the first and the last dimensions of (2, 2); "
     "give `mask[:, None]` for the first, `mask[None, :]` for the last"),
    ("mask of too many dimensions", _TRUE[None], (3, 4),
     "a mask must have the parameter's shape (3, 4) or that of its first dimensions, found (1, 3, 4); give a "
     "bool for each entry"),
    ("mask of integers", _TRUE.int(), (3, 4), "a mask must be a bool tensor, found dtype torch.int32; "
     "give `mask == 1` if 1 means frozen, `mask == 0` if 1 means trained"),
    ("array of positions", np.array([0, 2]), (3, 4), "a mask must be a bool tensor, found dtype torch.int64; "
     "give `indices.tolist()` for an index"),
    ("array of floats", np.ones((3, 4)), (3, 4), "a mask must be a bool tensor, found dtype torch.float64; give `mask"),
    ("mask of numbers", 2 * _TRUE.int(), (3, 4),
     "a mask must be a bool tensor, found dtype torch.int32; give True where an entry is frozen, as in "
     "`weight.abs() < 0.1`"),
    ("chunks that do not divide", each(3, diagonal), (4, 4),
     "pattern `each(3, diagonal)` needs dimension 0 to be a multiple of 3, found 4; choose a number of chunks"),
    ("pattern that does not fit a chunk", each(2, center), (4, 4), "pattern `center` needs a convolution weight"),
    ("chunks of a number", each(2, diagonal), (),
     "pattern `each(2, diagonal)` needs a tensor with dimensions, found none"),
    ("blocks that do not divide", block_diagonal(2), (4, 3),
     "pattern `block_diagonal(2)` needs last two dimensions that 2 divides, found 4 x 3"),
    ("blocks of a vector", block_diagonal(2), (4,),
     "pattern `block_diagonal` needs a tensor of 2 or more dimensions, found 1"),
    ("union too far", entries[:, [0, slice(2, 3), 4]], (2, 4), "index 4 is out of range for dimension 1 of size 4"),
    ("function to floats", lambda parameter: parameter, (3, 4), "a mask must be a bool tensor, found dtype torch.f"),
    ("function to a list", lambda parameter: [True], (3, 4), "a mask must be a bool tensor, found list"),
    ("mask without numbers", _TRUE.to("meta"), (3, 4),
     "a mask must be a dense tensor with numbers, found torch.strided on meta"),
    ("sparse mask", _TRUE.to_sparse(), (3, 4), "a mask must be a dense tensor with numbers, found torch.sparse_coo"),
    ("function to another shape", lambda parameter: _TRUE, (3,),
     "a mask must have the parameter's shape (3,) or that of its first dimensions, found"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("region", "shape", "message"), [case[1:] for case in _MISFITS], ids=[case[0] for case in _MISFITS]
)
def test_a_region_that_does_not_fit_is_refused(region: Any, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(RegionError, match=f"^{re.escape(message)}"):
        select(region, torch.zeros(shape))


@pytest.mark.parametrize(
    ("region", "found"),
    [(0, "int"), ("center", "str"), (slice(2), "slice"), ([True, False], "list"),
     (None, "NoneType"), (Region(), "Region")],
    ids=lambda part: part if isinstance(part, str) else "",
)  # fmt: skip
def test_a_region_of_another_kind_is_refused(region: Any, found: str) -> None:
    message = f"a region is an index, a pattern, a bool tensor or a function, found {found}; write"
    with pytest.raises(SpecError, match=re.escape(message)):
        select(region, torch.zeros(2))


_UNMADE: list[tuple[str, Callable[[], Any], str]] = [
    ("two ellipses", lambda: entries[..., 0, ...], "an index takes at most one `...`; write the other dimensions out"),
    ("step 0", lambda: entries[::0], "a slice step must not be 0; leave it out to take every position"),
    ("mask in an index", lambda: entries[torch.ones(1, dtype=torch.bool)],
     "an index holds integers, slices, `...` and lists of integers, found True; pass a bool mask as the region itself"),
    ("None in an index", lambda: entries[None], "an index holds integers, slices, `...` and lists of integers"),
    ("float in an index", lambda: entries[0.5], "an index holds integers, slices, `...` and lists of integers"),
    ("float in a slice", lambda: entries[0.5:], "an index holds integers, slices, `...` and lists of integers"),
    ("nested list", lambda: entries[[[0]]], "an index holds integers, slices, `...` and lists of integers, found [0]"),
    ("unknown pattern", lambda: pattern_named("middle"),
     "unknown pattern `middle`; use one of center, cross, border, "),
    ("argument of center", lambda: center(1), "pattern `center` got 1 argument; write `center`"),
    ("two arguments of triu", lambda: pattern_named("triu", (1, 2)),
     "pattern `triu` got 2 arguments; write `triu(k=0)`"),
    ("no arguments of nm", lambda: pattern_named("nm"), "pattern `nm` got 0 arguments; write `nm(n, m)`"),
    ("cross(0)", lambda: cross(0), "`dims` of `cross` must be a positive integer, found 0"),
    ("cross(True)", lambda: cross(True), "`dims` of `cross` must be a positive integer, found True"),
    ("triu(0.5)", lambda: triu(0.5), "`k` of `triu` must be an integer, found 0.5"),  # type: ignore[arg-type]
    ("smallest(0)", lambda: smallest(0), "`fraction` of `smallest` must be a number above 0, at most 1, found 0"),
    ("smallest(1.5)", lambda: smallest(1.5), "`fraction` of `smallest` must be a number above 0, at most 1, found 1.5"),
    ("smallest(nan)", lambda: smallest(float("nan")), "`fraction` of `smallest` must be a number above 0, at most 1"),
    ("nm(0, 4)", lambda: nm(0, 4), "`n` of `nm` must be a positive integer, found 0"),
    ("nm(4, 4)", lambda: nm(4, 4), "pattern `nm(4, 4)` freezes nothing: 4 of every 4 stay free; give n < m"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), [case[1:] for case in _UNMADE], ids=[case[0] for case in _UNMADE])
def test_a_region_that_means_nothing_cannot_be_made(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(RegionError, match=f"^{re.escape(message)}"):
        make()


@pytest.mark.parametrize(
    ("key", "items"),
    [(0, (0,)), (np.int64(-1), (-1,)), (torch.tensor(2), (2,)), ([0, 1], ((0, 1),)), (range(2), ((0, 1),)),
     (np.array([0, 1]), ((0, 1),)), (torch.tensor([0, 1]), ((0, 1),)), ((), (...,))],
    ids=["int", "numpy integer", "tensor of no dimensions", "list", "range", "numpy array", "tensor", "nothing"],
)  # fmt: skip
def test_an_index_takes_every_kind_of_integer(key: Any, items: tuple[Any, ...]) -> None:
    index = entries[key]
    assert index == Index(items)
    assert str(index) == str(Index(items))
