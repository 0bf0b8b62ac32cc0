"""What bypasses the hooks: replaced parameters and modules, loaders, exporters, compilers."""

from __future__ import annotations

import copy
import math
import pickle
import struct
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from freezehooks import (
    FrozenEntries,
    FrozenValueError,
    MaskedOptimizer,
    ParameterChangedError,
    RuleConflictError,
    SpecError,
    UnsupportedParameterError,
    freeze_entries,
)

from .claims import held_twice, same_bits
from .devices import on_cpu
from .exporting import needs_to_tell_exports, skip_unless_exported

# --------------------------------------------------------------------------------------------------------------------
# Numbers of 64 bits


def _nearest(number: float, dtype: torch.dtype) -> float:
    """Return the nearest 16-bit number, or the even one of two, by trying all of them."""
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
"""Numbers that round differently by way of 32 bits, and some that are smaller than any."""


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
    with pytest.raises(FrozenValueError, match=r"is not finite as torch\.float16"):
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
    with pytest.raises(UnsupportedParameterError, match=r"several of its entries share memory .*clone"):
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


# --------------------------------------------------------------------------------------------------------------------
# Replaced parameters


def _put(module: nn.Module, key: str, numbers: Tensor, how: str) -> None:
    """Replace a parameter, by assignment or as accelerate's `set_module_tensor_to_device` does."""
    if how == "assigned":
        setattr(module, key, nn.Parameter(numbers.clone()))
    else:
        old = module._parameters[key]
        assert old is not None
        module._parameters[key] = type(old)(numbers.clone(), requires_grad=old.requires_grad)


ways = pytest.mark.parametrize("how", ["assigned", "set_module_tensor_to_device"])


def _looked_at(model: nn.Module, frozen: FrozenEntries, look: str) -> None:
    """Use a model after a replacement, in one of several ways."""
    looks: dict[str, Any] = {
        "forward": lambda: model(torch.ones(2, 4)),
        "state_dict": model.state_dict,
        "impose": frozen.impose,
        "violations": frozen.violations,
        "load": lambda: model.load_state_dict({}, strict=False),
    }
    if look == "step":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        frozen.guard(optimizer).hooks.reset()
        optimizer.step()
    else:
        looks[look]()


looks = pytest.mark.parametrize("look", ["forward", "state_dict", "step", "impose", "violations", "load"])


@ways
@looks
@pytest.mark.parametrize("region", ["[0]", "[[0, 3], [1, 2]]", "[smallest(0.5)]"], ids=["box", "scattered", "dense"])
def test_keep_follows_a_parameter_that_is_put_in_another_s_place(how: str, look: str, region: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    frozen = freeze_entries(model, f"0.weight{region}\n1.bias")
    model(torch.ones(1, 4))
    came = torch.randn(4, 4)
    _put(model[0], "weight", came, how)
    _looked_at(model, frozen, look)
    assert same_bits(model.get_parameter("0.weight"), came)
    model.get_parameter("0.weight").data.zero_()
    model(torch.ones(1, 4)).sum().backward()
    mask = frozen["0.weight"].frozen
    assert same_bits(model.get_parameter("0.weight")[mask], came[mask])
    gradient = model.get_parameter("0.weight").grad
    assert gradient is not None
    assert not gradient[mask].any()
    assert frozen.violations() == ()


@ways
@looks
def test_a_number_is_imposed_on_a_parameter_that_is_put_in_another_s_place_and_said(how: str, look: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    frozen = freeze_entries(model, "0.weight[0] = 0.5\n0.weight[1] = -0.0\n0.weight[2]")
    model(torch.ones(1, 4))
    came = torch.randn(4, 4)
    came[0, :3] = 0.5
    _put(model[0], "weight", came, how)
    with pytest.warns(UserWarning, match=r"`0\.weight` was replaced .* 5 frozen entries; .*call remove\(\) before"):
        _looked_at(model, frozen, look)
    frozen.impose()
    expected = came.clone()
    expected[0], expected[1] = 0.5, -0.0
    assert same_bits(model.get_parameter("0.weight"), expected)
    model(torch.ones(1, 4))  # said once
    assert same_bits(model.get_parameter("0.weight"), expected)


@ways
def test_a_parameter_with_the_numbers_that_are_held_is_put_in_place_without_a_word(how: str) -> None:
    model = nn.Linear(4, 4)
    frozen = freeze_entries(model, f"weight[0] = 0.1\nweight[1]\nweight[2] = {1 + 2**-11 + 2**-40!r}")
    first = model.weight.detach().clone()
    for numbers in (model.weight.detach(), model.weight.detach().double(), model.weight.detach().bfloat16()):
        frozen.impose()
        _put(model, "weight", numbers, how)
        _looked_at(model.to(numbers.dtype), frozen, "state_dict")
    model.float()
    model(torch.ones(1, 4))
    assert same_bits(model.weight[:3], first[:3])


def test_batch_norm_is_folded_into_a_kept_convolution() -> None:
    from torch.nn.utils.fusion import fuse_conv_bn_weights

    conv, norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2).eval()
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.fill_(0.5)
    norm.running_var.fill_(3.0)
    images = torch.randn(2, 1, 5, 5)
    freeze_entries(conv, "weight[center]\nbias[0]")
    expected = norm(conv(images))
    weight, bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    conv.weight, conv.bias = weight, bias
    assert torch.allclose(conv(images), expected, atol=1e-6)
    assert same_bits(conv.weight, weight)


def test_loading_right_after_replacing_says_nothing() -> None:
    model = nn.Linear(2, 2)
    freeze_entries(model, "weight[0]\nweight[1] = 0.5")
    model.weight = nn.Parameter(torch.full((2, 2), 7.0))
    model.load_state_dict({"weight": torch.full((2, 2), 3.0), "bias": torch.zeros(2)})
    model(torch.ones(1, 2))
    assert model.weight.tolist() == [[3, 3], [0.5, 0.5]]


def test_attaching_again_holds_at_the_values_that_were_frozen() -> None:
    model = nn.Linear(2, 2)
    model.weight.data.fill_(1)
    frozen = freeze_entries(model, "weight[0]")
    frozen.remove()
    model.weight = nn.Parameter(torch.full((2, 2), 7.0))
    assert frozen.violations()
    frozen.attach()
    assert model.weight.tolist() == [[1, 1], [7, 7]]


def test_bare_tensors_that_are_replaced_in_their_mapping_are_followed() -> None:
    tensors = {"w": torch.zeros(3, requires_grad=True)}
    frozen = freeze_entries(tensors, "w[0]\nw[1] = 1")
    tensors["w"] = torch.full((3,), 7.0, requires_grad=True)
    with pytest.warns(UserWarning, match=r"`w` was replaced .* 1 frozen entry; "):
        frozen.impose()
    assert tensors["w"].tolist() == [7, 1, 7]


@ways
def test_copies_of_a_model_follow_by_themselves(how: str) -> None:
    model = nn.Linear(2, 2)
    frozen = freeze_entries(model, "weight[0]")
    before = model.weight.detach().clone()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        _put(again, "weight", torch.full((2, 2), 7.0), how)
        again(torch.ones(1, 2))
        assert again.weight.tolist() == [[7, 7], [7, 7]]
        again.weight.data.zero_()
        again(torch.ones(1, 2))
        assert again.weight[0].tolist() == [7, 7]
    frozen.assert_frozen(guarded=False)
    assert same_bits(model.weight, before)


def test_a_replaced_tied_parameter_is_refused_where_its_copies_differ() -> None:
    model = nn.Linear(2, 2)
    freeze_entries(model, "weight = tied(0, start=first)").remove()
    frozen = freeze_entries(model, "weight = tied(0)")
    model.weight = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    with pytest.raises(FrozenValueError, match="2 slices along dimension 0 differ"):
        model(torch.ones(1, 2))
    frozen.remove()


def test_two_handles_follow_what_each_keeps() -> None:
    model = nn.Linear(2, 2)
    first, second = freeze_entries(model, "weight[0]"), freeze_entries(model, "weight[1]\nbias")
    model.weight = nn.Parameter(torch.full((2, 2), 7.0))
    model(torch.ones(1, 2))
    assert model.weight.tolist() == [[7, 7], [7, 7]]
    model.weight.data.zero_()
    model(torch.ones(1, 2))
    assert model.weight.tolist() == [[7, 7], [7, 7]]
    for frozen in (first, second):
        frozen.assert_frozen(guarded=False)


# --------------------------------------------------------------------------------------------------------------------
# Quantized


class _Quantized(torch.Tensor):
    """A tensor subclass as torchao makes: its numbers lie in others, and few operations know it."""

    codes: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor) -> _Quantized:
        made = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)  # type: ignore[attr-defined]
        made.codes = codes
        return made  # type: ignore[no-any-return]

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return _Quantized(args[0].codes)
        raise NotImplementedError(f"{func} on {cls}")


@pytest.mark.parametrize("swapped", [False, True], ids=["replaced", "swapped"])
@pytest.mark.parametrize("look", ["forward", "step", "state_dict", "violations"])
@pytest.mark.parametrize("region", ["[0]", "[smallest(0.5)] = 0"], ids=["box", "dense"])
def test_quantizing_a_frozen_model_is_refused(swapped: bool, look: str, region: str) -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4))
    frozen = freeze_entries(model, f"0.weight{region}")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    frozen.guard(optimizer)
    quantized = nn.Parameter(_Quantized(torch.ones(4, 4, dtype=torch.int8)), requires_grad=False)
    if swapped:
        frozen.remove()  # a tensor with hooks is not swapped
        frozen.attach()
        model[0].weight.data = model[0].weight.data.clone()
        torch.utils.swap_tensors(model[0].weight, quantized)
    else:
        model[0].weight = quantized
    ask = optimizer.step if look == "step" else lambda: _looked_at(model, frozen, look)
    with pytest.raises(ParameterChangedError, match=r"`0\.weight` .* subclass \(_Quantized\).* quantized"):
        ask()
    frozen.remove()
    assert FrozenEntries.of(model) == ()


@on_cpu("quantized layers compute there alone")
def test_a_copy_that_is_quantized_or_fused_is_refused_with_what_to_do_about_the_copy() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)).eval()
    freeze_entries(model, "0.weight[0] = 0\n4.weight[0]")
    images = torch.ones(1, 1, 4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        conversions: Any = (
            lambda copied: torch.ao.quantization.quantize_dynamic(copied, {nn.Linear}),
            lambda copied: torch.ao.quantization.fuse_modules(copied, [["0", "1", "2"]]),
        )
        for convert in conversions:
            with pytest.raises(ParameterChangedError, match=r"gone.*in a copy of the model: `for .*\.of\(copy\)"):
                convert(model)(images)
            copied = copy.deepcopy(model)
            for frozen in FrozenEntries.of(copied):
                frozen.remove()
            convert(copied)(images)


# --------------------------------------------------------------------------------------------------------------------
# Parameters swapped out for one call


def _spoiled(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.data.fill_(7.0)
    return model


@pytest.mark.parametrize("spec", ["*.weight[0] = 0.5", "*.weight[0]", "*.weight[smallest(0.5)] = 0"])
def test_a_call_with_another_models_parameters_writes_nothing_into_them_and_hooks_nothing(spec: str) -> None:
    student, teacher = (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2))
    frozen = freeze_entries(student, spec)
    student(torch.ones(1, 4))
    values = frozen["0.weight"].values.clone()
    given: dict[str, Tensor] = dict(_spoiled(teacher).named_parameters())
    output = torch.func.functional_call(student, given, (torch.ones(1, 4),))
    assert torch.equal(output, teacher(torch.ones(1, 4)))
    output.sum().backward()
    for parameter in teacher.parameters():
        assert bool((parameter == 7).all())
        assert not parameter._post_accumulate_grad_hooks  # type: ignore[attr-defined]
        assert parameter.grad is not None
        assert bool(parameter.grad.any())
    assert same_bits(frozen["0.weight"].values, values)
    _spoiled(student)
    student(torch.ones(1, 4))
    frozen.assert_frozen(guarded=False)


def test_a_call_with_the_models_own_parameters_holds() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    frozen = freeze_entries(model, "*.weight[0] = 0.5")
    _spoiled(model)
    torch.func.functional_call(model, dict(model.named_parameters()), (torch.ones(1, 4),)).sum().backward()
    frozen.assert_frozen(guarded=False)
    gradient = model.get_parameter("0.weight").grad
    assert gradient is not None
    assert not gradient[0].any()


def test_a_call_with_the_models_own_parameters_under_other_names_leaves_them_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    freeze_entries(model, "0.weight[0] = 0.5")
    other = _spoiled(model[1]).get_parameter("weight")
    torch.func.functional_call(model, {"0.weight": other}, (torch.ones(1, 4),))
    assert bool((other == 7).all())


def test_a_call_with_tensors_computed_from_the_models_own_parameters_computes_with_them() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    frozen = freeze_entries(model, "0.weight[0] = 0.5")
    doubled = {name: 2 * parameter for name, parameter in model.named_parameters()}
    output = torch.func.functional_call(model, doubled, (torch.ones(1, 4),))
    assert torch.equal(output, nn.functional.linear(torch.ones(1, 4), doubled["0.weight"], doubled["0.bias"]))
    output.sum().backward()
    gradient = model.get_parameter("0.weight").grad
    assert gradient is not None
    assert not gradient[0].any()
    frozen.assert_frozen(guarded=False)


# --------------------------------------------------------------------------------------------------------------------
# Exporters and compilers


@needs_to_tell_exports
@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
@pytest.mark.parametrize("part", [False, True], ids=["whole", "part"])
def test_an_exported_program_holds_the_values_after_a_stray_write(strict: bool, part: bool) -> None:
    skip_unless_exported(strict)
    net: Any = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    frozen = freeze_entries(net, "0.weight[0] = 0.5\n0.bias[smallest(0.5)] = 0\n2.weight[1]")
    net(torch.ones(1, 4))
    _spoiled(net)
    exported = net[0] if part else net
    program = torch.export.export(exported, (torch.ones(1, 4),), strict=strict)
    assert "copy_" not in str(program.graph)
    prefix = "" if part else "0."
    assert program.state_dict[f"{prefix}weight"][0].tolist() == [0.5] * 4
    assert torch.equal(program.module()(torch.ones(1, 4)), exported(torch.ones(1, 4)))
    if not part:
        frozen.assert_frozen(guarded=False)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning")
def test_scripting_a_frozen_model_is_refused_with_what_to_do() -> None:
    for model in (nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))):
        frozen = freeze_entries(model, "*weight[0] = 1")
        with pytest.raises(SpecError, match=r"torch\.jit\.script cannot compile .* call remove\(\) first"):
            torch.jit.script(model)
        frozen.remove()
        torch.jit.script(model)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.parametrize("traced", [False, True], ids=["scripted", "traced"])
def test_a_model_with_a_part_that_torch_jit_compiled_is_frozen_around_it(traced: bool) -> None:
    inner = nn.Sequential(nn.Linear(4, 4))
    compiled: Any = torch.jit.trace(inner, torch.ones(1, 4)) if traced else torch.jit.script(inner)
    model: Any = nn.Sequential(compiled, nn.Linear(4, 4))
    frozen = freeze_entries(model, "1.weight[0] = 0.5")
    optimizer = MaskedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1), frozen)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    model.load_state_dict(model.state_dict())
    frozen.assert_frozen()
    repr(frozen.report())
    frozen.remove()
    for rule in ("0.0.weight[0] = 0", "*.weight[0] = 0", "0.0 = 0"):
        with pytest.raises(UnsupportedParameterError, match=r"`0\.0\.weight` is not a parameter: torch\.jit has comp"):
            freeze_entries(model, rule)


# --------------------------------------------------------------------------------------------------------------------
# Several handles


@pytest.mark.parametrize("unseen", ["requires_grad", "replaced"])
def test_a_second_handle_that_disagrees_is_refused_also_where_the_first_has_no_gradient_hook(unseen: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    if unseen == "requires_grad":
        model.requires_grad_(False)
    freeze_entries(model, "0.weight[0] = 1")
    if unseen == "replaced":
        model[0].weight = nn.Parameter(torch.ones(2, 2))
    for part, name in ((model, "0.weight"), (model[0], "weight")):
        with pytest.raises(RuleConflictError, match="disagree"):
            freeze_entries(part, f"{name}[:, 0] = 2")
    assert len(FrozenEntries.of(model)) == 1


@held_twice
def test_handles_that_a_state_makes_disagree_are_refused() -> None:
    saving = nn.Linear(2, 2)
    state = freeze_entries(saving, "weight[0]").state_dict()
    model = nn.Linear(2, 2)
    first, second = freeze_entries(model, "weight[0]"), freeze_entries(model, "weight[:, 0]")
    before = model.weight.detach().clone()
    with pytest.raises(RuleConflictError, match=r"`weight\[:, 0\] = keep` and `weight\[0\] = keep` disagree"):
        first.load_state_dict(state)
    first.impose()
    assert same_bits(model.weight, before)
    second.remove()
    first.load_state_dict(state)
    assert same_bits(model.weight[0], saving.weight[0])


def test_a_handle_is_attached_where_another_one_released_and_attached_its_part() -> None:
    for part_of in (lambda model: model, lambda model: model[0]):
        model: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        frozen = freeze_entries(model, "*.weight[0] = 1\n0.bias = 2")
        (part,) = FrozenEntries.of(part_of(model))
        part.remove()
        assert not frozen.attached
        part.attach()
        assert frozen.attached
        frozen.assert_frozen(guarded=False)
        _spoiled(model)
        model(torch.ones(1, 2))
        frozen.assert_frozen(guarded=False)
        frozen.remove()
        assert not part.attached
        part.attach()
        assert frozen.attached == (part_of(model) is model)
        frozen.attach()
        assert len(FrozenEntries.of(model)) == 1
        frozen.remove()
        assert all(not module._forward_pre_hooks for module in model.modules())


# --------------------------------------------------------------------------------------------------------------------
# Replaced modules


def _convolutions() -> Any:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4), nn.Linear(4, 2)
    )


def _sync(model: Any) -> None:
    model[0] = nn.SyncBatchNorm.convert_sync_batchnorm(model[0])


def _prepare_qat(model: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
        torch.ao.quantization.prepare_qat(model, inplace=True)


def _replace(model: Any) -> None:
    model[4] = nn.Linear(4, 2)


def _replace_around(model: Any) -> None:
    model[0] = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))


def _delete(model: Any) -> None:
    model[4] = nn.Identity()


def _share(model: Any) -> None:
    model[4] = nn.Linear(4, 2)
    model[4].weight = nn.Parameter(torch.ones(2, 4))


@pytest.mark.parametrize("change", [_sync, _prepare_qat, _replace, _replace_around, _delete, _share])
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "guarded"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "fresh"])
def test_a_step_after_a_module_was_replaced_or_converted_is_refused(change: Any, masked: bool, trained: bool) -> None:
    model = _convolutions()
    frozen = freeze_entries(model, "0.0.weight[center] = 0\n0.1.weight[0]\n3.weight[0] = 0.5\n4.weight[0] = 1")
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer: Any = MaskedOptimizer(inner, frozen) if masked else inner
    frozen.guard(inner)
    images = torch.ones(2, 1, 4, 4)
    if trained:
        model(images).sum().backward()
        optimizer.step()
    change(model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(ParameterChangedError, match=r"that owned `\d.* is no longer in the model; call remove"):
        optimizer.step()
    assert all(same_bits(a, b) for a, b in zip(before, model.parameters(), strict=True))
    frozen.remove()
    optimizer.step()


def test_steps_go_on_where_other_modules_come_and_go() -> None:
    model = _convolutions()
    frozen = freeze_entries(model, "0.0.weight[center] = 0\n3.weight[0] = 0.5")
    optimizer = MaskedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1), frozen)
    images = torch.ones(2, 1, 4, 4)
    for change in (lambda: None, lambda: _replace(model), lambda: model.append(nn.Linear(2, 2)), lambda: _wrap(model)):
        change()
        model(images).sum().backward()
        optimizer.step()
        frozen.assert_frozen()


def _wrap(model: Any) -> None:
    model[3] = nn.Sequential(model[3])


def test_a_step_looks_at_the_whole_model_only_where_a_module_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.Tanh()) for _ in range(5)))
    frozen = freeze_entries(model, "*.weight[0] = 0.5")
    optimizer = MaskedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), frozen)
    for _ in range(2):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    with monkeypatch.context() as patched:
        patched.setattr(nn.Module, "named_modules", None)
        optimizer.step()
    copy.deepcopy(optimizer)
    frozen.assert_frozen()


# --------------------------------------------------------------------------------------------------------------------
# Embeddings that rescale their rows in the forward


def _embedding(kind: str, **options: Any) -> Any:
    return nn.Embedding(6, 4, **options) if kind == "embedding" else nn.EmbeddingBag(6, 4, mode="sum", **options)


kinds = pytest.mark.parametrize("kind", ["embedding", "bag"])
TOKENS = torch.tensor([[0, 1, 2], [2, 1, 5]])


@kinds
@pytest.mark.parametrize("order", [2.0, 1.0, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_frozen_entries_hold_in_the_forward_of_an_embedding_with_max_norm(
    kind: str, order: float, dtype: torch.dtype
) -> None:
    model = nn.Sequential(_embedding(kind, max_norm=1.0, norm_type=order, dtype=dtype))
    spec = "0.weight[0] = 0.2\n0.weight[1, :2] = 0.3\n0.weight[2, ::2] = -0.0\n0.weight[3, 0] = 0.5"
    frozen = freeze_entries(model, spec)
    optimizer = MaskedOptimizer(torch.optim.SGD(model.parameters(), lr=5.0), frozen)
    mask, values = frozen["0.weight"].frozen, frozen["0.weight"].values.clone()
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda module, *args: seen.append(module.weight.detach().clone()))
    for _ in range(4):
        optimizer.zero_grad()
        model(TOKENS).square().sum().backward()
        optimizer.step()
    for weight in seen:  # as the lookup found it
        assert same_bits(weight[mask], values)
        assert bool((torch.linalg.vector_norm(weight[[0, 1, 2, 5]], order, dim=1) <= 1 + 1e-6).all())
    frozen.assert_frozen()


@kinds
def test_rows_without_frozen_entries_are_rescaled_as_without_freezing(kind: str) -> None:
    plain = _embedding(kind, max_norm=1.0)
    model = copy.deepcopy(plain)
    freeze_entries(model, "weight[0] = 0.1\nweight[1, 0] = 0")
    for embedding in (plain, model):
        embedding.weight.data[2:] = torch.arange(16.0).view(4, 4)
        embedding(input=TOKENS)
    assert same_bits(plain.weight[2:], model.weight[2:])


@kinds
@pytest.mark.parametrize("region", ["[3]", "[3, :2]", "[smallest(1.0)]"], ids=["row", "part_of_a_row", "all"])
@held_twice
def test_a_frozen_row_above_max_norm_is_refused_with_what_to_do(kind: str, region: str) -> None:
    embedding = _embedding(kind, max_norm=1.0)
    embedding.weight.data[:3], embedding.weight.data[3:] = 0.1, 2.0
    with pytest.raises(FrozenValueError, match=r"row 3 of `weight` have a norm of .* max_norm=1; hold values"):
        freeze_entries(embedding, f"weight{region}")
    freeze_entries(embedding, "weight[:3]")
    embedding.max_norm = None
    freeze_entries(embedding, f"weight{region}")


def test_a_row_that_is_loaded_above_max_norm_is_refused_where_it_is_looked_up() -> None:
    embedding = nn.Embedding(6, 4, max_norm=1.0)
    embedding.weight.data.fill_(0.1)
    freeze_entries(embedding, "weight[2]")
    embedding.load_state_dict({"weight": torch.full((6, 4), 2.0)})
    embedding(torch.tensor([0, 1]))
    with pytest.raises(FrozenValueError, match="row 2 of `weight` have a norm of 4, "):
        embedding(torch.tensor([1, 2]))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_compiled_embedding_with_max_norm_computes_with_the_values() -> None:
    torch.compiler.reset()
    embedding = nn.Embedding(6, 4, max_norm=1.0)
    frozen = freeze_entries(embedding, "weight[0, 0] = 0.5")
    compiled = torch.compile(embedding, backend="aot_eager")
    for _ in range(2):
        embedding.weight.data.fill_(3.0)
        assert compiled(torch.tensor([0]))[0, 0] == 0.5
    frozen.assert_frozen(guarded=False)


def test_two_handles_on_an_embedding_with_max_norm_rescale_what_neither_holds() -> None:
    embedding = nn.Embedding(2, 4, max_norm=1.0)
    handles = [freeze_entries(embedding, "weight[0, 0] = 0.5"), freeze_entries(embedding, "weight[0, 1] = -0.5")]
    embedding.weight.data.fill_(3.0)
    output = embedding(torch.tensor([0]))
    assert output[0, :2].tolist() == [0.5, -0.5]
    assert float(output.detach().norm()) == pytest.approx(1)
    for frozen in handles:
        frozen.assert_frozen(guarded=False)
        frozen.remove()
    assert not embedding._forward_pre_hooks


# --------------------------------------------------------------------------------------------------------------------
# Merged adapters, and graphs


def _merge(model: nn.Linear, delta: Tensor) -> None:
    model.weight.data += delta  # as peft does


def test_what_is_merged_into_a_frozen_base_stays_once_the_entries_are_released() -> None:
    model, delta = nn.Linear(4, 4), torch.ones(4, 4)
    frozen = freeze_entries(model, "weight[:2]")
    first = model.weight.detach().clone()
    _merge(model, delta)
    model(torch.ones(1, 4))
    assert same_bits(model.weight[:2], first[:2])
    frozen.impose()
    frozen.remove()
    model.weight.data.copy_(first)
    _merge(model, delta)
    model(torch.ones(1, 4))
    assert same_bits(model.weight, first + delta)


def test_low_rank_updates_are_merged_by_peft_after_the_entries_are_released() -> None:
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(4, 4))
    frozen = freeze_entries(base, "0.weight[:2]")
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["0"], r=2, init_lora_weights=False))
    images = torch.ones(1, 4)
    adapted.eval()
    expected = adapted(images)
    frozen.remove()
    merged = adapted.merge_and_unload()
    assert torch.allclose(merged(images), expected, atol=1e-6)


def test_a_frozen_model_is_not_graphed() -> None:
    model = nn.Linear(4, 4)
    freeze_entries(model, "weight[0] = 0")
    with pytest.raises((AssertionError, RuntimeError), match="must not have hooks"):  # which of them, torch decides
        torch.cuda.make_graphed_callables(model, (torch.ones(1, 4),))
