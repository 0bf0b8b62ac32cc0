"""The free entries of one parameter as one flat tensor: every form, every layout, every dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from freezehooks._entries.flat_order import FlatOrder, memory_order

from .claims import same_bits
from .draws import rand
from .strategies import shapes


def _frozen(shape: tuple[int, ...], *keys: Any) -> Tensor:
    frozen = torch.zeros(shape, dtype=torch.bool)
    for key in keys:
        frozen[key] = True
    return frozen


_SHAPE = (4, 3, 3, 2)
_RANDOM = rand(*_SHAPE, seed=3) < 0.5

MASKS = {
    "nothing": _frozen(_SHAPE),
    "everything": _frozen(_SHAPE, ...),
    "first_rows": _frozen(_SHAPE, slice(2)),
    "last_rows": _frozen(_SHAPE, slice(2, None)),
    "middle_row": _frozen(_SHAPE, 1),
    "columns": _frozen(_SHAPE, (..., 0)),
    "center": _frozen(_SHAPE, (slice(None), slice(None), 1, 1)),
    "one_entry": _frozen(_SHAPE, (1, 2, 0, 1)),
    "all_but_one_entry": ~_frozen(_SHAPE, (1, 2, 0, 1)),
    "scattered": _RANDOM,
}

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor,
    "channels_last": lambda tensor: tensor.contiguous(memory_format=torch.channels_last),
    "permuted": lambda tensor: tensor.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
    "every_other": lambda tensor: torch.stack([tensor, torch.zeros_like(tensor)], dim=-1)[..., 0],
    "slice_of_a_larger": lambda tensor: torch.cat([tensor, tensor], dim=1)[:, : tensor.shape[1]],
}

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]

masks = pytest.mark.parametrize("frozen", MASKS.values(), ids=MASKS)
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def _numbers(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.arange(1, count + 1).to(dtype).view(shape)


def _order(frozen: Tensor, tensor: Tensor) -> FlatOrder:
    return FlatOrder.of(~frozen, memory_order(tensor))


def _addresses(tensor: Tensor) -> Tensor:
    """Where each entry lies in memory, counted in entries."""
    addresses = torch.zeros(tensor.shape, dtype=torch.int64)
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        addresses += (torch.arange(size) * stride).view(-1, *[1] * (tensor.ndim - dim - 1))
    return addresses


def _assert_takes_and_puts(frozen: Tensor, tensor: Tensor) -> None:
    free = _order(frozen, tensor)
    assert free.count == int((~frozen).sum())
    by_address = _addresses(tensor)[~frozen].argsort()
    taken = free.gather(tensor)
    assert same_bits(taken, tensor[~frozen][by_address])
    before = tensor.clone()
    free.scatter_(tensor, taken + 1)
    assert same_bits(tensor, torch.where(frozen, before, before + 1))


@masks
@layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_free_entries_are_taken_in_the_order_of_memory_and_put_back_alone(
    frozen: Tensor, layout: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    _assert_takes_and_puts(frozen, layout(_numbers(_SHAPE, dtype)))


@given(st.data())
def test_any_mask_on_any_shape_in_any_order_of_memory(data: st.DataObject) -> None:
    shape = data.draw(shapes(min_size=data.draw(st.sampled_from([1, 1, 0]))))
    order = data.draw(st.permutations(range(len(shape))))
    back = [order.index(dim) for dim in range(len(shape))]
    tensor = _numbers(shape).permute(order).contiguous().permute(back)
    count = tensor.numel()
    flat = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    _assert_takes_and_puts(torch.tensor(flat, dtype=torch.bool).view(shape), tensor)


@masks
@layouts
def test_a_tensor_of_another_layout_gives_its_entries_in_the_same_order(
    frozen: Tensor, layout: Callable[[Tensor], Tensor]
) -> None:
    """A gradient may have another memory layout than its parameter."""
    parameter, gradient = layout(_numbers(_SHAPE)), _numbers(_SHAPE)
    free = _order(frozen, parameter)
    assert same_bits(free.gather(gradient), free.gather(parameter))
    empty = torch.zeros(_SHAPE)
    free.scatter_(empty, free.gather(parameter))
    assert same_bits(empty, gradient.masked_fill(frozen, 0))


@masks
@layouts
def test_in_rows_the_order_is_that_of_indexing_whatever_the_memory(
    frozen: Tensor, layout: Callable[[Tensor], Tensor]
) -> None:
    tensor = layout(_numbers(_SHAPE))
    assert same_bits(FlatOrder.in_rows(~frozen).gather(tensor), tensor[~frozen])


def _shares_memory(first: Tensor, second: Tensor) -> bool:
    return first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


@pytest.mark.parametrize(("name", "is_view"), [
    ("nothing", True), ("first_rows", True), ("last_rows", True),
    ("middle_row", False), ("columns", False), ("center", False), ("scattered", False),
])  # fmt: skip
def test_entries_in_one_piece_are_a_view_and_others_a_copy(name: str, is_view: bool) -> None:
    tensor = _numbers(_SHAPE)
    free = _order(MASKS[name], tensor)
    taken = free.gather(tensor)
    assert _shares_memory(taken, tensor) == is_view
    before = tensor._version
    taken.neg_()
    free.scatter_(tensor, taken)
    assert tensor._version > before  # seen by the version counter, whether written to directly or through a view
    assert bool((tensor[~MASKS[name]] < 0).all())


def test_one_piece_in_memory_is_a_view_in_a_permuted_layout_too() -> None:
    tensor = LAYOUTS["channels_last"](_numbers(_SHAPE))
    assert _shares_memory(_order(MASKS["last_rows"], tensor).gather(tensor), tensor)
    matrix = _numbers((4, 6)).T
    assert _shares_memory(_order(_frozen((6, 4), (slice(None), slice(2))), matrix).gather(matrix), matrix)


@pytest.mark.parametrize("name", sorted(MASKS.keys() - {"scattered"}))
def test_a_few_runs_need_no_memory(name: str) -> None:
    assert _order(MASKS[name], _numbers(_SHAPE)).nbytes == 0


def test_scattered_entries_need_at_most_one_position_each() -> None:
    tensor = _numbers(_SHAPE)
    free = _order(_RANDOM, tensor)
    assert free.nbytes in (4 * free.count, 8 * free.count)


def test_inf_nan_and_minus_zero_come_and_go_unchanged() -> None:
    tensor = torch.tensor([torch.inf, torch.nan, -0.0, -torch.inf, 1e-45, 2.0]).repeat(12).view(_SHAPE)
    for frozen in MASKS.values():
        free = _order(frozen, tensor)
        copied = torch.zeros(_SHAPE)
        free.scatter_(copied, free.gather(tensor).clone())
        assert same_bits(copied, tensor.masked_fill(frozen, 0))


def test_a_tensor_without_dimensions_is_free_or_frozen() -> None:
    tensor = torch.tensor(2.0)
    assert _order(torch.tensor(False), tensor).gather(tensor).tolist() == [2]
    assert _order(torch.tensor(True), tensor).gather(tensor).tolist() == []
