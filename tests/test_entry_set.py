"""The forms of an entry set: each touches exactly its entries, bit for bit."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from freezehooks._entries.entry_set import EntrySet, Masked, Sparse, Strided

from .claims import same_bits
from .draws import rand, randint
from .strategies import boxes, masks, shapes

SHAPE = (6, 4, 3, 5)
_NOTHING = torch.zeros(SHAPE, dtype=torch.bool)


def _random_mask(fraction: float, seed: int) -> Tensor:
    return rand(*SHAPE, seed=seed) < fraction


def _set(*key: slice | int) -> Tensor:
    mask = _NOTHING.clone()
    mask[key] = True
    return mask


_ALL = slice(None)

_MASKS: dict[str, tuple[type[EntrySet], Tensor]] = {
    "everything": (Strided, _set()),
    "one tap": (Strided, _set(_ALL, _ALL, 1, 2)),
    "one channel": (Strided, _set(2)),
    "one entry": (Strided, _set(0, 0, 0, 0)),
    "last entry": (Strided, _set(-1, -1, -1, -1)),
    "strided box": (Strided, _set(slice(1, None, 2), _ALL, slice(0, 3, 2), slice(0, 5, 3))),
    "last dimension": (Strided, _set(_ALL, _ALL, _ALL, slice(3, 5))),
    "few": (Sparse, _random_mask(0.03, seed=1)),
    "two corners": (Sparse, _set(0, 0, 0, 0) | _set(-1, -1, -1, -1)),
    "many": (Masked, _random_mask(0.4, seed=2)),
    "all but one": (Masked, ~_set(3, 2, 1, 0)),
    "two boxes": (Masked, _set(0) | _set(3, slice(1, 3))),
}

_DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]

_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor.contiguous(),
    "channels_last": lambda tensor: tensor.contiguous(memory_format=torch.channels_last),
    "transposed": lambda tensor: tensor.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
}

every_mask = pytest.mark.parametrize(("form", "mask"), _MASKS.values(), ids=_MASKS)
every_dtype = pytest.mark.parametrize("dtype", _DTYPES, ids=str)
every_layout = pytest.mark.parametrize("lay", _LAYOUTS.values(), ids=_LAYOUTS)


def _awkward(dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random bits, which include every kind of nan and denormals, with inf, nan and -0.0 all over the tensor."""
    bytes_each = torch.empty(0, dtype=dtype).element_size()
    generator = torch.Generator().manual_seed(seed)
    noise = randint(0, 256, *SHAPE, bytes_each, seed=generator).byte().view(dtype).view(SHAPE)
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 0.0, 1.0]).to(dtype)
    numbers = special[randint(0, 6, *SHAPE, seed=generator)]
    return torch.where(rand(*SHAPE, seed=generator) < 0.5, noise, numbers)


class _Scene(NamedTuple):
    entries: EntrySet
    mask: Tensor
    tensor: Tensor
    before: Tensor


def _scene(mask: Tensor, dtype: torch.dtype, lay: Callable[[Tensor], Tensor], device: torch.device) -> _Scene:
    tensor = lay(_awkward(dtype).to(device))
    mask = mask.to(device)
    return _Scene(EntrySet.of(mask), mask, tensor, tensor.clone(memory_format=torch.contiguous_format))


def _bytes(tensor: Tensor) -> Tensor:
    """The tensor's bytes, a row for each entry, in the order of its coordinates."""
    return tensor.contiguous().view(torch.uint8).view(tensor.numel(), -1)


def _merged(mask: Tensor, frozen: Tensor, free: Tensor) -> Tensor:
    """The bytes of one tensor where the mask is True, and of another elsewhere."""
    return torch.where(mask.flatten().unsqueeze(1), _bytes(frozen), _bytes(free))


# --------------------------------------------------------------------------------------------------------------------
# Which form


@every_mask
def test_the_form_is_the_cheapest_that_is_exact(form: type[EntrySet], mask: Tensor) -> None:
    assert type(EntrySet.of(mask)) is form
    for lay in _LAYOUTS.values():
        assert type(EntrySet.of(lay(mask))) is form


@pytest.mark.parametrize(
    ("count", "form"),
    [(1, Strided), (2, Strided), (5, Sparse), (6, Masked), (100, Strided)],
    ids=lambda part: str(part),
)
def test_up_to_a_twentieth_of_the_entries_are_positions(count: int, form: type[EntrySet]) -> None:
    mask = torch.zeros(100, dtype=torch.bool)
    mask[:count] = True
    if form is not Strided:
        mask[count - 1], mask[-1] = False, True  # no box any more
    assert type(EntrySet.of(mask)) is form


def test_a_number_is_a_box_of_no_dimensions() -> None:
    entries = EntrySet.of(torch.tensor(True))
    tensor = torch.tensor(3.0)
    entries.fill_(tensor, -0.0)
    assert isinstance(entries, Strided)
    assert same_bits(tensor, torch.tensor(-0.0))
    assert entries.mask(tensor.device).equal(torch.tensor(True))


@given(shapes(min_dims=1).flatmap(lambda shape: st.tuples(st.just(shape), boxes(shape))))
@settings(max_examples=200, deadline=None)
def test_whatever_forward_slices_select_is_a_box(drawn: tuple[tuple[int, ...], tuple[slice, ...]]) -> None:
    shape, key = drawn
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[key] = True
    entries = EntrySet.of(mask)
    assert isinstance(entries, Strided)
    tensor = torch.arange(1, mask.numel() + 1).view(shape)
    assert entries.read(tensor).flatten().equal(tensor[key].flatten())  # without dimensions of one position
    assert entries.mask(mask.device).equal(mask)


def _is_box(mask: Tensor) -> bool:
    """Whether the True entries are every combination of evenly spaced positions, one set a dimension."""
    entries = mask.nonzero().tolist()
    count = 1
    for column in zip(*entries, strict=True):
        hit = sorted(set(column))
        if len({b - a for a, b in pairwise(hit)}) > 1:
            return False
        count *= len(hit)
    return count == len(entries)


@given(shapes(min_dims=1, max_dims=3).flatmap(masks))
@settings(max_examples=200, deadline=None)
def test_a_random_mask_is_a_box_exactly_where_it_is_one_and_every_form_agrees_with_it(mask: Tensor) -> None:
    assert (Strided.around(mask) is not None) == _is_box(mask)
    forms = [EntrySet.of(mask), Sparse(mask), Masked(mask), *filter(None, [Strided.around(mask)])]
    for entries in forms:
        tensor = torch.arange(1.0, mask.numel() + 1).view(mask.shape)
        expected = tensor.clone().masked_fill_(mask, -7.0)
        entries.fill_(tensor, -7.0)
        assert tensor.equal(expected)
        assert entries.mask(mask.device).equal(mask)
        again = EntrySet.from_state(entries.state(), mask)
        assert again.mask(mask.device).equal(mask)


# --------------------------------------------------------------------------------------------------------------------
# Writing and reading


@every_mask
@every_layout
@every_dtype
def test_zero_writes_plus_zero_into_the_frozen_entries_alone(
    form: type[EntrySet], mask: Tensor, dtype: torch.dtype, lay: Callable[[Tensor], Tensor], device: torch.device
) -> None:
    entries, mask, tensor, before = _scene(mask, dtype, lay, device)
    strides = tensor.stride()
    entries.zero_(tensor)
    assert _bytes(tensor).equal(_merged(mask, torch.zeros_like(before), before))
    assert tensor.stride() == strides


@every_mask
@every_layout
@every_dtype
def test_fill_writes_the_number_into_the_frozen_entries_alone(
    form: type[EntrySet], mask: Tensor, dtype: torch.dtype, lay: Callable[[Tensor], Tensor], device: torch.device
) -> None:
    entries, mask, tensor, before = _scene(mask, dtype, lay, device)
    for number in (0.0, -0.0, 1.0, -0.1, 6e4, 0.0):
        entries.fill_(tensor, number)
        assert _bytes(tensor).equal(_merged(mask, torch.full_like(before, number), before)), number


@every_mask
@every_layout
@every_dtype
def test_what_is_read_from_one_tensor_is_written_into_another_bit_for_bit(
    form: type[EntrySet], mask: Tensor, dtype: torch.dtype, lay: Callable[[Tensor], Tensor], device: torch.device
) -> None:
    entries, mask, tensor, before = _scene(mask, dtype, lay, device)
    for source_lay in _LAYOUTS.values():
        source = source_lay(_awkward(dtype, seed=1).to(device))
        values = entries.read(source)
        untouched = source.clone()
        entries.write_(tensor, values)
        assert _bytes(tensor).equal(_merged(mask, source, before))
        assert same_bits(source, untouched)


@every_mask
@every_layout
@every_dtype
def test_read_returns_a_copy_of_the_frozen_entries_and_touches_nothing(
    form: type[EntrySet], mask: Tensor, dtype: torch.dtype, lay: Callable[[Tensor], Tensor], device: torch.device
) -> None:
    entries, mask, tensor, before = _scene(mask, dtype, lay, device)
    values = entries.read(tensor)
    assert values.dtype == dtype
    assert same_bits(tensor, before)
    tensor.fill_(1)
    held = torch.zeros_like(before)
    entries.write_(held, values)
    assert _bytes(held).equal(_merged(mask, before, torch.zeros_like(before)))


@pytest.mark.parametrize("name", ["strided box", "few", "many"])
def test_values_are_in_the_form_s_own_shape(name: str) -> None:
    mask = _MASKS[name][1]
    tensor = _awkward(torch.float32)
    expected = {
        "strided box": tensor[1::2, :, ::2, ::3],
        "few": tensor[mask],
        "many": torch.where(mask, tensor, torch.zeros_like(tensor)),
    }
    assert same_bits(EntrySet.of(mask).read(tensor), expected[name])


@every_mask
def test_the_same_entries_serve_tensors_of_several_dtypes_in_turn(form: type[EntrySet], mask: Tensor) -> None:
    entries = EntrySet.of(mask)
    for dtype in (*_DTYPES, torch.int8, *reversed(_DTYPES)):
        tensor = torch.ones(SHAPE, dtype=dtype)
        entries.fill_(tensor, 2)
        assert tensor.equal(torch.ones_like(tensor).masked_fill_(mask, 2))


@pytest.fixture
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@every_mask
@every_layout
@pytest.mark.usefixtures("_deterministic")
def test_deterministic_algorithms_are_all_it_takes(
    form: type[EntrySet], mask: Tensor, lay: Callable[[Tensor], Tensor], device: torch.device
) -> None:
    entries, mask, tensor, before = _scene(mask, torch.float32, lay, device)
    values = entries.read(tensor)
    entries.zero_(tensor)
    entries.fill_(tensor, -0.1)
    entries.write_(tensor, values)
    assert same_bits(tensor, before)


@every_mask
def test_frozen_is_true_at_the_frozen_entries(form: type[EntrySet], mask: Tensor, device: torch.device) -> None:
    entries = EntrySet.of(mask.to(device))
    found = entries.mask(device)
    assert found.dtype == torch.bool
    assert found.equal(mask.to(device))
    entries.zero_(torch.ones(SHAPE, dtype=torch.complex128, device=device))  # which may leave other bits behind
    assert entries.mask(device).equal(mask.to(device))


# --------------------------------------------------------------------------------------------------------------------
# State


@every_mask
def test_a_saved_state_makes_the_same_entries(form: type[EntrySet], mask: Tensor, device: torch.device) -> None:
    entries = EntrySet.of(mask.to(device))
    entries.zero_(torch.ones(SHAPE, dtype=torch.float16, device=device))
    file = io.BytesIO()
    torch.save(entries.state(), file)
    file.seek(0)
    again = EntrySet.from_state(torch.load(file, weights_only=True), mask)
    assert type(again) is form
    tensor = _awkward(torch.float32).to(device)
    assert again.mask(device).equal(mask.to(device))
    assert same_bits(again.read(tensor), entries.read(tensor))


@every_mask
def test_a_saved_state_is_a_copy(form: type[EntrySet], mask: Tensor) -> None:
    entries = EntrySet.of(mask)
    for part in entries.state().values():
        if isinstance(part, Tensor):
            part.zero_()
        else:
            part.clear()
    assert entries.mask(mask.device).equal(mask)
