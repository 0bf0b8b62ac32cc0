"""The audit: what is reported, when `assert_frozen` raises, what trains."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.optim import LBFGS, SGD, Adam, AdamW

from freezehooks import (
    DriftError,
    FrozenEntries,
    MaskedOptimizer,
    ParameterChangedError,
    Rule,
    UnguardedError,
    freeze_entries,
)
from freezehooks._held.held import HeldParameters

from .claims import held_twice

HOOKS = ("gradient", "forward", "saving")
SPEC = "0.weight[center] = 0\n2.weight[0] = keep\n2.bias = 1"


def _model() -> Any:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(27, 2))


def _guarded(spec: str = SPEC) -> tuple[Any, FrozenEntries, Any]:
    model = _model()
    frozen = freeze_entries(model, spec)
    return model, frozen, MaskedOptimizer(AdamW(model.parameters(), weight_decay=0.5), frozen)


# What is missing


def test_a_guarded_model_lacks_nothing() -> None:
    model, frozen, optimizer = _guarded()
    frozen.assert_frozen()
    model(torch.ones(2, 2, 5, 5)).sum().backward()
    optimizer.step()
    frozen.assert_frozen()
    assert frozen.report().holds


def test_without_a_guarded_optimizer_the_check_fails() -> None:
    model = _model()
    frozen = freeze_entries(model, SPEC)
    with pytest.raises(UnguardedError, match=r"missing is a guarded optimizer of `0\.weight`, `2\.weight`, `2\.bias`"):
        frozen.assert_frozen()
    frozen.assert_frozen(guarded=False)


def test_an_optimizer_of_some_parameters_does_not_guard_the_others() -> None:
    model = _model()
    frozen = freeze_entries(model, SPEC)
    optimizer = SGD(model[2].parameters(), lr=0.1)
    frozen.guard(optimizer)
    with pytest.raises(UnguardedError, match=r"missing is a guarded optimizer of `0\.weight`; guard every optimizer"):
        frozen.assert_frozen()


def test_a_parameter_without_gradient_needs_neither_gradient_hook_nor_optimizer() -> None:
    model = _model().requires_grad_(False)
    frozen = freeze_entries(model, SPEC)
    frozen.assert_frozen()
    assert frozen.report().parts["2.bias"].missing == ()
    model.requires_grad_(True)
    with pytest.raises(UnguardedError, match="the gradient hook, a guarded optimizer of"):
        frozen.assert_frozen()


def test_an_optimizer_that_is_gone_guards_no_longer() -> None:
    _, frozen, optimizer = _guarded()
    del optimizer
    with pytest.raises(UnguardedError, match="a guarded optimizer"):
        frozen.assert_frozen()


def _strip_gradient(model: Any, optimizer: Any) -> None:
    model[2].weight._post_accumulate_grad_hooks.clear()


def _strip_forward(model: Any, optimizer: Any) -> None:
    model[2]._forward_pre_hooks.clear()


def _replace_forward(model: Any, optimizer: Any) -> None:
    model[2]._forward_pre_hooks = type(model[2]._forward_pre_hooks)()


def _strip_saving(model: Any, optimizer: Any) -> None:
    model[2]._state_dict_pre_hooks.clear()


def _strip_loading(model: Any, optimizer: Any) -> None:
    model[2]._load_state_dict_post_hooks.clear()


def _strip_before_loading(model: Any, optimizer: Any) -> None:
    model[2]._load_state_dict_pre_hooks.clear()


def _strip_step(model: Any, optimizer: Any) -> None:
    optimizer.inner._optimizer_step_post_hooks.clear()


def _strip_before_step(model: Any, optimizer: Any) -> None:
    optimizer.inner._optimizer_step_pre_hooks.clear()


STRIPPED = {
    _strip_gradient: "the gradient hook of `2.weight`",
    _strip_forward: "the forward hook of `2.weight`, `2.bias`",
    _replace_forward: "the forward hook of `2.weight`, `2.bias`",
    _strip_saving: "a hook for saving or loading of `2.weight`, `2.bias`",
    _strip_loading: "a hook for saving or loading of `2.weight`, `2.bias`",
    _strip_before_loading: "a hook for saving or loading of `2.weight`, `2.bias`",
    _strip_step: "a guarded optimizer of `0.weight`, `2.weight`, `2.bias`",
    _strip_before_step: "a guarded optimizer of `0.weight`, `2.weight`, `2.bias`",
}


@pytest.mark.parametrize(("strip", "missing"), STRIPPED.items(), ids=[strip.__name__ for strip in STRIPPED])
def test_a_stripped_hook_is_missed_and_can_be_put_on_again(strip: Callable[[Any, Any], None], missing: str) -> None:
    model, frozen, optimizer = _guarded()
    strip(model, optimizer)
    with pytest.raises(UnguardedError) as caught:
        frozen.assert_frozen()
    assert caught.value.fact == f"frozen entries are held only in part: missing is {missing}"
    frozen.remove()
    frozen.attach()
    frozen.assert_frozen()


class _Scales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(3))])

    def forward(self, values: torch.Tensor) -> Any:
        return self.scales[0] * values


@pytest.mark.parametrize(
    ("make", "target"),
    [(lambda: nn.MultiheadAttention(4, 1), "out_proj.weight"), (_Scales, "scales.0")],
    ids=["attention", "container"],
)
def test_the_hook_of_a_module_that_computes_with_the_parameters_of_another_is_missed(
    make: Callable[[], nn.Module], target: str
) -> None:
    model = make()
    frozen = freeze_entries(model, f"{target}[0] = 1")
    frozen.assert_frozen(guarded=False)
    model._forward_pre_hooks.clear()
    with pytest.raises(UnguardedError, match=rf"missing is the forward hook of `{re.escape(target)}`"):
        frozen.assert_frozen(guarded=False)
    frozen.remove()
    frozen.attach()
    frozen.assert_frozen(guarded=False)


def test_hooks_in_a_dict_that_the_optimizer_no_longer_reads_do_not_guard() -> None:
    _, frozen, optimizer = _guarded()
    before = optimizer.inner._optimizer_step_post_hooks
    optimizer.inner._optimizer_step_post_hooks = type(before)()
    with pytest.raises(UnguardedError, match="a guarded optimizer"):
        frozen.assert_frozen()
    assert before


def test_hooks_that_were_copied_to_another_dict_guard() -> None:
    _, frozen, optimizer = _guarded()
    optimizer.inner._optimizer_step_post_hooks = copy.copy(optimizer.inner._optimizer_step_post_hooks)
    frozen.assert_frozen()


class _Unhooked(SGD):
    def __init__(self, inner: SGD) -> None:  # as some wrappers do: without the `Optimizer.__init__` that hooks `step`
        vars(self).update(vars(inner))
        self._optimizer_step_pre_hooks = type(inner._optimizer_step_pre_hooks)()
        self._optimizer_step_post_hooks = type(inner._optimizer_step_post_hooks)()

    def step(self, closure: Any = None) -> Any:
        return None


class _HookedBelow(_Unhooked):
    def step(self, closure: Any = None) -> Any:
        return SGD.step(self, closure)


def test_an_optimizer_whose_step_calls_no_hooks_does_not_guard() -> None:
    model = nn.Linear(3, 2)
    frozen = freeze_entries(model, "weight[0] = 1")
    optimizer = _Unhooked(SGD(model.parameters(), lr=0.1))
    frozen.guard(optimizer)
    optimizer.step()
    with pytest.raises(UnguardedError, match="a guarded optimizer"):
        frozen.assert_frozen()


def test_an_optimizer_whose_step_calls_hooks_by_a_detour_guards_once_it_was_seen_to() -> None:
    model = nn.Linear(3, 2)
    frozen = freeze_entries(model, "weight[0] = 1")
    optimizer = _HookedBelow(SGD(model.parameters(), lr=0.1))
    frozen.guard(optimizer)
    optimizer.step()
    frozen.assert_frozen()


class _Stepping(SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def _plain(optimizer: Any, frozen: FrozenEntries) -> Any:
    frozen.guard(optimizer)
    return optimizer


def _scheduled(optimizer: Any) -> Any:
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # it puts a `step` of its own on the optimizer
    return optimizer


WRAPPED: dict[str, Callable[[Any, FrozenEntries], Any]] = {
    "masked": lambda parameters, frozen: MaskedOptimizer(AdamW(parameters), frozen),
    "compact": lambda parameters, frozen: MaskedOptimizer(AdamW(parameters), frozen, compact=True),
    "compact LBFGS": lambda parameters, frozen: MaskedOptimizer(LBFGS(parameters), frozen, compact=True),
    "scheduled": lambda parameters, frozen: _scheduled(_plain(AdamW(parameters), frozen)),
    "masked, scheduled": lambda parameters, frozen: _scheduled(MaskedOptimizer(AdamW(parameters), frozen)),
    "overriding": lambda parameters, frozen: _plain(_Stepping(parameters), frozen),
}


@pytest.mark.parametrize("make", WRAPPED.values(), ids=WRAPPED)
def test_no_wrapper_of_a_guarded_step_raises_a_false_alarm(make: Callable[[Any, FrozenEntries], Any]) -> None:
    model = _model()
    frozen = freeze_entries(model, SPEC)
    held = list(model.parameters())
    optimizer = make(held, frozen)
    frozen.assert_frozen()

    def closure() -> Any:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 2, 5, 5)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    frozen.assert_frozen()


def test_another_model_whose_parameter_is_gone_does_not_answer_for_this_one() -> None:
    other = nn.Linear(3, 2)
    lost = freeze_entries(other, "weight[0] = 1")
    optimizers = [SGD(other.parameters(), lr=0.1)]
    lost.guard(optimizers[0])
    del other.weight
    _, frozen, optimizer = _guarded()
    frozen.assert_frozen()
    assert frozen.report().holds
    del optimizer
    with pytest.raises(UnguardedError, match="a guarded optimizer"):
        frozen.assert_frozen()


def test_a_handle_is_asked_once_for_what_it_holds_however_many_optimizers_it_guards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = _model()
    frozen = freeze_entries(model, SPEC)
    optimizers = [SGD([parameter], lr=0.1) for parameter in (model[0].weight, model[2].weight, model[2].bias)]
    for optimizer in optimizers:
        frozen.guard(optimizer)
    asked: list[HeldParameters] = []
    held = HeldParameters.__iter__

    def counted(parameters: HeldParameters) -> Any:
        asked.append(parameters)
        return held(parameters)

    monkeypatch.setattr(HeldParameters, "__iter__", counted)
    frozen.assert_frozen()
    assert len(asked) == 1


def test_a_tied_name_that_became_a_tensor_of_its_own_needs_an_optimizer_too() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    frozen = freeze_entries(model, "0.weight[0] = 1")
    optimizer = MaskedOptimizer(SGD(model.parameters(), lr=0.1), frozen)
    frozen.assert_frozen()
    model[1].weight = nn.Parameter(model[1].weight.detach().clone())
    model(torch.ones(1, 3))  # which renews the gradient hook
    with pytest.raises(UnguardedError, match=r"missing is a guarded optimizer of `0\.weight`"):
        frozen.assert_frozen()
    model[1].weight.requires_grad_(False)
    frozen.assert_frozen()
    del optimizer


class _Untouched(torch.nn.Parameter):
    """A parameter whose dicts of hooks must not be set while a backward pass in another thread reads them."""

    def __setattr__(self, name: str, value: Any) -> None:
        assert not name.endswith("_hooks")
        super().__setattr__(name, value)


def test_a_look_sets_no_hooks_that_a_backward_pass_may_be_calling() -> None:
    weight = nn.Parameter(torch.ones(2, 3, 3))
    frozen = freeze_entries({"weight": weight}, "weight = tied(0, start=first)\nweight[:, 0] = 1")
    weight.__class__ = _Untouched
    assert frozen.report().parts["weight"].mechanisms.gradient_hook
    frozen.assert_frozen(guarded=False)


def test_saving_and_forward_set_no_hooks_that_a_backward_pass_may_be_calling() -> None:
    model = nn.Linear(3, 2)
    freeze_entries(model, "weight[0] = 1")
    model.weight.__class__ = _Untouched
    model.state_dict()
    model(torch.ones(1, 3)).sum().backward()
    FrozenEntries.of(model)


def test_a_tied_tensor_that_is_pruned_under_one_of_its_names_drifted() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    frozen = freeze_entries(model, "0.weight[0] = 1")
    prune.custom_from_mask(model[0], "weight", torch.zeros(3, 3))  # type: ignore[no-untyped-call]
    with pytest.raises(DriftError, match=r"`0\.weight\[0, 0\]` holds 0\.0 instead of 1\.0 \(3 entries drifted\)"):
        frozen.assert_frozen()


def test_a_parameter_without_numbers_cannot_be_checked() -> None:
    model, frozen, _ = _guarded()
    model.to("meta")
    for look in (frozen.assert_frozen, frozen.report, frozen.violations):
        with pytest.raises(ParameterChangedError, match=r"`0\.weight` is on the meta device and has no numbers; give"):
            look()


def test_the_advice_speaks_of_what_is_missing() -> None:
    model, frozen, optimizer = _guarded()
    _strip_forward(model, optimizer)
    with pytest.raises(UnguardedError, match=r"reinstall the hooks with frozen\.remove\(\) and frozen\.attach\(\)$"):
        frozen.assert_frozen()


def test_a_tied_parameter_needs_the_hook_that_sums() -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 3, 3, groups=3))
    frozen = freeze_entries(model, "0.weight = tied(0, start=first)")
    optimizer = MaskedOptimizer(SGD(model.parameters(), lr=0.1), frozen)
    frozen.assert_frozen()
    model[0].weight._backward_hooks.clear()
    with pytest.raises(UnguardedError, match=r"the gradient hook of `0\.weight`"):
        frozen.assert_frozen()
    del optimizer


def test_drift_is_told_before_what_is_missing() -> None:
    model = _model()
    frozen = freeze_entries(model, SPEC)
    model[2].bias.data[1] = 3.0
    with pytest.raises(DriftError, match=r"`2\.bias\[1\]` holds 3\.0 instead of 1\.0"):
        frozen.assert_frozen()


def test_entries_that_were_let_go_are_not_held() -> None:
    _, frozen, optimizer = _guarded()
    frozen.remove()
    assert all(len(part.missing) == 4 for part in frozen.report().parts.values())
    with pytest.raises(UnguardedError, match="the gradient hook, the forward hook, a hook for saving or loading"):
        frozen.assert_frozen()
    frozen.attach()
    frozen.assert_frozen()
    del optimizer


def test_bare_tensors_need_a_gradient_hook_and_an_optimizer() -> None:
    weight = torch.ones(3, requires_grad=True)
    frozen = freeze_entries({"weight": weight}, "weight[0] = 1")
    found = frozen.report().parts["weight"]
    assert (found.mechanisms.forward_hook, found.mechanisms.checkpoint_hooks) == (None, None)
    assert found.missing == ("a guarded optimizer",)
    optimizer = SGD([weight], lr=0.1)
    frozen.guard(optimizer)
    frozen.assert_frozen()
    assert "no module" in str(frozen.report())


def test_nothing_frozen_lacks_nothing() -> None:
    frozen = freeze_entries(_model(), "")
    frozen.assert_frozen()
    assert str(frozen.report()) == "nothing is frozen"
    assert frozen.report().holds


def test_a_replaced_module_is_refused() -> None:
    model, frozen, _ = _guarded()
    model[2] = nn.Linear(27, 2)
    with pytest.raises(ParameterChangedError, match="no longer in the model"):
        frozen.report()


class _Rebuilt(nn.Module):
    """Keeps its weights in a container that is rebuilt, as in the first `fit` of Keras."""

    def __init__(self, container: Any) -> None:
        super().__init__()
        self.numbers = nn.Parameter(torch.ones(3, 2))
        self.rebuild = container
        self.kept = self.rebuild(self.numbers)

    def forward(self, x: torch.Tensor) -> Any:
        return x @ self.numbers


@pytest.mark.parametrize(
    ("container", "name"),
    [(lambda p: nn.ParameterDict({"w": p}), "kept.w"), (lambda p: nn.ParameterList([p]), "kept.0")],
    ids=["dict", "list"],
)
def test_a_container_that_was_made_anew_of_the_same_parameters_is_followed(container: Any, name: str) -> None:
    model = _Rebuilt(container)
    del model._parameters["numbers"]
    vars(model)["numbers"] = next(model.kept.parameters())
    frozen = freeze_entries(model, f"{name}[0] = 0.5")
    optimizer = MaskedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1), frozen)
    model.kept = model.rebuild(model.numbers)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    frozen.assert_frozen()
    model.load_state_dict({name: torch.full((3, 2), 7.0)})
    assert model.numbers.tolist() == [[0.5, 0.5], [7, 7], [7, 7]]
    model.numbers.data.fill_(9)
    assert model.state_dict()[name].tolist() == [[0.5, 0.5], [9, 9], [9, 9]]
    frozen.remove()
    assert FrozenEntries.of(model) == ()


def test_a_container_of_other_parameters_is_refused() -> None:
    model = nn.ModuleDict({"kept": nn.ParameterDict({"w": nn.Parameter(torch.ones(2))})})
    frozen = freeze_entries(model, "kept.w[0] = 0.5")
    model["kept"] = nn.ParameterDict({"w": nn.Parameter(torch.ones(2))})
    with pytest.raises(ParameterChangedError, match="no longer in the model"):
        frozen.assert_frozen()


def test_a_gradient_hook_lost_while_gradients_were_off_is_back_after_a_step() -> None:
    model, frozen, optimizer = _guarded()
    model[2].requires_grad_(False)
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())  # as some wrappers do
    optimizer.param_groups[0]["params"][2] = model[2].weight
    model[2].requires_grad_(True)
    optimizer.step()  # no gradient: nothing to zero, and still the hook is renewed
    frozen.assert_frozen()


# Copies


def test_the_handle_of_a_model_knows_the_guards_of_another_handle_of_the_same_parts() -> None:
    model, _, optimizer = _guarded()
    (again,) = FrozenEntries.of(model)
    again.assert_frozen()
    del optimizer


def test_a_copied_handle_has_its_hooks_at_once_and_no_guard() -> None:
    _, frozen, optimizer = _guarded()
    for twin in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        twin.assert_frozen(guarded=False)
        with pytest.raises(UnguardedError, match="missing is a guarded optimizer"):
            twin.assert_frozen()
    frozen.assert_frozen()
    del optimizer


def test_a_copied_optimizer_guards_its_own_model() -> None:
    model, _, optimizer = _guarded()
    _, twin = copy.deepcopy((model, optimizer))
    twin.frozen[0].assert_frozen()


class _HoldsItsHandle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.frozen = freeze_entries(self, "linear.weight[0] = 1")

    def forward(self, values: torch.Tensor) -> Any:
        return self.linear(values)


def test_a_module_that_holds_its_own_handle_can_be_copied() -> None:
    model: Any = _HoldsItsHandle()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.frozen.model is twin
        twin(torch.ones(1, 3)).sum().backward()
        assert not twin.linear.weight.grad[0].any()
        twin.frozen.assert_frozen(guarded=False)
        assert model.linear.weight.grad is None


# What is reported


def test_a_report_says_values_drift_and_bytes() -> None:
    model, frozen, _ = _guarded()
    part = frozen.report().parts["2.weight"]
    row = model[2].weight.detach()[0]
    assert (part.lowest, part.highest) == (row.min().item(), row.max().item())
    assert (part.frozen, part.free, part.shape, part.nbytes) == (27, 27, (2, 27), 27 * 4)
    assert (part.drifted, part.drift) == (0, 0.0)
    with torch.no_grad():
        model[2].weight[0, :2] += 2
    part = frozen.report().parts["2.weight"]
    assert part.drifted == 2
    assert part.drift == pytest.approx(2)
    assert not frozen.report().holds
    assert "drifted: `2.weight`" in str(frozen.report())


def test_a_drift_to_nan_is_infinite_and_one_of_the_sign_of_zero_is_counted() -> None:
    model, frozen, _ = _guarded()
    model[2].bias.data[0] = math.nan
    model[0].weight.data[0, 0, 1, 1] = -0.0
    parts = frozen.report().parts
    assert (parts["2.bias"].drifted, parts["2.bias"].drift) == (1, math.inf)
    assert (parts["0.weight"].drifted, parts["0.weight"].drift) == (1, 0.0)
    assert "0 in 1" in str(frozen.report())


def test_two_guarded_optimizers_are_both_named() -> None:
    model, frozen, _wrapped = _guarded()
    second = Adam(model[2].parameters())
    frozen.guard(second)
    parts = frozen.report().parts
    assert parts["0.weight"].mechanisms.optimizers == ("AdamW",)
    assert parts["2.bias"].mechanisms.optimizers == ("Adam", "AdamW")


def test_the_table_reads_like_this() -> None:
    model = nn.Linear(3, 2)
    frozen = freeze_entries(model, "weight[0] = 0.5\nbias[1] = -1")
    optimizer = SGD(model.parameters())
    frozen.guard(optimizer)
    *table, verdict = str(frozen.report()).splitlines()
    assert [re.split(" {2,}", line) for line in table] == [
        ["parameter", "shape", "rules", "values", *HOOKS, "optimizers", "frozen", "free", "drift", "bytes"],
        ["weight", "(2, 3)", "weight[0] = 0.5", "0.5", "hooked", "hooked", "hooked", "SGD", "3", "3", "0", "0"],
        ["bias", "(2,)", "bias[1] = -1", "-1", "hooked", "hooked", "hooked", "SGD", "1", "1", "0", "0"],
    ]
    assert len({len(line) for line in table}) == 1
    assert verdict == "every frozen entry holds its value, and nothing that holds it is missing"


def test_the_notebook_table_escapes_names_and_marks_what_is_missing() -> None:
    weight = torch.ones(3, requires_grad=True)
    frozen = freeze_entries({"<b>": weight}, {"<b>": torch.tensor([True, False, False])})
    page = frozen.report()._repr_html_()
    assert "&lt;b&gt;" in page
    assert "<td><b></td>" not in page
    assert page.count("<b>MISSING</b>") == 1
    assert page.count("<th>") == page.count("<td>") == 12


def test_the_dict_is_of_builtins() -> None:
    _, frozen, _wrapped = _guarded()
    found = json.loads(json.dumps(frozen.report().to_dict()))
    assert found["2.bias"]["rules"] == ["2.bias = 1"]
    assert found["2.bias"]["mechanisms"]["optimizers"] == ["AdamW"]
    assert found["2.bias"]["missing"] == []


def test_a_complex_parameter_reports_magnitudes() -> None:
    weight = torch.zeros(2, dtype=torch.complex64, requires_grad=True)
    frozen = freeze_entries({"weight": weight}, Rule("weight", value=3 + 4j))
    assert (frozen.report().parts["weight"].lowest, frozen.report().parts["weight"].highest) == (5, 5)


def test_a_parameter_that_is_tied_alone_has_no_values() -> None:
    frozen = freeze_entries(nn.Conv1d(2, 2, 3, groups=2), "weight = tied(0, start=mean)")
    assert frozen.report().parts["weight"].lowest is None


# What trains


def test_trainable_entries_are_those_that_require_a_gradient_and_are_not_frozen() -> None:
    model = _model()
    frozen = freeze_entries(model, SPEC)
    assert frozen.trainable().total == 54 + 3 + 54 + 2
    assert frozen.trainable().trainable == 48 + 3 + 27 + 0
    model[0].requires_grad_(False)
    assert frozen.trainable().trainable == 27
    assert frozen.trainable().percent == 100 * 27 / 113
    assert str(frozen.trainable()) == "trainable entries: 27 of 113 (23.89 %)"


@held_twice
def test_what_another_handle_freezes_does_not_train_either_and_counts_once() -> None:
    model = nn.Linear(3, 2)
    first = freeze_entries(model, "weight[0] = 0")
    second = freeze_entries(model, "weight[:, 0] = 0\nbias = 1")
    assert first.trainable() == second.trainable()
    assert first.trainable().trainable == 6 - 4
    second.remove()
    assert first.trainable().trainable == second.trainable().trainable == 8 - 3


def test_entries_that_were_let_go_train() -> None:
    model = _model()
    frozen = freeze_entries(model, SPEC)
    frozen.remove()
    assert frozen.trainable().percent == 100


def test_entries_that_another_handle_of_the_same_parts_let_go_train() -> None:
    model = _model()
    frozen = freeze_entries(model, SPEC)
    (again,) = FrozenEntries.of(model)
    again.remove()
    assert frozen.trainable() == again.trainable()
    assert frozen.trainable().percent == 100


def test_a_parameter_that_another_handle_of_the_same_parts_thawed_trains() -> None:
    model = _model()
    frozen = freeze_entries(model, SPEC)
    (again,) = FrozenEntries.of(model)
    again.thaw("2.bias")
    assert frozen.trainable() == again.trainable()
    assert frozen.trainable().trainable == frozen.trainable().total - 3 * 2 - 27


def test_parameters_under_two_names_count_once_and_lazy_ones_not_yet() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False), nn.LazyLinear(3))
    model[1].weight = model[0].weight
    frozen = freeze_entries(model, "0.weight[0] = 0")
    assert (frozen.trainable().trainable, frozen.trainable().total) == (2, 4)


def test_a_model_without_parameters_trains_nothing() -> None:
    assert freeze_entries(nn.ReLU(), "").trainable().percent == 0
