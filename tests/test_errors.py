"""Bad input raises an error with rule, found, expected and next step, and the model stays as it was."""

from __future__ import annotations

import copy
import math
import pickle
import re
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from freezehooks import (
    CheckpointError,
    DriftError,
    FreezeError,
    FrozenEntries,
    FrozenValueError,
    MaskedOptimizer,
    OptimizerMismatchError,
    ParameterChangedError,
    RegionError,
    Rule,
    RuleConflictError,
    RuleSyntaxError,
    SpecError,
    StateMismatchError,
    TargetError,
    UnguardedError,
    UnsupportedOptimizerError,
    UnsupportedParameterError,
    center,
    entries,
    freeze_entries,
    zeros,
)

# --------------------------------------------------------------------------------------------------------------------
# Models: the bad rule names `bad`, and `good` comes before it

GOOD: Final = "good.weight[0] = 5"


def _beside_good(bad: nn.Module) -> nn.Module:
    model = nn.ModuleDict({"good": nn.Linear(3, 2), "bad": bad})
    for parameter in model["good"].parameters():
        parameter.grad = torch.ones_like(parameter)
    return model


def _quietly(make: Callable[[], Any]) -> Any:
    """Make something without torch's warning that it is new or deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


class _Holder(nn.Module):
    """Owns one parameter, whatever it is."""

    def __init__(self, parameter: Tensor, **attributes: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(parameter, requires_grad=parameter.is_floating_point())
        for name, value in attributes.items():
            setattr(self.weight, name, value)


class FullyShardedDataParallel(nn.Module):
    """Imitates torch's class of this name, which needs a process group."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3))


class _Tied(nn.Module):
    """Has one weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(3, 4)
        self.second.weight = self.first.weight


def _pruned() -> nn.Module:
    from torch.nn.utils import prune

    linear = nn.Linear(3, 4)
    prune.l1_unstructured(linear, "weight", amount=0.5)
    return linear


_BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(3, 4),
    "half": lambda: nn.Linear(3, 4).half(),
    "conv": lambda: nn.Conv2d(2, 8, 3),
    "even": lambda: nn.Conv2d(2, 8, (3, 4)),
    "tied": _Tied,
    "complex": lambda: nn.Linear(3, 4, dtype=torch.complex64),
    "integer": lambda: _Holder(torch.ones(4, 3, dtype=torch.int64)),
    "quantized": lambda: _Holder(_quietly(lambda: torch.quantize_per_tensor(torch.ones(4, 3), 0.1, 0, torch.qint8))),
    "lazy": lambda: _quietly(lambda: nn.LazyLinear(4)),
    "meta": lambda: nn.Linear(3, 4, device="meta"),
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)),
    "old weight_norm": lambda: _quietly(lambda: nn.utils.weight_norm(nn.Linear(3, 4))),
    "old spectral_norm": lambda: _quietly(lambda: nn.utils.spectral_norm(nn.Linear(3, 4))),
    "pruned": _pruned,
    "fsdp1 flat": lambda: _Holder(torch.ones(12), _is_flat_param=True),
    "fsdp1": FullyShardedDataParallel,
    "zero": lambda: _Holder(torch.empty(0), ds_id=7, ds_shape=(4, 3)),
    "sparse": lambda: _Holder(torch.eye(4).to_sparse()),
    "expanded": lambda: _Holder(torch.ones(1, 3).expand(4, 3)),
}

# --------------------------------------------------------------------------------------------------------------------
# Errors for bad input


@dataclass(frozen=True)
class Case:
    """A spec that is wrong for a model, and texts that the error contains, in this order."""

    name: str
    model: str
    spec: Any
    error: type[FreezeError]
    says: tuple[str, ...]

    @property
    def pattern(self) -> str:
        return "^" + ".*".join(map(re.escape, self.says))


_MASK = torch.ones(4, 3, dtype=torch.bool)
_NAN = torch.tensor([0.0, math.nan, 0.0])
_ROW: Final = "rule `bad.weight[0] = keep`: "
_NORM: Final = "rule `bad.weight[0] = keep`: `bad.weight` is not a parameter: "

CASES = [
    # targets
    Case("unknown name", "linear", "bat.weight = 0", TargetError,
         ("rule `bat.weight = 0`: `bat.weight` is not a parameter of the model; did you mean ", "`bad.weight`")),
    Case("unknown attribute", "linear", "bad.bais = 0", TargetError,
         ("rule `bad.bais = 0`: `bad.bais` is not a parameter of the model; did you mean `bad.bias`",)),
    Case("module without a weight", "tied", "bad = 0", TargetError,
         ("rule `bad = 0`: `bad` is not a parameter of the model; did you mean ",)),
    Case("glob that matches nothing", "linear", "bad.*.weight[0]", TargetError,
         ("rule `bad.*.weight[0] = keep`: `bad.*.weight` matches no parameter; did you mean ", "`bad.weight`")),
    Case("glob with ? that matches nothing", "linear", "ba?d = 0", TargetError,
         ("rule `ba?d = 0`: `ba?d` matches no parameter; did you mean ",)),
    # regions
    Case("index out of range in text", "conv", "bad.weight[12] = 0", RegionError,
         ("rule `bad.weight[12] = 0`: index 12 is out of range for dimension 0 of size 8",
          "of shape (8, 2, 3, 3)", "; use 0 to 7")),
    Case("index out of range in Python", "conv", Rule("bad.weight", entries[..., -4], 0), RegionError,
         ("rule `bad.weight[..., -4] = 0`: index -4 is out of range for dimension 3 of size 3",
          "of shape (8, 2, 3, 3)", "; use 0 to 2")),
    Case("index out of range in a list", "conv", {"bad": entries[[0, 8]]}, RegionError,
         ("rule `bad[[0, 8]] = keep`: index 8 is out of range for dimension 0 of size 8",
          "parameter `bad.weight`", "; use 0 to 7")),
    Case("index of too many dimensions", "linear", "bad.weight[0, 0, 0]", RegionError,
         ("rule `bad.weight[0, 0, 0] = keep`: an index of 3 dimensions on a tensor of 2", "of shape (4, 3)")),
    Case("empty region", "linear", "bad.weight[4:] = 0", RegionError,
         ("rule `bad.weight[4:] = 0`: the region selects no entry", "; correct it, or leave the rule out")),
    Case("empty mask", "linear", {"bad.weight": (~_MASK, 0)}, RegionError,
         ("rule `bad.weight[<tensor of shape (4, 3)>] = 0`: the region selects no entry", "; correct it, or ")),
    Case("zeros where there are none", "meta", {"good.weight": zeros}, RegionError,
         ("rule `good.weight[zeros] = keep`: the region selects no entry", "; correct it, or leave the rule out")),
    Case("mask of another shape", "linear", {"bad.weight": _MASK.T}, RegionError,
         ("rule `bad.weight[<tensor of shape (3, 4)>] = keep`: a mask must have the parameter's shape (4, 3) or ",
          "found (3, 4)")),
    Case("mask of another dtype", "linear", {"bad.weight": _MASK.float()}, RegionError,
         ("rule `bad.weight[<tensor of shape (4, 3)>] = keep`: a mask must be a bool tensor, found dtype torch.float32",
          "; give `mask == 1` if 1 means frozen, `mask == 0` if 1 means trained")),
    Case("mask as nested lists", "linear", {"bad.weight": [[True, False, True]] * 4}, SpecError,
         ("a mask must be a bool tensor, found the list [[True", "; give torch.tensor(mask, dtype=torch.bool)")),
    Case("function to a mask of another shape", "linear", {"bad.weight": lambda parameter: _MASK.T}, RegionError,
         ("rule `bad.weight[<<lambda>>] = keep`: a mask must have the parameter's shape (4, 3) or that of",)),
    Case("array of numbers", "linear", {"bad.weight": 2 * np.ones((4, 3))}, RegionError,
         ("rule `bad.weight[<ndarray of shape (4, 3)>] = keep`: a mask must be a bool tensor, found "
          "dtype torch.float64",
          "; give True where an entry is frozen, as in `weight.abs() < 0.1`")),
    Case("region that is none", "linear", {"bad.weight": 0}, SpecError,
         ("rule `bad.weight[<int>] = keep`: a region is an index, a pattern, a bool tensor or a function, found int",
          "; write `freezehooks.entries[...]` for an index")),
    Case("center of an even kernel", "even", "bad.weight[center] = 0", RegionError,
         ("rule `bad.weight[center] = 0`: pattern `center` needs a kernel of odd size, found 3x4",
          "of shape (8, 2, 3, 4)", "; write the entries as an index")),
    Case("center of a matrix", "linear", "bad[center] = 0", RegionError,
         ("rule `bad[center] = 0`: pattern `center` needs a convolution weight (out, in/groups, *kernel), found 2 ",
          "; name only the convolutions, or write an index")),
    Case("triu of a vector", "linear", "bad.bias[triu(1)] = 0", RegionError,
         ("rule `bad.bias[triu(1)] = 0`: pattern `triu` needs a tensor of 2 or more dimensions, found 1",)),
    # values
    Case("value of another shape", "linear", Rule("bad.weight", entries[0], torch.ones(4)), FrozenValueError,
         ("rule `bad.weight[0] = <tensor of shape (4,)>`: a value of shape (4,) does not fit the region of shape (3,)",
          "; give a number, a tensor that broadcasts to the region's shape, or one of shape (4, 3)")),
    Case("value infinite as float16", "half", "bad.weight[0] = 1e5", FrozenValueError,
         ("rule `bad.weight[0] = 100000`: the value 100000 is not finite as torch.float16",
          "; give a value that the parameter's dtype can hold")),
    Case("tensor infinite as float16", "half", {"bad.weight": (entries[0], torch.full((3,), -7e4))}, FrozenValueError,
         ("rule `bad.weight[0] = <tensor of shape (3,)>`: the value -70000 is not finite as torch.float16",
          "; give a value that the parameter's dtype can hold")),
    Case("tensor with nan", "linear", {"bad.weight": (entries[0], _NAN)}, FrozenValueError,
         ("rule `bad.weight[0] = <tensor of shape (3,)>`: the value nan is not finite as torch.float32",
          "; give a value that the parameter's dtype can hold")),
    Case("infinite number", "linear", {"bad.weight": (entries[0], math.inf)}, FrozenValueError,
         ("the value of `bad.weight` must be finite, found inf",)),
    Case("number too large for a float", "linear", {"bad.weight": (entries[0], 10**400)}, FrozenValueError,
         ("the value of `bad.weight` must be finite, found",)),
    Case("complex value of a real parameter", "linear", {"bad": (entries[0], torch.ones(3) * 1j)}, FrozenValueError,
         ("rule `bad[0] = <tensor of shape (3,)>`: a complex value for a parameter of torch.float32",
          "; give its real part")),
    Case("list of too few values", "linear", {"bad": (entries[0], [1.0, 2.0])}, FrozenValueError,
         ("rule `bad[0] = [1, 2]`: a value of shape (2,) does not fit the region of shape (3,)", "; give a number")),
    Case("list of words", "linear", {"bad": (entries[0], ["a"])}, FrozenValueError,
         ("a list of values must hold numbers, found str", "; give finite numbers")),
    Case("truth as a value", "linear", {"bad": (entries[0], True)}, SpecError,
         ("rule `bad[0] = <bool>`: a value is a number, a list of numbers, `keep` or a tensor, found bool",)),
    # rules that disagree
    Case("two rules that disagree", "linear", "bad.weight[0] = 0\nbad.weight[:, 1] = 1", RuleConflictError,
         ("rules `bad.weight[0] = 0` and `bad.weight[:, 1] = 1` disagree about entry [0, 1] of `bad.weight`",
          "; make their regions disjoint, or their values equal")),
    Case("keep against a number", "linear", ["bad.weight[1]", "bad.* = 1"], RuleConflictError,
         ("rules `bad.weight[1] = keep` and `bad.* = 1` disagree about entry [1, 0] of `bad.weight`", "; make their")),
    Case("tied parameter under two names", "tied", "bad.first = 0\nbad.second[0] = 1", RuleConflictError,
         ("rules `bad.first = 0` and `bad.second[0] = 1` disagree about entry [0, 0] of `bad.first.weight`", "; make")),
    Case("third against second rule", "linear", "bad[0] = 0\nbad[1] = 1\nbad[1:3] = 2", RuleConflictError,
         ("rules `bad[1] = 1` and `bad[1:3] = 2` disagree about entry [1, 0] of `bad.weight`", "; make their")),
    Case("zero against minus zero", "linear", "bad.weight[0] = 0\nbad.weight[0] = -0.0", RuleConflictError,
         ("rules `bad.weight[0] = 0` and `bad.weight[0] = -0` disagree about entry [0, 0] of `bad.weight`", "; make")),
    # parameters that cannot be held
    Case("integer parameter", "integer", "bad.weight[0]", UnsupportedParameterError,
         (_ROW, "holds torch.int64, which no optimizer trains", "; name floating-point parameters only")),
    Case("quantized parameter", "quantized", "bad.weight[0]", UnsupportedParameterError,
         (_ROW, "holds torch.qint8, which no optimizer trains", "; name floating-point parameters only")),
    Case("lazy parameter", "lazy", "bad.weight[0]", UnsupportedParameterError,
         (_ROW, "the parameter is lazy and has no shape yet", "; run one forward first, then freeze")),
    Case("meta parameter", "meta", "bad.weight[0]", UnsupportedParameterError,
         (_ROW, "the parameter is on the meta device and has no numbers yet", "; materialize it, then freeze")),
    Case("weight_norm", "weight_norm", "bad.weight[0]", UnsupportedParameterError,
         (_NORM, "it is parametrized, so it is computed at every access", "; remove the parametrization",
          "or freeze `bad.parametrizations.weight.*`")),
    Case("spectral_norm by its module's name", "spectral_norm", "bad[0]", UnsupportedParameterError,
         ("rule `bad[0] = keep`: `bad.weight` is not a parameter: it is parametrized", "; remove the parametrization")),
    Case("weight_norm in a glob", "weight_norm", "bad.*", UnsupportedParameterError,
         ("rule `bad.* = keep`: `bad.weight` is not a parameter: it is parametrized", "; remove the parametrization")),
    Case("older weight_norm", "old weight_norm", "bad.weight[0]", UnsupportedParameterError,
         (_NORM, "a hook computes it from `bad.weight_v`", "; remove that hook", "or freeze `bad.weight_v`")),
    Case("older spectral_norm", "old spectral_norm", "bad.weight[0]", UnsupportedParameterError,
         (_NORM, "a hook computes it from `bad.weight_orig`", "; remove that hook", "or freeze `bad.weight_orig`")),
    Case("pruned tensor", "pruned", "bad.weight[0]", UnsupportedParameterError,
         (_NORM, "a hook computes it from `bad.weight_orig`", "; remove that hook", "torch.nn.utils.prune.remove")),
    Case("FSDP1 flat parameter", "fsdp1 flat", "bad.weight[0]", UnsupportedParameterError,
         (_ROW, "the parameter is of FSDP1, which joins many tensors", "; use FSDP2")),
    Case("model wrapped in FSDP1", "fsdp1", "bad.weight[0]", UnsupportedParameterError,
         ("the model is wrapped in FSDP1 (FullyShardedDataParallel)", "; use FSDP2")),
    Case("ZeRO-partitioned parameter", "zero", "bad.weight[0]", UnsupportedParameterError,
         (_ROW, "the parameter is one of DeepSpeed ZeRO, which steps copies", "; use FSDP2")),
    Case("sparse parameter", "sparse", "bad.weight[0]", UnsupportedParameterError,
         (_ROW, "the parameter's layout is torch.sparse_coo", "; only dense (strided) parameters can be held")),
    Case("expanded parameter", "expanded", "bad.weight[0]", UnsupportedParameterError,
         (_ROW, "the parameter is expanded", "; make it contiguous first")),
    # specs
    Case("text that does not parse", "linear", "bad.weight[0 = 1", RuleSyntaxError,
         ("rule `bad.weight[0 = 1`: column 14: expected `]` to close the region, found `=`",)),
    Case("value that does not parse", "linear", "bad.weight[0] = one", RuleSyntaxError,
         ("rule `bad.weight[0] = one`: column 17: expected a value: a number, a list of numbers, "
          "`keep` or `tied(dim)`, found `one`",)),
    Case("pattern that is none", "linear", "bad.weight[middle]", RuleSyntaxError,
         ("rule `bad.weight[middle]`: column 12: unknown pattern `middle`; use one of center, cross, ",)),
    Case("spec of another kind", "linear", 7, SpecError,
         ("`spec` must be text, a Rule, a mapping or an iterable of those, found int; write ",)),
    Case("None as a part of a spec", "linear", [None], SpecError,
         ("`spec` must be text, a Rule, a mapping or an iterable of those, found NoneType; write ",)),
    Case("target that is no name", "linear", {3: center}, SpecError,
         ("a target is a parameter's name without spaces, brackets, `=` or `#`, found 3; write ",)),
]  # fmt: skip

_BUILTINS: dict[type[FreezeError], type[Exception]] = {
    RuleSyntaxError: ValueError,
    SpecError: TypeError,
    TargetError: KeyError,
    RegionError: ValueError,
    FrozenValueError: ValueError,
    RuleConflictError: ValueError,
    UnsupportedParameterError: TypeError,
    OptimizerMismatchError: ValueError,
    UnguardedError: RuntimeError,
    UnsupportedOptimizerError: TypeError,
    ParameterChangedError: RuntimeError,
    StateMismatchError: RuntimeError,
    CheckpointError: ValueError,
    DriftError: RuntimeError,
}

cases = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


def _model_of(case: Case) -> nn.Module:
    return _beside_good(_BUILDERS[case.model]())


def _bytes(tensor: Tensor | None) -> Any:
    """The numbers of a tensor to the last bit, if it has any."""
    if tensor is None or nn.parameter.is_lazy(tensor) or tensor.is_meta:
        return type(tensor)
    plain = tensor.detach().int_repr() if tensor.is_quantized else tensor.detach()
    plain = plain.to_dense() if plain.layout != torch.strided else plain
    return plain.contiguous().flatten().view(torch.uint8).tolist()


def _hooks(owner: Any) -> dict[str, list[int]]:
    """Which hooks an object carries, of every kind there is."""
    names = sorted(name for name in {*dir(type(owner)), *vars(owner)} if re.fullmatch(r"_.*hooks", name))
    with torch._C.DisableTorchFunctionSubclass():  # lazy parameters refuse every look
        kinds = {name: getattr(owner, name, None) for name in names}
    return {name: [id(hook) for hook in hooks.values()] for name, hooks in kinds.items() if isinstance(hooks, dict)}


def _footprint(model: nn.Module) -> list[Any]:
    """Everything freezing may touch: attributes and hooks of modules and parameters, numbers, gradients, buffers."""
    modules = [(sorted(vars(module)), _hooks(module)) for module in model.modules()]
    parameters = [
        (name, id(parameter), sorted(vars(parameter)), _hooks(parameter), _bytes(parameter), _bytes(parameter.grad))
        for name, parameter in model.named_parameters(remove_duplicate=False)
    ]
    return [modules, parameters, [_bytes(buffer) for buffer in model.buffers()]]


@cases
def test_bad_input_gets_a_named_error_that_says_rule_found_and_expected(case: Case) -> None:
    with pytest.raises(case.error, match=case.pattern) as raised:
        freeze_entries(_model_of(case), case.spec)
    assert type(raised.value) is case.error
    assert isinstance(raised.value, _BUILTINS[case.error])


@cases
def test_the_error_says_the_next_step(case: Case) -> None:
    with pytest.raises(case.error, match=r"; \w"):
        freeze_entries(_model_of(case), case.spec)


@cases
@pytest.mark.parametrize("order", ["alone", "after a good rule", "before a good rule"])
def test_nothing_is_installed_or_changed_where_any_rule_is_wrong(case: Case, order: str) -> None:
    model = _model_of(case)
    before = _footprint(model)
    spec = {"alone": case.spec, "after a good rule": [GOOD, case.spec], "before a good rule": [case.spec, GOOD]}[order]
    with pytest.raises(case.error, match=case.pattern):
        freeze_entries(model, spec)
    assert _footprint(model) == before
    assert FrozenEntries.of(model) == ()


def test_the_footprint_shows_what_freezing_leaves() -> None:
    """The check of the test above: it would see a hook, a number or a gradient that was left behind."""
    model = _beside_good(nn.Linear(3, 4))
    before = _footprint(model)
    frozen = freeze_entries(model, GOOD)
    (modules, parameters, _), (modules_before, parameters_before, _) = _footprint(model), before
    assert modules != modules_before
    changed = [now for now, then in zip(parameters[0], parameters_before[0], strict=True) if now != then]
    assert len(changed) == 3  # hooks, numbers, gradient
    frozen.remove()
    assert _footprint(model)[0] == modules_before


@pytest.mark.parametrize("name", [name for name in _BUILDERS if name != "fsdp1"])
def test_a_parameter_that_cannot_be_held_does_not_stop_rules_for_others(name: str) -> None:
    model = _beside_good(_BUILDERS[name]())
    freeze_entries(model, GOOD).assert_frozen(guarded=False)
    assert bool((model.get_parameter("good.weight")[0] == 5).all())


@pytest.mark.parametrize("name", ["weight_v", "query_v", "scale_orig"])
def test_a_parameter_s_own_name_may_end_like_those_that_older_hooks_give(name: str) -> None:
    model = nn.ModuleDict({"good": nn.Linear(3, 2)})
    model["good"].register_parameter(name, nn.Parameter(torch.ones(2)))
    frozen = freeze_entries(model, "good.* = 1")
    assert set(frozen) == {"good.weight", "good.bias", f"good.{name}"}


def test_an_error_of_a_region_s_own_function_leaves_nothing_behind() -> None:
    model = _beside_good(nn.Linear(3, 4))
    before = _footprint(model)
    with pytest.raises(ZeroDivisionError):
        freeze_entries(model, [GOOD, {"bad.weight": lambda parameter: 1 / 0}])
    assert _footprint(model) == before


def test_rules_that_disagree_with_another_handle_leave_that_one_as_it_was() -> None:
    model = _beside_good(nn.Linear(3, 4))
    frozen = freeze_entries(model, GOOD)
    before = _footprint(model)
    message = (
        "rules `good.weight[0] = 5` and `good.weight[:, 0] = 6` disagree about entry [0, 0] of `good.weight`; make"
    )
    with pytest.raises(RuleConflictError, match=re.escape(message)):
        freeze_entries(model, "bad.weight[0] = 1\ngood.weight[:, 0] = 6")
    assert _footprint(model) == before
    frozen.assert_frozen(guarded=False)


# --------------------------------------------------------------------------------------------------------------------
# Things that are not models, and mappings of bare tensors


@pytest.mark.parametrize("model", [None, "conv.weight", [nn.Linear(1, 1)], nn.Linear], ids=lambda m: type(m).__name__)
def test_a_model_is_a_module_or_a_mapping(model: Any) -> None:
    message = f"`model` must be a module or a mapping from name to tensor, found {type(model).__name__}; call"
    with pytest.raises(SpecError, match=re.escape(message)):
        freeze_entries(model, "weight[0] = 0")


_ITEM: Final = "`model` must be a module or a mapping from name to tensor, found the item "


@pytest.mark.parametrize(
    ("tensor", "error", "says"),
    [
        (3, SpecError, (f"{_ITEM}'w': int", "; give leaf tensors by name")),
        (None, SpecError, (f"{_ITEM}'w': NoneType", "; give leaf tensors by name")),
        (torch.ones(3, requires_grad=True) * 2, UnsupportedParameterError,
         ("rule `w[0] = 0`: ", "the tensor is computed from others (it has a grad_fn)", "; name the leaf tensors")),
        (torch.ones(3, dtype=torch.bool), UnsupportedParameterError, ("rule `w[0] = 0`: ", "holds torch.bool")),
        (torch.tensor(1.0), RegionError, ("rule `w[0] = 0`: an index of 1 dimension on a tensor of 0", "of shape ()")),
    ],
    ids=["number", "None", "computed", "bool", "no dimensions"],
)  # fmt: skip
def test_a_mapping_holds_leaf_tensors(tensor: Any, error: type[FreezeError], says: tuple[str, ...]) -> None:
    good = torch.ones(3, requires_grad=True)
    good.grad = torch.ones(3)
    with pytest.raises(error, match=".*".join(map(re.escape, says))):
        freeze_entries({"good": good, "w": tensor}, "good[0] = 5\nw[0] = 0")
    assert good.tolist() == good.grad.tolist() == [1, 1, 1]
    assert not good._post_accumulate_grad_hooks  # type: ignore[attr-defined]  # undeclared


def test_a_mapping_s_keys_are_names() -> None:
    with pytest.raises(SpecError, match=re.escape(f"{_ITEM}0: Tensor; give leaf tensors by name")):
        freeze_entries({0: torch.ones(3)}, "")  # type: ignore[dict-item]  # what is tested


def test_a_name_that_a_mapping_lacks_is_named_with_the_closest() -> None:
    with pytest.raises(
        TargetError, match=r"^rule `wieght = keep`: `wieght` is not a parameter .*; did you mean `weight`\?"
    ):
        freeze_entries({"weight": torch.ones(3)}, "wieght")
    with pytest.raises(
        TargetError, match=r"^rule `w = keep`: `w` is not a parameter of the model; the model has no param"
    ):
        freeze_entries({}, "w")


# --------------------------------------------------------------------------------------------------------------------
# Optimizers


def _trained(model: nn.Module, *kinds: str) -> Optimizer:
    """Return an optimizer of some parts of a model, with momentum in its state."""
    parameters = [parameter for kind in kinds for parameter in model.get_submodule(kind).parameters()]
    optimizer = SGD(parameters, lr=0.1, momentum=0.9)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def _state_of(optimizer: Optimizer) -> list[Any]:
    state = [{key: _bytes(value) for key, value in values.items()} for values in optimizer.state.values()]
    return [_hooks(optimizer), sorted(vars(optimizer)), state]


@pytest.mark.parametrize(
    "spec",
    [GOOD, Rule("good.weight", entries[0]), {"good.weight": entries[0]}, [GOOD], [Rule("good")], 0, None, center],
    ids=["text", "rule", "mapping", "list of texts", "list of rules", "number", "None", "region"],
)
def test_a_spec_in_place_of_a_handle_is_refused(spec: Any) -> None:
    model = _beside_good(nn.Linear(3, 4))
    optimizer = _trained(model, "good")
    before = _footprint(model), _state_of(optimizer)
    message = "`frozen` must be a handle or a sequence of them, found "
    with pytest.raises(SpecError, match=f"^{message}.*; pass what freeze_entries\\(model, spec\\) returned$"):
        MaskedOptimizer(optimizer, spec)
    assert (_footprint(model), _state_of(optimizer)) == before
    frozen = freeze_entries(model, GOOD)
    before = _footprint(model), _state_of(optimizer)
    with pytest.raises(SpecError, match=message):
        MaskedOptimizer(optimizer, [frozen, spec])
    assert (_footprint(model), _state_of(optimizer)) == before


@pytest.mark.parametrize("optimizer", [None, SGD, nn.Linear(1, 1), [torch.ones(1)]], ids=lambda o: type(o).__name__)
def test_what_is_no_optimizer_is_refused(optimizer: Any) -> None:
    frozen = freeze_entries(_beside_good(nn.Linear(3, 4)), GOOD)
    message = f"^`optimizer` must be a torch.optim.Optimizer, found {type(optimizer).__name__}"
    with pytest.raises(SpecError, match=message):
        MaskedOptimizer(optimizer, frozen)
    with pytest.raises(SpecError, match=message):
        frozen.guard(optimizer)


_HOLDS_NONE: Final = re.escape(
    "`SGD` steps none of the frozen parameters (good.weight); build it from the parameters of the model that was frozen"
)


@pytest.mark.parametrize("wrap", [MaskedOptimizer, lambda optimizer, frozen: frozen.guard(optimizer)], ids=["wrap", "guard"])  # noqa: E501  # fmt: skip
def test_an_optimizer_of_other_parameters_is_refused(wrap: Callable[[Optimizer, FrozenEntries], Any]) -> None:
    model = _beside_good(nn.Linear(3, 4))
    frozen = freeze_entries(model, GOOD)
    optimizer = _trained(model, "bad")
    before = _footprint(model), _state_of(optimizer)
    with pytest.raises(OptimizerMismatchError, match=f"^{_HOLDS_NONE}") as raised:
        wrap(optimizer, frozen)
    assert isinstance(raised.value, ValueError)
    frozen.remove()
    frozen.attach()  # which would install a guard that was kept
    assert _state_of(optimizer) == before[1]
    assert _footprint(model)[1][-1] == before[0][1][-1]


def test_one_handle_that_does_not_fit_leaves_the_optimizer_without_the_others_hooks() -> None:
    model = _beside_good(nn.Linear(3, 4))
    fitting, other = freeze_entries(model, "bad.weight[0] = 1"), freeze_entries(model, GOOD)
    optimizer = _trained(model, "bad")
    before = _state_of(optimizer)
    with pytest.raises(OptimizerMismatchError, match=_HOLDS_NONE):
        MaskedOptimizer(optimizer, [fitting, other])
    assert _state_of(optimizer) == before


def test_an_optimizer_of_a_copied_model_is_refused() -> None:
    model = nn.Linear(3, 2)
    frozen = freeze_entries(model, "weight[0] = 0")
    with pytest.raises(OptimizerMismatchError, match=r"^`AdamW` steps none .*after moving or copying that model$"):
        MaskedOptimizer(AdamW(copy.deepcopy(model).parameters()), frozen)


# --------------------------------------------------------------------------------------------------------------------
# The errors themselves

every_error = pytest.mark.parametrize("error", _BUILTINS, ids=lambda error: error.__name__)


def test_every_error_is_in_the_table() -> None:
    assert set(FreezeError.__subclasses__()) == set(_BUILTINS)


@every_error
def test_an_error_is_a_freeze_error_and_the_builtin_that_fits(error: type[FreezeError]) -> None:
    assert error.__bases__ == (FreezeError, _BUILTINS[error])


@every_error
def test_an_error_prints_its_fact_and_its_advice_without_quotes(error: type[FreezeError]) -> None:
    raised = error("`a` is 'odd'", "make it even")
    assert str(raised) == "`a` is 'odd'; make it even"
    assert str(error("`a` is 'odd'")) == "`a` is 'odd'"
    printed = "".join(traceback.format_exception_only(raised))
    assert printed.endswith(f"{error.__name__}: `a` is 'odd'; make it even\n")


@every_error
def test_context_goes_before_the_fact_and_detail_behind_it(error: type[FreezeError]) -> None:
    raised = error("it is odd", "make it even")
    assert str(raised.within("rule `a`")) == "rule `a`: it is odd; make it even"
    assert str(raised.within("rule `a`", "of 3")) == "rule `a`: it is odd (of 3); make it even"
    assert type(raised.within("rule `a`")) is error


@every_error
@pytest.mark.parametrize("again", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy, copy.deepcopy], ids=["pickle", "copy", "deepcopy"])  # noqa: E501  # fmt: skip
def test_an_error_keeps_its_message_through_a_copy(error: type[FreezeError], again: Callable[[Any], Any]) -> None:
    raised = error("it is odd", "make it even").within("rule `a`", "of 3")
    copied = again(raised)
    assert type(copied) is error
    assert str(copied) == str(raised)
    assert (copied.fact, copied.advice) == (raised.fact, raised.advice)
