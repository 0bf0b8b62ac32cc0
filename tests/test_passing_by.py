"""What passes by the hooks: parameters and modules that are put in another's place, loaders, exporters, compilers."""

from __future__ import annotations

import math
import struct
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from freezehooks import FrozenValueError, UnsupportedParameterError, freeze_entries

from .claims import same_bits

# --------------------------------------------------------------------------------------------------------------------
# Numbers of 64 bits


def _nearest(number: float, dtype: torch.dtype) -> float:
    """Return the number of 16 bits that is nearest, of two the even one: by trying all of them."""
    if dtype == torch.float16:
        return float(struct.unpack("e", struct.pack("e", number))[0])
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32, device="cpu").to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    gaps = (every.double() - number).abs()
    nearest = every[gaps == gaps.min()]
    even = nearest[(nearest.view(torch.int16) & 1) == 0] if len(nearest) > 1 else nearest
    return math.copysign(float(even[0]), number)


_TWICE = {
    torch.float16: [1 + 2**-11 + 2**-40, -(1 + 2**-11 + 2**-40), 1 + 3 * 2**-11 - 2**-40, 3 * 2**-26 + 2**-60, 2**-25],
    torch.bfloat16: [1 + 2**-8 + 2**-40, -(1 + 2**-8 + 2**-40), 1 + 3 * 2**-8 - 2**-40, 1e-41 + 1e-60, 1e-50],
}
"""Numbers that become another one by way of 32 bits, and some that are smaller than any."""


@pytest.mark.parametrize("region", ["[0]", "[[0, 3], [1, 2]]", "[smallest(0.5)]"], ids=["box", "scattered", "dense"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat16"])
@pytest.mark.parametrize("later", [False, True], ids=["from_the_start", "converted_later"])
def test_a_number_is_rounded_once_to_16_bits(region: str, dtype: torch.dtype, later: bool) -> None:
    for number in _TWICE[dtype]:
        layer = nn.Linear(4, 4) if later else nn.Linear(4, 4).to(dtype)
        frozen = freeze_entries(layer, f"weight{region} = {number!r}")
        layer.to(dtype)
        layer(torch.ones(1, 4, dtype=dtype))
        values = frozen["weight"].values
        expected = torch.full_like(values, _nearest(number, dtype))
        assert same_bits(values, expected)
        assert same_bits(layer.weight[frozen["weight"].frozen], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat16"])
@pytest.mark.parametrize("kept", [False, True], ids=["given", "kept"])
def test_a_tensor_of_64_bits_is_rounded_once_to_16(dtype: torch.dtype, kept: bool) -> None:
    torch.manual_seed(0)
    numbers = torch.tensor([*_TWICE[dtype], 0.0, -0.0, 1.0, -(2.0**-149)], dtype=torch.float64)
    layer = nn.Linear(len(numbers), 2, dtype=torch.float64)
    layer.weight.data[0] = numbers
    freeze_entries(layer, "weight[0]" if kept else {"weight": ("0", numbers)})
    layer.to(dtype)
    layer(torch.ones(1, len(numbers), dtype=dtype))
    expected = torch.tensor([_nearest(number, dtype) for number in numbers.tolist()], dtype=dtype)
    assert same_bits(layer.weight[0], expected)


def test_a_number_that_is_finite_when_it_is_rounded_once_is_held() -> None:
    layer = nn.Linear(2, 2).half()
    freeze_entries(layer, f"weight[0] = {65520 - 2**-20!r}")
    assert layer.weight[0].tolist() == [65504, 65504]
    with pytest.raises(FrozenValueError, match="is not finite as torch.float16"):
        freeze_entries(layer, "weight[1] = 65520")


# --------------------------------------------------------------------------------------------------------------------
# Parameters that share memory with themselves


def _unfolded(size: int, step: int) -> Tensor:
    return torch.arange(12.0).unfold(0, size, step)


@pytest.mark.parametrize(
    "overlapping",
    [
        lambda: _unfolded(4, 2),
        lambda: torch.arange(12.0).as_strided((3, 4), (2, 1)),
        lambda: torch.arange(12.0).as_strided((3, 2), (2, 4)),
        lambda: torch.arange(30.0).view(5, 6).unfold(1, 3, 1),
    ],
    ids=["unfold", "as_strided", "interleaved", "windows"],
)
def test_a_parameter_that_overlaps_itself_is_refused(overlapping: Any) -> None:
    weight = nn.Parameter(overlapping())
    with pytest.raises(UnsupportedParameterError, match=r"several of its entries share one place in memory .*clone"):
        freeze_entries({"weight": weight}, "weight[0] = 0")


@pytest.mark.parametrize(
    "apart",
    [
        lambda: _unfolded(2, 3),
        lambda: torch.arange(12.0).as_strided((3, 2), (2, 1)),
        lambda: torch.arange(24.0).as_strided((3, 2), (2, 3)),
        lambda: torch.arange(12.0).view(3, 4).t(),
        lambda: torch.arange(12.0).as_strided((1, 4), (0, 1)),
        lambda: torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    ],
    ids=["gaps", "rows", "interleaved", "transposed", "one_row", "channels_last"],
)
def test_a_parameter_with_gaps_or_in_another_order_is_held(apart: Any) -> None:
    weight = nn.Parameter(apart())
    frozen = freeze_entries({"weight": weight}, "weight[0] = 7")
    assert bool((weight[0] == 7).all())
    assert not bool((weight[1:] == 7).all()) or len(weight) == 1
    frozen.assert_frozen(guarded=False)


# --------------------------------------------------------------------------------------------------------------------
# Another default device


_EVERY_FORM = "0.weight[::2] = 0.5\n0.weight[[1, 3], [1, 2]] = 1\n1.weight[smallest(0.5)]\n0.bias\n1.bias[1] = 2"


def test_a_state_is_saved_and_loaded_under_any_default_device(tmp_path: Any) -> None:
    def model() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    saving, loading = model(), model()
    for parameter in loading.parameters():
        parameter.data.neg_()
    with torch.device("meta"):
        frozen = freeze_entries(saving, _EVERY_FORM)
        torch.save(frozen.state_dict(), tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True, map_location="cpu")
        twin = freeze_entries(loading, _EVERY_FORM, state=state)
        twin.load_state_dict(state)
        assert twin.violations() == ()
        repr(twin.report())
    for name, held in frozen.items():
        assert same_bits(held.values, twin[name].values)
        assert torch.equal(held.frozen, twin[name].frozen)
