"""Every layer computes its formula, whatever its shape; what a mask or a constant removes is exactly 0."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from typing import Any, Final, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor, nn
from torch.func import functional_call

from freezehooks import FrozenValueError, RegionError, SpecError, TargetError, center, cross, entries, freeze_entries
from freezehooks.layers import (
    MaskedConv1d,
    MaskedConv2d,
    MaskedConv3d,
    SharedKernelConv1d,
    SharedKernelConv2d,
    SharedKernelConv3d,
    SynthesizedConv1d,
    SynthesizedConv2d,
    SynthesizedConv3d,
    synthesize,
)

from .claims import same_bits

PLAIN: Final[dict[int, Any]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
MASKED: Final[dict[int, Any]] = {1: MaskedConv1d, 2: MaskedConv2d, 3: MaskedConv3d}
SHARED: Final[dict[int, Any]] = {1: SharedKernelConv1d, 2: SharedKernelConv2d, 3: SharedKernelConv3d}
SYNTHESIZED: Final[dict[int, Any]] = {1: SynthesizedConv1d, 2: SynthesizedConv2d, 3: SynthesizedConv3d}

dimensions = pytest.mark.parametrize("dims", [1, 2, 3], ids=["1d", "2d", "3d"])
biased = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
drawn = settings(max_examples=100, deadline=None)

# --------------------------------------------------------------------------------------------------------------------
# The formula: a sum over taps, with the padding written out position by position


class Geometry(NamedTuple):
    """One way to call a convolution, and the shape of its input."""

    channels: tuple[int, int]
    kernel: tuple[int, ...]
    options: dict[str, Any]
    spatial: tuple[int, ...]
    seed: int

    @property
    def arguments(self) -> tuple[Any, ...]:
        return (*self.channels, self.kernel)

    def input(self, batch: int = 2) -> Tensor:
        return torch.randn(batch, self.channels[0], *self.spatial, dtype=torch.float64)

    def formula(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
        return _sum_over_taps(self, input, weight, bias)


@st.composite
def geometries(draw: DrawFn, depthwise: bool = False) -> Geometry:
    dims = draw(st.integers(1, 3))
    each = st.tuples(*[st.integers(1, 2)] * dims)
    groups = draw(st.integers(1, 3))
    channels = (groups, groups) if depthwise else (groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2)))
    same = draw(st.booleans())
    kernel = draw(st.tuples(*[st.sampled_from([1, 3]) if same else st.integers(1, 3)] * dims))
    dilation = draw(each)
    options: dict[str, Any] = {
        "stride": (1,) * dims if same else draw(each),
        "padding": "same" if same else draw(st.tuples(*[st.integers(0, 2)] * dims)),
        "dilation": dilation,
        "padding_mode": draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        "bias": draw(st.booleans()),
    }
    if not depthwise:
        options["groups"] = groups
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    spatial = tuple(max(3, size) + draw(st.integers(0, 2)) for size in reach)
    return Geometry(channels, kernel, options, spatial, draw(st.integers(0, 2**16)))


def _padded_positions(size: int, before: int, after: int, mode: str) -> list[int | None]:
    inside: Callable[[int], int | None] = {
        "zeros": lambda i: i if 0 <= i < size else None,
        "reflect": lambda i: -i if i < 0 else 2 * (size - 1) - i if i >= size else i,
        "replicate": lambda i: min(max(i, 0), size - 1),
        "circular": lambda i: i % size,
    }[mode]
    return [inside(i) for i in range(-before, size + after)]


def _padded(geometry: Geometry, input: Tensor) -> Tensor:  # noqa: A002
    padding = geometry.options["padding"]
    for axis, (size, kernel) in enumerate(zip(geometry.spatial, geometry.kernel, strict=True)):
        total = geometry.options["dilation"][axis] * (kernel - 1)
        before, after = (total // 2, total - total // 2) if padding == "same" else (padding[axis], padding[axis])
        planes = [
            torch.zeros_like(input.select(axis + 2, 0)) if position is None else input.select(axis + 2, position)
            for position in _padded_positions(size, before, after, geometry.options["padding_mode"])
        ]
        input = torch.stack(planes, axis + 2)  # noqa: A001
    return input


def _seen_by_taps(geometry: Geometry, input: Tensor) -> dict[tuple[int, ...], Tensor]:  # noqa: A002
    """Return, for every tap, the input that it meets at every output position: ``(batch, in, *positions)``."""
    padded = _padded(geometry, input)
    stride, dilation = geometry.options["stride"], geometry.options["dilation"]
    seen = {}
    for tap in product(*map(range, geometry.kernel)):
        view = padded
        for axis, offset in enumerate(tap):
            reach = dilation[axis] * (geometry.kernel[axis] - 1)
            starts = range(0, padded.shape[axis + 2] - reach, stride[axis])
            at = torch.tensor([start + offset * dilation[axis] for start in starts])
            view = view.index_select(axis + 2, at)
        seen[tap] = view
    return seen


def _sum_over_taps(geometry: Geometry, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
    groups = geometry.channels[0] // weight.shape[1]
    total: Any = 0
    for tap, view in _seen_by_taps(geometry, input).items():
        at: tuple[Any, ...] = (..., *tap)
        kernel = weight[at].unflatten(0, (groups, -1))
        total = total + torch.einsum("bgi...,goi->bgo...", view.unflatten(1, (groups, -1)), kernel).flatten(1, 2)
    shift = 0 if bias is None else bias.view(-1, *[1] * len(geometry.kernel))
    result: Tensor = total + shift
    return result


def _close(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.allclose(first, second, rtol=1e-10, atol=1e-12)


def _some_mask(*shape: int) -> Tensor:
    mask = torch.rand(shape) < 0.6
    mask.view(-1)[0] = True
    return mask


def _width(layer_type: Any, *arguments: Any, **options: Any) -> int:
    """Return how wide a generator must be, from the shapes of the plain convolution alone."""
    dims = next(d for d, candidate in SYNTHESIZED.items() if candidate is layer_type)
    return sum(parameter.numel() for parameter in PLAIN[dims](*arguments, **options).parameters())


def _synthesized(layer_type: Any, *arguments: Any, features: int = 3, **options: Any) -> Any:
    plain_options = {name: value for name, value in options.items() if name != "frozen"}
    generator = nn.Linear(features, _width(layer_type, *arguments, **plain_options))
    return layer_type(generator, *arguments, **options)


@given(geometries(), st.booleans())
@drawn
def test_a_masked_convolution_is_the_sum_over_the_taps_that_exist(geometry: Geometry, full: bool) -> None:
    torch.manual_seed(geometry.seed)
    dims, groups = len(geometry.kernel), geometry.options["groups"]
    leading = (geometry.channels[1], geometry.channels[0] // groups) if full else ()
    mask = _some_mask(*leading, *geometry.kernel)
    layer = MASKED[dims](*geometry.arguments, **geometry.options, mask=mask, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.normal_()  # absent taps too: they must not matter
    x = geometry.input()
    kernel = torch.where(mask, layer.weight, 0)
    assert _close(layer(x), geometry.formula(x, kernel, layer.bias))
    plain = PLAIN[dims](*geometry.arguments, **geometry.options, dtype=torch.float64)
    with torch.no_grad():
        plain.weight.copy_(kernel)
        if layer.bias is not None:
            plain.bias.copy_(layer.bias)
    assert same_bits(layer(x), plain(x))


@given(geometries(depthwise=True))
@drawn
def test_a_shared_kernel_is_the_sum_over_its_taps_for_every_channel(geometry: Geometry) -> None:
    torch.manual_seed(geometry.seed)
    channels = geometry.channels[0]
    layer = SHARED[len(geometry.kernel)](channels, geometry.kernel, **geometry.options, dtype=torch.float64)
    x = geometry.input()
    kernel = layer.weight.repeat(channels, *[1] * (layer.weight.ndim - 1))
    bias = None if layer.bias is None else layer.bias.repeat(channels)
    assert _close(layer(x), geometry.formula(x, kernel, bias))


@given(geometries(), st.booleans())
@drawn
def test_a_synthesized_convolution_is_the_sum_over_the_taps_of_each_sample(geometry: Geometry, each: bool) -> None:
    torch.manual_seed(geometry.seed)
    layer = _synthesized(SYNTHESIZED[len(geometry.kernel)], *geometry.arguments, **geometry.options).double()
    batch = 3
    x, codes = geometry.input(batch), torch.randn(*([batch] if each else []), 3, dtype=torch.float64)
    numbers = layer.generator(codes).expand(batch, -1)
    entry_count = layer.weight_shape.numel()
    for sample in range(batch):
        kernel = numbers[sample, :entry_count].view(layer.weight_shape)
        bias = numbers[sample, entry_count:] if geometry.options["bias"] else None
        alone = x[sample : sample + 1]
        assert _close(layer(x, codes)[sample : sample + 1], geometry.formula(alone, kernel, bias))


# --------------------------------------------------------------------------------------------------------------------
# Gradients


def _gradients_are_right(layer: nn.Module, *inputs: Tensor) -> bool:
    """Return whether autograd agrees with finite differences on every input and every parameter."""
    names = [name for name, _ in layer.named_parameters()]
    leaves = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    given_inputs = [x.requires_grad_() for x in inputs]

    def run(*tensors: Tensor) -> Tensor:
        own = dict(zip(names, tensors[len(inputs) :], strict=True))
        output: Tensor = functional_call(layer, own, tensors[: len(inputs)])
        return output

    return torch.autograd.gradcheck(run, (*given_inputs, *leaves))


def _small_input(dims: int, channels: int = 2, size: int = 3) -> Tensor:
    return torch.rand(2, channels, *[size] * dims, dtype=torch.float64) + 0.5  # without zeros


@dimensions
@pytest.mark.parametrize("bias_at", ["everywhere", "response", "positions"])
def test_gradients_of_a_masked_convolution_agree_with_finite_differences(dims: int, bias_at: str) -> None:
    where: Any = torch.rand(2, *[2] * dims) < 0.5 if bias_at == "positions" else bias_at
    layer = MASKED[dims](2, 2, 2, mask=_some_mask(*[2] * dims), bias_at=where, dtype=torch.float64)
    assert _gradients_are_right(layer, _small_input(dims))


@dimensions
@biased
def test_gradients_of_a_shared_kernel_agree_with_finite_differences(dims: int, bias: bool) -> None:
    layer = SHARED[dims](2, 2, padding=1, padding_mode="circular", bias=bias, dtype=torch.float64)
    assert _gradients_are_right(layer, _small_input(dims))


@dimensions
@pytest.mark.parametrize("shape", [(2,), (2, 2)], ids=["one_code", "a_code_for_each_sample"])
def test_gradients_of_a_synthesized_convolution_agree_with_finite_differences(
    dims: int, shape: tuple[int, ...]
) -> None:
    layer = _synthesized(SYNTHESIZED[dims], 2, 2, 2, groups=2, features=2, frozen=(entries[..., 0], 0.5)).double()
    assert _gradients_are_right(layer, _small_input(dims), torch.randn(shape, dtype=torch.float64))


@dimensions
@pytest.mark.parametrize("bias_at", ["everywhere", "response"])
def test_the_jacobian_is_exactly_zero_at_absent_taps_and_nowhere_else(dims: int, bias_at: str) -> None:
    mask = _some_mask(2, 2, *[2] * dims)
    layer = MASKED[dims](2, 2, 2, mask=mask, bias_at=bias_at)
    x = _small_input(dims).float()

    def run(weight: Tensor) -> Tensor:
        output: Tensor = functional_call(layer, {"weight": weight}, (x,))
        return output

    jacobian = torch.autograd.functional.jacobian(run, layer.weight.detach())
    assert isinstance(jacobian, Tensor)
    reached = (jacobian != 0).flatten(0, -mask.ndim - 1).any(0)
    assert reached.equal(mask)


@dimensions
@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("bias_at", ["everywhere", "response"])
def test_an_infinite_gradient_leaves_absent_taps_without_one(dims: int, number: float, bias_at: str) -> None:
    layer = MASKED[dims](1, 1, 3, mask=~center, bias_at=bias_at)
    output = layer(torch.rand(1, 1, *[4] * dims) + 0.5)
    output.backward(torch.full_like(output, number))
    gradient = layer.weight.grad
    assert same_bits(gradient[~layer.mask], torch.zeros(1))
    assert not bool(gradient[layer.mask].isfinite().any())


@dimensions
@pytest.mark.parametrize("number", [1.0, torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("shape", [(3,), (2, 3)], ids=["one_code", "a_code_for_each_sample"])
def test_constants_of_a_synthesized_kernel_pass_no_gradient(dims: int, number: float, shape: tuple[int, ...]) -> None:
    layer = _synthesized(SYNTHESIZED[dims], 1, 2, 3, frozen=(center, 0.5))
    held: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        output.retain_grad()
        held.append(output)

    layer.generator.register_forward_hook(keep)
    output = layer(torch.rand(2, 1, *[4] * dims) + 0.5, torch.rand(shape))
    output.backward(torch.full_like(output, number))
    assert held[0].grad is not None
    gradient = held[0].grad[..., : layer.weight_shape.numel()].unflatten(-1, layer.weight_shape)
    middle: tuple[Any, ...] = (..., *[1] * dims)
    constant = torch.zeros(layer.weight_shape, dtype=torch.bool)
    constant[middle] = True
    assert same_bits(gradient[middle], torch.zeros_like(gradient[middle]))
    assert bool((gradient[..., ~constant] != 0).all())


# --------------------------------------------------------------------------------------------------------------------
# Masks

_CROSS = torch.tensor([[0, 1, 0], [1, 1, 1], [0, 1, 0]])
_NO_CENTER = torch.tensor([[1, 1, 1], [1, 0, 1], [1, 1, 1]])
_LAST_COLUMN = torch.tensor([[0, 0, 1], [0, 0, 1], [0, 0, 1]])


@pytest.mark.parametrize(
    ("region", "taps"),
    [
        (cross, _CROSS),
        (~center, _NO_CENTER),
        (entries[..., -1], _LAST_COLUMN),
        (~center & cross, _CROSS & _NO_CENTER),
    ],
    ids=["cross", "no_center", "entries", "both"],
)
def test_a_mask_is_the_same_as_tensor_full_tensor_region_and_text(region: Any, taps: Tensor) -> None:
    forms = [taps, taps.float(), taps.bool(), taps.expand(4, 1, 3, 3), region, str(region)]
    layers = []
    for form in forms:
        torch.manual_seed(1)
        layers.append(MaskedConv2d(2, 4, 3, groups=2, mask=form))
    x = torch.randn(2, 2, 5, 5)
    for layer in layers:
        assert layer.mask.equal(taps.bool().expand(4, 1, 3, 3))
        assert same_bits(layer.weight, layers[0].weight)
        assert same_bits(layer(x), layers[0](x))


def test_a_cross_of_three_dimensions_has_seven_taps() -> None:
    assert int(MaskedConv3d(1, 1, 3, mask=cross(3)).mask.sum()) == 7


def test_the_mask_given_may_be_written_to_later() -> None:
    mask = torch.tensor([1, 0, 1], dtype=torch.bool)
    layer = MaskedConv1d(1, 1, 3, mask=mask)
    mask.fill_(True)
    assert layer.mask.flatten().tolist() == [True, False, True]


@dimensions
@biased
def test_all_taps_present_start_and_compute_as_the_plain_convolution(dims: int, bias: bool) -> None:
    torch.manual_seed(5)
    plain = PLAIN[dims](2, 4, 3, padding=1, groups=2, bias=bias)
    torch.manual_seed(5)
    layer = MASKED[dims](2, 4, 3, padding=1, groups=2, bias=bias, mask=torch.ones([3] * dims))
    assert all(same_bits(ours, theirs) for ours, theirs in zip(layer.parameters(), plain.parameters(), strict=True))
    x = torch.randn(2, 2, *[4] * dims)
    assert same_bits(layer(x), plain(x))


@dimensions
def test_weight_and_bias_start_scaled_to_the_taps_of_their_channel(dims: int) -> None:
    mask = _some_mask(3, 2, *[3] * dims)
    mask[0] = False
    mask[0, 0].view(-1)[0] = True
    torch.manual_seed(5)
    plain = PLAIN[dims](2, 3, 3)
    torch.manual_seed(5)
    layer = MASKED[dims](2, 3, 3, mask=mask)
    for channel in range(3):
        scale = (mask[channel].numel() / int(mask[channel].sum())) ** 0.5
        expected = torch.where(mask[channel], plain.weight[channel] * scale, 0)
        torch.testing.assert_close(layer.weight[channel], expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(layer.bias[channel], plain.bias[channel] * scale, rtol=1e-6, atol=0)
    assert not bool(layer.weight[~mask].any())


@dimensions
def test_reset_parameters_draws_what_construction_draws(dims: int) -> None:
    torch.manual_seed(5)
    layer = MASKED[dims](2, 2, 3, mask="~center")
    first = {name: value.clone() for name, value in layer.state_dict().items()}
    weight = layer.weight
    torch.manual_seed(5)
    layer.reset_parameters()
    assert layer.weight is weight
    assert all(same_bits(value, first[name]) for name, value in layer.state_dict().items())


_OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, line_search_fn="strong_wolfe"),
}


@dimensions
@pytest.mark.parametrize("optimizer_name", _OPTIMIZERS)
@pytest.mark.parametrize("bias_at", ["everywhere", "response"])
def test_absent_taps_stay_zero_under_every_optimizer(dims: int, optimizer_name: str, bias_at: str) -> None:
    mask = _some_mask(2, 2, *[3] * dims)
    mask[1, 0] = False
    layer = MASKED[dims](2, 2, 3, mask=mask, bias_at=bias_at)
    optimizer = _OPTIMIZERS[optimizer_name](layer.parameters())
    start, x = layer.weight.detach().clone(), torch.randn(4, 2, *[4] * dims)

    def closure() -> float:
        optimizer.zero_grad()
        loss = (layer(x) - 1).square().mean()
        loss.backward()
        return float(loss.detach())

    for _ in range(20):
        optimizer.step(closure)
        assert not bool(layer.weight[~mask].any())
    assert bool((layer.weight[mask] != start[mask]).all())


def test_an_optimizer_made_before_loading_and_resetting_keeps_working() -> None:
    layer = MaskedConv2d(1, 1, 3, mask=cross)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    layer.load_state_dict(nn.Conv2d(1, 1, 3).state_dict())
    layer.reset_parameters()
    layer.double()
    start = layer.weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.ones(1, 1, 4, 4, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    assert not bool(layer.weight[~layer.mask].any())
    assert bool((layer.weight[layer.mask] != start[layer.mask]).all())


@dimensions
@biased
def test_a_masked_state_dict_is_that_of_a_plain_convolution_both_ways(dims: int, bias: bool) -> None:
    plain = PLAIN[dims](2, 2, 3, bias=bias)
    layer = MASKED[dims](2, 2, 3, bias=bias, mask="~center")
    assert list(layer.state_dict()) == list(plain.state_dict())
    checkpoint = {name: value.clone() for name, value in plain.state_dict().items()}
    weight = layer.weight
    layer.load_state_dict(checkpoint, strict=True)
    assert layer.weight is weight
    assert same_bits(layer.weight, torch.where(layer.mask, checkpoint["weight"], 0))
    assert all(same_bits(value, plain.state_dict()[name]) for name, value in checkpoint.items())
    plain.load_state_dict(layer.state_dict(), strict=True)
    x = torch.randn(2, 2, *[4] * dims)
    assert same_bits(plain(x), layer(x))


def test_loading_by_assignment_leaves_the_checkpoint_as_it_is() -> None:
    checkpoint = {"weight": torch.ones(1, 1, 3, 3)}
    layer = MaskedConv2d(1, 1, 3, bias=False, mask=cross)
    layer.load_state_dict(checkpoint, assign=True)
    assert int(layer.state_dict()["weight"].sum()) == 5
    assert int(checkpoint["weight"].sum()) == 9


@dimensions
def test_absent_taps_are_zero_in_a_state_dict_after_a_stray_write(dims: int) -> None:
    layer = MASKED[dims](1, 1, 3, mask="~center")
    layer.weight.data.fill_(7.0)
    saved = nn.Sequential(layer).state_dict()["0.weight"]
    assert saved.equal(layer.mask * 7.0)


# --------------------------------------------------------------------------------------------------------------------
# Where the bias is added


@dimensions
def test_a_bias_everywhere_is_the_plain_one(dims: int) -> None:
    layer = MASKED[dims](2, 3, 3, mask="~center", bias_at="everywhere")
    plain = PLAIN[dims](2, 3, 3)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 2, *[5] * dims) * (torch.rand(2, 2, *[5] * dims) < 0.1)
    assert same_bits(layer(x), plain(x))


@given(geometries(), st.sampled_from([0.05, 0.3]))
@drawn
def test_a_bias_at_the_response_is_added_where_a_tap_sees_something(geometry: Geometry, density: float) -> None:
    torch.manual_seed(geometry.seed)
    geometry = geometry._replace(options={**geometry.options, "bias": True})
    groups = geometry.options["groups"]
    mask = _some_mask(geometry.channels[1], geometry.channels[0] // groups, *geometry.kernel)
    layer = MASKED[len(geometry.kernel)](
        *geometry.arguments, **geometry.options, mask=mask, bias_at="response", dtype=torch.float64
    )
    x = geometry.input()
    x = x * (torch.rand_like(x) < density)
    responds = torch.zeros_like(layer(x), dtype=torch.bool)
    for tap, view in _seen_by_taps(geometry, x).items():
        for out in range(geometry.channels[1]):
            first = out // (geometry.channels[1] // groups) * mask.shape[1]
            for i in range(mask.shape[1]):
                if mask[(out, i, *tap)]:
                    responds[:, out] |= view[:, first + i] != 0
    output = layer(x)
    assert bool((output[~responds] == 0).all())
    assert _close(output[responds], geometry.formula(x, layer.weight, layer.bias)[responds])


@dimensions
def test_an_empty_neighborhood_gives_zero_and_not_the_bias(dims: int) -> None:
    layer = MASKED[dims](1, 1, 3, padding=1, mask="~center", bias_at="response")
    x = torch.zeros(1, 1, *[5] * dims)
    assert bool((layer(x) == 0).all())
    middle = (0, 0, *[2] * dims)
    x[middle] = 1.0
    output = layer(x)
    near = (0, 0, *[slice(1, 4)] * dims)
    assert output[middle] == 0  # the input is there, under the tap that does not exist
    assert int((output != 0).sum()) == int((output[near] != 0).sum()) == 3**dims - 1


@dimensions
def test_gradients_through_a_bias_at_the_response_are_the_convolution_s(dims: int) -> None:
    layer = MASKED[dims](2, 2, 3, mask="~center", bias_at="response")
    plain = PLAIN[dims](2, 2, 3)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 2, *[6] * dims) * (torch.rand(2, 2, *[6] * dims) < 0.05)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    output = layer(ours)
    incoming = torch.randn_like(output)
    output.backward(incoming)
    plain(theirs).backward(incoming)
    assert bool((output == 0).any())
    assert ours.grad is not None
    assert theirs.grad is not None
    assert ours.grad.equal(theirs.grad)
    assert layer.weight.grad.equal(plain.weight.grad * layer.mask)
    expected = (incoming * (output != 0)).transpose(0, 1).flatten(1).sum(1)
    torch.testing.assert_close(layer.bias.grad, expected)


@dimensions
@pytest.mark.parametrize("by_channel", [False, True], ids=["positions", "channels_and_positions"])
def test_a_bias_at_given_positions_is_added_there_alone(dims: int, by_channel: bool) -> None:
    where = torch.rand(*([3] if by_channel else []), *[4] * dims) < 0.5
    layer = MASKED[dims](2, 3, 2, mask=torch.ones([2] * dims), bias_at=where)
    x = torch.randn(2, 2, *[5] * dims)
    without = functional_call(layer, {"bias": torch.zeros(3)}, (x,))
    expected = without + where * layer.bias.view(-1, *[1] * dims)
    assert same_bits(layer(x), expected)
    torch.testing.assert_close(layer(x[0]), expected[0])  # torch rounds a batch of one otherwise
    layer(x).sum().backward()
    assert layer.bias.grad.equal((where.expand(2, 3, *[4] * dims)).transpose(0, 1).flatten(1).sum(1).float())


@pytest.mark.parametrize("bias_at", ["response", torch.ones(3, dtype=torch.bool)], ids=["response", "positions"])
def test_without_a_bias_its_place_is_of_no_matter(bias_at: Any) -> None:
    layer = MaskedConv1d(1, 1, 3, bias=False, mask="~center", bias_at=bias_at)
    x = torch.randn(1, 1, 5)
    assert same_bits(layer(x), nn.functional.conv1d(x, layer.weight))


# --------------------------------------------------------------------------------------------------------------------
# Shared kernels


@dimensions
@biased
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_a_shared_kernel_is_the_repeated_convolution_and_its_gradient_their_sum(
    dims: int, bias: bool, mode: str
) -> None:
    layer = SHARED[dims](3, 3, stride=2, padding=2, dilation=2, bias=bias, padding_mode=mode)
    repeated = layer.to_conv()
    x = torch.randn(2, 3, *[5] * dims)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    output = layer(ours)
    incoming = torch.randn_like(output)
    assert same_bits(output, repeated(theirs))
    output.backward(incoming)
    repeated(theirs).backward(incoming)
    for one, many in zip(layer.parameters(), repeated.parameters(), strict=True):
        torch.testing.assert_close(one.grad, many.grad.sum(0, keepdim=True))
    assert ours.grad is not None
    assert theirs.grad is not None
    assert same_bits(ours.grad, theirs.grad)


@dimensions
def test_a_shared_kernel_starts_as_one_channel_of_a_depthwise_convolution(dims: int) -> None:
    torch.manual_seed(5)
    plain = PLAIN[dims](1, 1, 3)
    torch.manual_seed(5)
    layer = SHARED[dims](4, 3)
    assert same_bits(layer.weight, plain.weight)
    assert same_bits(layer.bias, plain.bias)
    assert sum(p.numel() for p in layer.parameters()) == 3**dims + 1


@dimensions
@biased
def test_a_shared_kernel_survives_the_way_to_a_plain_convolution_and_back(dims: int, bias: bool) -> None:
    layer = SHARED[dims](
        3, 3, stride=2, padding=1, dilation=2, bias=bias, padding_mode="replicate", dtype=torch.float64
    )
    plain = layer.to_conv()
    assert type(plain) is PLAIN[dims]
    back = type(layer).from_conv(plain)
    assert type(back) is type(layer)
    assert repr(back) == repr(layer)
    pairs = zip(back.parameters(), layer.parameters(), strict=True)
    assert all(same_bits(ours, theirs) for ours, theirs in pairs)
    x = torch.randn(2, 3, *[6] * dims, dtype=torch.float64)
    assert same_bits(back(x), plain(x))


@dimensions
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_a_plain_depthwise_checkpoint_with_equal_kernels_loads(dims: int, assign: bool) -> None:
    plain = SHARED[dims](3, 3).to_conv()
    layer = SHARED[dims](3, 3)
    checkpoint = nn.Sequential(plain).state_dict()
    nn.Sequential(layer).load_state_dict(checkpoint, strict=True, assign=assign)
    x = torch.randn(2, 3, *[4] * dims)
    assert same_bits(layer(x), plain(x))
    assert checkpoint["0.weight"].shape == (3, 1, *[3] * dims)


def test_a_plain_depthwise_checkpoint_with_unequal_kernels_is_refused() -> None:
    plain = SharedKernelConv1d(3, 3).to_conv()
    plain.weight.data[1, 0, 0] += 1
    message = r"`0.weight` differs between its 3 channels, by up to 1"
    with pytest.raises(RuntimeError, match=message):
        nn.Sequential(SharedKernelConv1d(3, 3)).load_state_dict(nn.Sequential(plain).state_dict())
    with pytest.raises(FrozenValueError, match=r"`weight` differs between its 3 channels, by up to 1"):
        SharedKernelConv1d.from_conv(plain)


@pytest.mark.parametrize(
    "conv", [nn.Conv2d(3, 3, 3), nn.Conv2d(3, 6, 3, groups=3), nn.Conv1d(3, 3, 3, groups=3)], ids=str
)
def test_only_a_depthwise_convolution_of_its_dimensions_becomes_a_shared_kernel(conv: Any) -> None:
    with pytest.raises(SpecError, match=r"expected a depthwise Conv2d \(groups = in_channels = out_channels\), found"):
        SharedKernelConv2d.from_conv(conv)


# --------------------------------------------------------------------------------------------------------------------
# Synthesized kernels


@dimensions
@biased
def test_one_code_is_the_plain_convolution_with_its_kernel(dims: int, bias: bool) -> None:
    options: dict[str, Any] = {"stride": 2, "padding": 1, "groups": 2, "padding_mode": "reflect", "bias": bias}
    layer = _synthesized(SYNTHESIZED[dims], 2, 4, 3, **options)
    plain = PLAIN[dims](2, 4, 3, **options)
    x, code = torch.randn(2, 2, *[5] * dims), torch.randn(3)
    weight, shift = layer.synthesize_kernel(code)
    assert (shift is not None) == bias
    given_parameters = {"weight": weight} if shift is None else {"weight": weight, "bias": shift}
    assert same_bits(layer(x, code), synthesize(plain, given_parameters, x))


@dimensions
@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_code_for_each_sample_is_a_loop_over_the_samples(dims: int, mode: str, groups: int) -> None:
    layer = _synthesized(SYNTHESIZED[dims], 2, 4, 3, padding=1, groups=groups, padding_mode=mode).double()
    x, codes = torch.randn(3, 2, *[4] * dims).double(), torch.randn(3, 3).double()
    loop = torch.cat([layer(x[i : i + 1], codes[i]) for i in range(3)])
    assert _close(layer(x, codes), loop)
    assert _close(layer(x[:1], codes[:1]), loop[:1])


def test_an_empty_batch_with_no_codes_has_an_empty_output() -> None:
    layer = _synthesized(SynthesizedConv2d, 2, 4, 3)
    assert layer(torch.randn(0, 2, 5, 5), torch.randn(0, 3)).shape == (0, 4, 3, 3)


@dimensions
@pytest.mark.parametrize("shape", [(3,), (2, 3)], ids=["one_code", "a_code_for_each_sample"])
def test_gradients_reach_generator_code_and_input(dims: int, shape: tuple[int, ...]) -> None:
    layer = _synthesized(SYNTHESIZED[dims], 1, 2, 3)
    x, code = torch.randn(2, 1, *[4] * dims, requires_grad=True), torch.randn(shape, requires_grad=True)
    layer(x, code).square().sum().backward()
    for tensor in (x, code, *layer.generator.parameters()):
        assert tensor.grad is not None
        assert bool((tensor.grad != 0).all())


@dimensions
@pytest.mark.parametrize("shape", [(3,), (2, 3)], ids=["one_code", "a_code_for_each_sample"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["float", "double", "bfloat16"])
def test_constants_are_exact_in_the_kernel_and_the_rest_is_generated(
    dims: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    layer = _synthesized(SYNTHESIZED[dims], 1, 2, 3, frozen=("center", 0.1)).to(dtype)
    code = torch.randn(shape, dtype=dtype)
    kernel, _ = layer.synthesize_kernel(code)
    middle: tuple[Any, ...] = (..., *[1] * dims)
    assert same_bits(kernel[middle], torch.full_like(kernel[middle], 0.1))
    generated = layer.generator(code)[..., : layer.weight_shape.numel()].view(kernel.shape).clone()
    generated[middle] = 0.1
    assert same_bits(kernel, generated)


def test_constants_may_be_a_tensor_and_are_kept_apart_from_it() -> None:
    values = torch.arange(6.0).view(2, 1, 3)
    layer = _synthesized(SynthesizedConv1d, 1, 2, 3, frozen=(entries[..., ::2], values))
    values.zero_()
    kernel, _ = layer.synthesize_kernel(torch.randn(3))
    assert kernel[..., ::2].tolist() == [[[0, 2]], [[3, 5]]]


@pytest.mark.parametrize("wrap", [lambda g: g, lambda g: nn.Sequential(nn.ReLU(), g)], ids=["linear", "sequential"])
def test_a_generator_of_another_width_is_refused_at_construction(wrap: Callable[[nn.Module], nn.Module]) -> None:
    message = r"the generator has 20 outputs, expected 21: 18 entries of a kernel of shape \(3, 2, 3\) and 3 of a bias"
    with pytest.raises(RegionError, match=message):
        SynthesizedConv1d(wrap(nn.Linear(4, 20)), 2, 3, 3)
    with pytest.raises(RegionError, match=r"has 21 outputs, expected 18: 18 entries of a kernel of shape \(3, 2, 3\);"):
        SynthesizedConv1d(wrap(nn.Linear(4, 21)), 2, 3, 3, bias=False)


class _Wrapped(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(4, width)

    def forward(self, code: Tensor) -> Tensor:
        made: Tensor = self.inner(code)
        return made


@pytest.mark.parametrize("shape", [(4,), (2, 4)], ids=["one_code", "a_code_for_each_sample"])
def test_a_generator_of_another_width_is_refused_at_first_use(shape: tuple[int, ...]) -> None:
    layer = SynthesizedConv1d(_Wrapped(20), 2, 3, 3)
    made = str((*shape[:-1], 20)).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(RegionError, match=rf"the generator made {made} of a code of shape .*, expected 21: 18 entries"):
        layer(torch.randn(2, 2, 5), torch.randn(shape))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 3), r"4 codes for an input of shape \(2, 1, 5\); give one code, or one for each sample"),
        ((1, 3), r"1 codes for an input of shape \(2, 1, 5\)"),
        ((2, 1, 3), r"a code of shape \(2, 1, 3\); give \(features,\) or \(batch, features\)"),
        ((), r"a code of shape \(\)"),
    ],
    ids=["too_many", "one_in_a_batch", "too_many_dimensions", "none"],
)
def test_another_number_of_codes_is_refused(shape: tuple[int, ...], message: str) -> None:
    layer = _synthesized(SynthesizedConv1d, 1, 2, 3)
    with pytest.raises(RegionError, match=message):
        layer(torch.randn(2, 1, 5), torch.randn(shape))


@pytest.mark.parametrize(
    ("frozen", "error", "message"),
    [
        (("center", torch.inf), RegionError, "the value of `frozen` is not finite"),
        (("center", torch.ones(2, 2)), RegionError, r"has shape \(2, 2\), expected a number or \(2, 1, 3\)"),
        (("0, 7", 0), RegionError, "index 7 is out of range for dimension 1 of size 1"),
        ("center", SpecError, "`frozen`"),
        ((3, 0), SpecError, "a region is an index, a pattern, a bool tensor or a function, found int"),
    ],
    ids=["not_finite", "another_shape", "out_of_range", "no_pair", "no_region"],
)
def test_constants_that_do_not_fit_are_refused(frozen: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _synthesized(SynthesizedConv1d, 1, 2, 3, frozen=frozen)


def test_synthesize_is_a_functional_call_that_gradients_pass_through() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    code = torch.randn(6, requires_grad=True)
    weight = code.view(2, 3) * 2
    x = torch.randn(4, 3)
    output = synthesize(module, {"0.weight": weight}, x)
    assert same_bits(output, functional_call(module, {"0.weight": weight}, (x,)))
    output.sum().backward()
    assert code.grad is not None
    assert bool((code.grad != 0).all())
    assert module.get_parameter("0.weight").grad is None
    assert all(same_bits(value, before[name]) for name, value in module.state_dict().items())


def test_synthesize_passes_arguments_by_name() -> None:
    layer = nn.Linear(2, 2, bias=False)
    assert synthesize(layer, {"weight": torch.eye(2)}, input=torch.tensor([3.0, 4.0])).tolist() == [3, 4]


def test_synthesize_refuses_names_and_shapes_that_are_not_the_module_s() -> None:
    layer = nn.Linear(3, 2)
    with pytest.raises(TargetError, match=r"`wieght` is not a parameter of Linear; its parameters are weight, bias"):
        synthesize(layer, {"wieght": torch.ones(2, 3)}, torch.ones(3))
    with pytest.raises(RegionError, match=r"`weight` has shape \(2, 3\), found a tensor of shape \(3, 2\)"):
        synthesize(layer, {"weight": torch.ones(3, 2)}, torch.ones(3))


# --------------------------------------------------------------------------------------------------------------------
# Events in a layer's life


class Layer(NamedTuple):
    """One layer, how to make it, and the shape of its code, if it takes one."""

    name: str
    dims: int
    make: Callable[[], Any]
    code: tuple[int, ...] | None = None

    def inputs(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        torch.manual_seed(2)
        x = torch.randn(2, 2, *[5] * self.dims) * (torch.rand(2, 2, *[5] * self.dims) < 0.3)
        tensors = (x,) if self.code is None else (x, torch.randn(self.code))
        return tuple(tensor.to(dtype) for tensor in tensors)


def _layers(dims: int) -> list[Layer]:
    checks = (torch.arange(5**dims) % 2 == 0).view([5] * dims)
    masked: dict[str, Any] = {"masked": "everywhere", "masked_response": "response", "masked_positions": checks}
    frozen = (entries[..., 0], 0.5)
    constant = lambda: _synthesized(SYNTHESIZED[dims], 2, 4, 3, padding=1, frozen=frozen)  # noqa: E731
    return [
        *(
            Layer(name, dims, lambda at=at: MASKED[dims](2, 4, 3, padding=1, mask=~center, bias_at=at))  # type: ignore[misc]
            for name, at in masked.items()
        ),
        Layer("shared", dims, lambda: SHARED[dims](2, 3, padding=1)),
        Layer("synthesized", dims, lambda: _synthesized(SYNTHESIZED[dims], 2, 4, 3, padding=1), (3,)),
        Layer("synthesized_each", dims, constant, (2, 3)),
    ]


_LAYERS = [layer for dims in (1, 2, 3) for layer in _layers(dims)]
layers = pytest.mark.parametrize("layer", _LAYERS, ids=[f"{layer.name}_{layer.dims}d" for layer in _LAYERS])


def _run_backward(module: nn.Module, *inputs: Tensor) -> list[Tensor]:
    module.zero_grad()
    output = module(*inputs)
    output.square().sum().backward()
    gradients = [parameter.grad for parameter in module.parameters()]
    assert all(gradient is not None for gradient in gradients)
    return [output.detach(), *[gradient.clone() for gradient in gradients if gradient is not None]]


def _same_run(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(same_bits(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("has_default", [False, True], ids=["", "under a default device"])
@layers
def test_a_layer_compiles_without_a_break(layer: Layer, has_default: bool, device: torch.device) -> None:
    torch._dynamo.reset()
    module, inputs = layer.make(), layer.inputs()
    compiled: Any = torch.compile(module, fullgraph=True, backend="aot_eager")
    with device if has_default else nullcontext():
        for ours, theirs in zip(_run_backward(compiled, *inputs), _run_backward(module, *inputs), strict=True):
            torch.testing.assert_close(ours, theirs)


@layers
def test_autocast_computes_in_bfloat16_as_a_plain_convolution(layer: Layer, device: torch.device) -> None:
    module, inputs = layer.make(), layer.inputs()
    with torch.autocast(device.type, torch.bfloat16):
        output = module(*inputs)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), module(*inputs), rtol=0.05, atol=0.05)
    output.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype == torch.float32 for p in module.parameters())


@layers
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copy_computes_the_same_and_shares_nothing(layer: Layer, duplicate: Callable[[Any], Any]) -> None:
    module, inputs = layer.make(), layer.inputs()
    twin = duplicate(module)
    before = _run_backward(module, *inputs)
    assert _same_run(_run_backward(twin, *inputs), before)
    assert repr(twin) == repr(module)
    for parameter in twin.parameters():
        parameter.data.fill_(7.0)
    assert _same_run(_run_backward(module, *inputs), before)


_WARNED_BY_TORCH: Final = (
    "ignore:Attempted to insert a get_attr Node",
    "ignore:Node .* target .* of  does not reference",
)
"""What `unlift` of torch 2.6 warns of wherever a module holds a tensor that is neither parameter nor saved buffer."""


@pytest.mark.filterwarnings(*(_WARNED_BY_TORCH if torch.__version__ < "2.7" else ()))
@layers
def test_a_layer_exports(layer: Layer) -> None:
    module, inputs = layer.make().eval(), layer.inputs()
    program = torch.export.export(module, inputs, strict=False)
    torch.testing.assert_close(program.module()(*inputs), module(*inputs))
    assert set(program.state_dict) == set(module.state_dict())


@layers
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=["half", "double"])
def test_a_layer_follows_a_change_of_dtype(layer: Layer, dtype: torch.dtype) -> None:
    module = layer.make()
    reference = module(*layer.inputs())
    output = module.to(dtype)(*layer.inputs(dtype))
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), reference, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("layer", [x for x in _LAYERS if x.dims > 1], ids=lambda x: f"{x.name}_{x.dims}d")
def test_channels_last_computes_the_same(layer: Layer) -> None:
    layout = torch.channels_last if layer.dims == 2 else torch.channels_last_3d
    module = layer.make()
    x, *code = layer.inputs()
    expected = module(x, *code)
    torch.testing.assert_close(module(x.to(memory_format=layout), *code), expected)
    torch.testing.assert_close(module.to(memory_format=layout)(x.to(memory_format=layout), *code), expected)


@layers
def test_a_state_dict_round_trip_is_exact(layer: Layer) -> None:
    module, twin = layer.make(), layer.make()
    saved = {name: value.clone() for name, value in module.state_dict().items()}
    assert list(saved) == [name for name, _ in module.named_parameters()]
    twin.load_state_dict(saved, strict=True)
    assert _same_run(_run_backward(twin, *layer.inputs()), _run_backward(module, *layer.inputs()))


@pytest.mark.parametrize(
    "layer", [x for x in _LAYERS if x.code is None or len(x.code) == 1], ids=lambda x: f"{x.name}_{x.dims}d"
)
def test_an_input_without_a_batch_gives_an_output_without_one(layer: Layer) -> None:
    module = layer.make()
    x, *code = layer.inputs()
    torch.testing.assert_close(module(x[0], *code), module(x, *code)[0])


@layers
def test_a_layer_comes_back_from_meta(layer: Layer, device: torch.device) -> None:
    module = layer.make()
    saved = {name: value.clone() for name, value in module.state_dict().items()}
    expected = module(*layer.inputs())
    module.to("meta")
    assert all(parameter.is_meta for parameter in module.parameters())
    module.to_empty(device=device).load_state_dict(saved)
    assert same_bits(module(*layer.inputs()), expected)


@layers
def test_a_layer_on_meta_tells_the_shape_of_its_output(layer: Layer) -> None:
    module = layer.make()
    shape = module(*layer.inputs()).shape
    output = module.to("meta")(*[x.to("meta") for x in layer.inputs()])
    assert output.is_meta
    assert output.shape == shape


@pytest.mark.parametrize("mask", [~center, torch.tensor([1, 0, 1])], ids=["region", "tensor"])
def test_a_masked_convolution_made_on_meta_loads_and_computes(mask: Any, device: torch.device) -> None:
    made = MaskedConv1d(1, 1, 3, mask=torch.tensor([1, 0, 1]))
    layer = MaskedConv1d(1, 1, 3, device="meta", mask=mask)
    assert layer.weight.is_meta
    layer.to_empty(device=device).load_state_dict(made.state_dict())
    x = torch.randn(1, 1, 5)
    assert same_bits(layer(x), made(x))


def test_a_shared_kernel_made_on_meta_loads_and_computes(device: torch.device) -> None:
    made, layer = SharedKernelConv1d(2, 3), SharedKernelConv1d(2, 3, device="meta")
    layer.to_empty(device=device).load_state_dict(made.state_dict())
    x = torch.randn(1, 2, 5)
    assert same_bits(layer(x), made(x))


@dimensions
def test_masked_and_shared_are_convolutions_to_whoever_asks(dims: int) -> None:
    assert isinstance(MASKED[dims](1, 1, 3, mask="center"), PLAIN[dims])
    assert isinstance(SHARED[dims](2, 3), PLAIN[dims])


@pytest.mark.parametrize(
    ("made", "shown"),
    [
        (
            lambda: MaskedConv2d(2, 4, 3, padding=1, mask=cross),
            "MaskedConv2d(2, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), taps=40/72, bias_at='everywhere')",
        ),
        (
            lambda: MaskedConv1d(1, 1, 3, mask="~center", bias_at=torch.ones(3, dtype=torch.bool)),
            "MaskedConv1d(1, 1, kernel_size=(3,), stride=(1,), taps=2/3, bias_at=positions)",
        ),
        (
            lambda: SharedKernelConv1d(4, 3, bias=False),
            "SharedKernelConv1d(4, 4, kernel_size=(3,), stride=(1,), groups=4, bias=False)",
        ),
        (
            lambda: SynthesizedConv1d(nn.Linear(4, 8), 1, 2, 3, stride=2),
            "SynthesizedConv1d(\n  1, 2, kernel_size=(3,), stride=(2,)\n"
            "  (generator): Linear(in_features=4, out_features=8, bias=True)\n)",
        ),
    ],
    ids=["masked", "masked_positions", "shared", "synthesized"],
)
def test_a_layer_shows_what_it_is(made: Callable[[], nn.Module], shown: str) -> None:
    assert repr(made()) == shown


# --------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (center, RegionError, "pattern `center` needs a kernel of odd size, found 4x2"),
        ("cross", RegionError, "pattern `cross` needs a kernel of odd size, found 4x2"),
        (
            torch.ones(3, 3),
            RegionError,
            r"`mask` has shape \(3, 3\), expected the kernel's \(4, 2\) or .*\(3, 2, 4, 2\)",
        ),
        (torch.ones(1, 1, 4, 2), RegionError, r"`mask` has shape \(1, 1, 4, 2\), expected the kernel's \(4, 2\)"),
        (torch.full((4, 2), 0.5), RegionError, "`mask` holds values other than 0 and 1; give 1 for each tap"),
        (torch.full((4, 2), torch.nan), RegionError, "`mask` holds values other than 0 and 1"),
        (torch.zeros(4, 2), RegionError, "`mask` has no tap: it is 0 everywhere; give at least one 1"),
        ([[1, 0]] * 4, SpecError, "`mask` must be a tensor or a region, found list"),
        (None, SpecError, "`mask` must be a tensor or a region, found NoneType"),
    ],
    ids=["even_center", "even_cross", "shape", "broadcast", "values", "nan", "no_tap", "list", "none"],
)
def test_a_mask_that_does_not_fit_is_refused(mask: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MaskedConv2d(2, 3, (4, 2), mask=mask)


@pytest.mark.parametrize(
    ("bias_at", "found"),
    [("nowhere", "'nowhere'"), (True, "True"), (torch.ones(3), r"a tensor of torch\.float32")],
    ids=["word", "bool", "float_tensor"],
)
def test_a_place_for_the_bias_that_is_none_is_refused(bias_at: Any, found: str) -> None:
    message = rf'`bias_at` must be "everywhere", "response" or a bool tensor of output positions, found {found};'
    with pytest.raises(SpecError, match=message):
        MaskedConv1d(1, 1, 3, mask="center", bias_at=bias_at)


@pytest.mark.parametrize("shape", [(4,), (1, 3), (2, 2, 3), ()], ids=str)
def test_positions_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    layer = MaskedConv1d(1, 2, 3, mask="center", bias_at=torch.ones(shape, dtype=torch.bool))
    found = str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(RegionError, match=rf"`bias_at` has shape {found}, the output has positions \(3,\)"):
        layer(torch.randn(2, 1, 5))


@pytest.mark.parametrize("channels", [0, -2, 2.0, True, "3"], ids=str)
def test_channels_that_are_no_positive_integer_are_refused(channels: Any) -> None:
    with pytest.raises(SpecError, match=rf"`channels` must be a positive integer, found {channels!r}"):
        SharedKernelConv2d(channels, 3)


@pytest.mark.parametrize("shape", [(2, 4, 5, 5), (4, 5, 5), (5, 5)], ids=str)
def test_an_input_of_other_channels_is_refused_by_a_shared_kernel(shape: tuple[int, ...]) -> None:
    found = str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(RegionError, match=rf"an input of shape {found} has no 3 channels before 2 dimensions"):
        SharedKernelConv2d(3, 3)(torch.randn(shape))


@pytest.mark.parametrize("layer", [x for x in _LAYERS if x.name != "shared"], ids=lambda x: f"{x.name}_{x.dims}d")
def test_an_input_of_other_channels_is_refused_with_both_numbers(layer: Layer) -> None:
    x, *code = layer.inputs()
    wider = torch.cat([x, x[:, :1]], 1)
    with pytest.raises((RuntimeError, ValueError), match=r"\[?\(?2, 3, 5.*\b2 channels"):
        layer.make()(wider, *code)


def test_a_plain_checkpoint_that_is_assigned_is_not_written_into() -> None:
    layer, plain = SharedKernelConv2d(3, 3), SharedKernelConv2d(3, 3).to_conv()
    checkpoint = plain.state_dict()
    layer.load_state_dict(checkpoint, assign=True)
    layer.weight.data.zero_()
    assert bool((checkpoint["weight"] != 0).all())


def test_synthesize_leaves_another_modules_parameters_alone() -> None:
    frozen, other = nn.Linear(2, 2), nn.Linear(2, 2)
    freeze_entries(frozen, "weight[0] = 0")
    before = other.weight.detach().clone()
    synthesize(frozen, dict(other.named_parameters()), torch.ones(1, 2)).sum().backward()
    assert same_bits(other.weight, before)
    assert other.weight.grad is not None
    assert bool((other.weight.grad != 0).all())
    with pytest.raises(SpecError, match="`weight` must be a tensor, found list; convert"):
        synthesize(frozen, {"weight": [1]}, torch.ones(1, 2))  # type: ignore[dict-item]  # on purpose
