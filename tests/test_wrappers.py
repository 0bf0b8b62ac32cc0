"""Optimizers around optimizers: whose hooks are called, which attributes show through, and which step runs."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import pickle
import types
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, lr_scheduler

from freezehooks import (
    FrozenEntries,
    MaskedOptimizer,
    OptimizerMismatchError,
    SpecError,
    UnguardedError,
    UnsupportedOptimizerError,
    freeze_entries,
)

from .claims import same_bits
from .devices import on_cpu
from .draws import randn

VALUE = 0.3


def _model() -> nn.Linear:
    torch.manual_seed(2)
    return nn.Linear(4, 3)


def _backward(model: nn.Module, seed: int = 0) -> None:
    model.zero_grad()
    batch = randn(5, 4, seed=seed)
    model(batch).square().sum().backward()


def _holds(weight: Tensor) -> bool:
    return same_bits(weight.detach()[0], torch.full((4,), VALUE))


def _adamw(model: nn.Module) -> AdamW:
    return AdamW(model.parameters(), lr=0.1, weight_decay=0.1)


def _hooks(optimizer: Any) -> int:
    return len(optimizer._optimizer_step_post_hooks)


# --------------------------------------------------------------------------------------------------------------------
# Wrappers without hooks of their own


class Around(Optimizer):
    """A wrapper that skips `Optimizer.__init__`, as many do; this one has no dicts of hooks."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer: Any = optimizer
        self.param_groups, self.defaults = optimizer.param_groups, optimizer.defaults
        self.state = defaultdict(dict)

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return self.optimizer.step(closure)


class Lookahead(Around):
    """A wrapper with two dicts of hooks, which are never called, and slow weights, as in pytorch_optimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer)
        self._optimizer_step_pre_hooks: Any = {}
        self._optimizer_step_post_hooks: Any = {}
        self.steps = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["slow_params"] = parameter.detach().clone()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = self.optimizer.step(closure)
        self.steps += 1
        for parameter, state in self.state.items() if self.steps % 2 == 0 else ():
            parameter.mul_(0.7).add_(state["slow_params"], alpha=0.3)
            state["slow_params"].copy_(parameter)
        return loss


class WithAllLists(Around):
    """A wrapper that creates every dict of hooks and calls none of them."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer)
        for name in [name for name in vars(optimizer) if name.endswith("_hooks")]:
            setattr(self, name, OrderedDict())


class WithSharedLists(Around):
    """A wrapper that shows the dicts of hooks of what it wraps."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)


WRAPPERS = [Around, Lookahead, WithAllLists, WithSharedLists]


@pytest.mark.parametrize("make", WRAPPERS)
def test_what_is_inside_a_wrapper_without_hooks_is_guarded_in_its_place(make: Callable[[Optimizer], Any]) -> None:
    model = _model()
    frozen = freeze_entries(model, f"weight[0] = {VALUE}")
    inside = _adamw(model)
    wrapper = make(inside)
    guard = frozen.guard(wrapper)
    assert guard.optimizer is inside
    assert frozen.guard(wrapper) is guard is frozen.guard(inside)
    for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        assert len(getattr(inside, name)) == 1
        assert not vars(wrapper).get(name)
    for seed in range(5):
        _backward(model, seed)
        inside.step()
        frozen.assert_frozen()
    frozen.remove()
    _backward(model)
    inside.step()
    assert not _holds(model.weight)
    assert frozen.attach().attached
    guard.remove()
    assert not _hooks(inside)


@pytest.mark.parametrize("compact", [False, True], ids=["", "compact"])
@pytest.mark.parametrize("made_before", [False, True], ids=["", "made_before_freezing"])
@pytest.mark.parametrize("make", WRAPPERS)
def test_masked_around_a_wrapper_holds_through_what_the_wrapper_writes(
    make: Callable[[Optimizer], Any], made_before: bool, compact: bool
) -> None:
    model = _model()
    wrapper = make(_adamw(model)) if made_before else None
    frozen = freeze_entries(model, f"weight[0] = {VALUE}")
    optimizer = MaskedOptimizer(wrapper or make(_adamw(model)), frozen, compact=compact)
    for seed in range(6):
        _backward(model, seed)
        optimizer.step()
        frozen.assert_frozen()
    frozen.remove()
    _backward(model)
    optimizer.step()
    optimizer.step()
    assert frozen.violations()


def test_several_optimizers_inside_are_guarded_and_let_go_together() -> None:
    class Several(Optimizer):
        def __init__(self, *optimizers: Optimizer) -> None:
            self.optimizers = list(optimizers)
            self.param_groups = [group for each in optimizers for group in each.param_groups]

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for each in self.optimizers:
                each.step()

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    frozen = freeze_entries(model, f"0.weight[0] = {VALUE}\n1.weight[0] = {VALUE}")
    optimizer = Several(*map(_adamw, model))
    guard = frozen.guard(optimizer)
    assert [_hooks(each) for each in optimizer.optimizers] == [1, 1, 0]  # the last steps nothing that is frozen
    for seed in range(3):
        _backward(model, seed)
        optimizer.step()
        frozen.assert_frozen()
    guard.remove()
    assert [_hooks(each) for each in optimizer.optimizers] == [0, 0, 0]
    frozen.remove()
    frozen.attach()
    assert [_hooks(each) for each in optimizer.optimizers] == [0, 0, 0]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_the_checks_of_what_is_inside_come_before_the_first_change() -> None:
    class Both(Optimizer):
        def __init__(self, *optimizers: Optimizer) -> None:
            self.optimizers = optimizers
            self.param_groups = [group for each in optimizers for group in each.param_groups]

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            """Do nothing."""

    model = nn.Linear(4, 3, bias=False)
    frozen = freeze_entries(model, f"weight[0] = {VALUE}")
    first, second = SGD(model.parameters()), torch.optim.Muon(model.parameters())
    with pytest.raises(UnsupportedOptimizerError, match="`Muon` cannot be compacted to the free entries"):
        frozen.guard(Both(first, second), compact=True)
    assert _hooks(first) == _hooks(second) == 0
    frozen.remove()
    frozen.attach()
    other = SGD(_model().parameters())
    with pytest.raises(OptimizerMismatchError, match="`Both` steps none of the frozen parameters"):
        frozen.guard(Both(other, other))


def test_an_optimizer_whose_state_is_refused_leaves_the_handle_able_to_attach() -> None:
    model = _model()
    frozen = freeze_entries(model, f"weight[0] = {VALUE}")
    optimizer = _adamw(model)
    optimizer.state[model.weight]["exp_avg"] = torch.zeros(2)
    with pytest.raises(RuntimeError, match="`exp_avg` has shape"):
        frozen.guard(optimizer, compact=True)
    assert not _hooks(optimizer)
    frozen.remove()
    assert frozen.attach().attached


# --------------------------------------------------------------------------------------------------------------------
# What is not an optimizer of torch


class OptimWrapper:
    """A wrapper that is not an `Optimizer`, like fastai's."""

    def __init__(self, opt: Optimizer) -> None:
        self.opt = opt


def test_what_is_no_optimizer_is_named_with_its_module_and_what_it_wraps() -> None:
    model = _model()
    frozen = freeze_entries(model, "weight[0]")
    foreign = type("AdamW", (), {"__module__": "keras.src.optimizers.adamw"})()
    for ask in (frozen.guard, lambda optimizer: MaskedOptimizer(optimizer, frozen)):
        with pytest.raises(
            SpecError,
            match=r"found AdamW of keras\.src\.optimizers\.adamw; if it is a wrapper, guard what it wraps; pass",
        ):
            ask(foreign)
        with pytest.raises(
            SpecError,
            match=r"OptimWrapper of tests\.test_wrappers; if it is a .*wraps \(AdamW of torch\.optim\.adamw\)",
        ):
            ask(OptimWrapper(_adamw(model)))  # type: ignore[arg-type]  # on purpose


# --------------------------------------------------------------------------------------------------------------------
# A step that was replaced


def _update(self: Any, closure: Any = None) -> None:
    for parameter in self.param_groups[0]["params"]:
        parameter.data.sub_(parameter.data + 1)


def _bound(optimizer: Any) -> Any:
    return types.MethodType(_update, optimizer)


def _closing_over(optimizer: Any) -> Any:
    return lambda *args, **kwargs: _update(optimizer)


PAST_THE_HOOKS = {
    "bound": _bound,
    "closure": _closing_over,
    "partial": lambda optimizer: functools.partial(_update, optimizer),
    "raw": lambda optimizer: types.MethodType(inspect.unwrap(type(optimizer).step), optimizer),
    "builtin": lambda optimizer: [].clear,
}


@pytest.mark.parametrize("replace", PAST_THE_HOOKS.values(), ids=PAST_THE_HOOKS)
def test_a_step_that_calls_no_hooks_is_refused_when_it_is_seen(replace: Callable[[Any], Any]) -> None:
    model = _model()
    frozen = freeze_entries(model, f"weight[0] = {VALUE}")
    told = pytest.raises(UnguardedError, match=r"the step of `AdamW` was replaced by .*; let it call the step that it")
    optimizer = _adamw(model)
    optimizer.step = replace(optimizer)  # type: ignore[method-assign]
    for ask in (frozen.guard, lambda each: MaskedOptimizer(each, frozen)):
        with told:
            ask(optimizer)
    assert not _hooks(optimizer)
    assert frozen.attach().attached
    del optimizer.step

    masked = MaskedOptimizer(optimizer, frozen)
    with told:
        masked.step = replace(optimizer)  # type: ignore[method-assign]
    assert "step" not in vars(masked)
    optimizer.step = replace(optimizer)  # type: ignore[method-assign]
    with told:
        masked.step()
    assert _holds(model.weight)
    with told:
        _backward(model)
    with pytest.raises(UnguardedError, match="a guarded optimizer"):
        frozen.assert_frozen()
    assert frozen.report().parts["weight"].missing == ("a guarded optimizer",)
    frozen.remove()
    masked.step = replace(optimizer)  # type: ignore[method-assign]  # nothing is to be held


def test_a_step_replaced_on_the_class_after_guarding_is_seen_by_the_next_backward() -> None:
    class Own(SGD):
        pass

    weight = nn.Parameter(torch.ones(3))
    frozen = freeze_entries({"weight": weight}, "weight[0] = 1")
    optimizer = Own([weight], lr=0.1)
    frozen.guard(optimizer)
    Own.step = _update  # type: ignore[method-assign]
    with pytest.raises(UnguardedError, match="the step of `Own` was replaced by `_update`"):
        weight.sum().backward()


def _with_a_log(optimizer: Any) -> Any:
    step = optimizer.step

    def logged(*args: Any, **kwargs: Any) -> Any:
        return step(*args, **kwargs)

    return logged


def _by_class(optimizer: Any) -> Any:
    return types.MethodType(lambda self, closure=None: type(self).step(self, closure), optimizer)


def _deeper(optimizer: Any) -> Any:
    inside = _with_a_log(optimizer)
    return lambda *args: (lambda: inside(*args))()


THROUGH_THE_HOOKS = {
    "logged": _with_a_log,
    "class": _by_class,
    "deeper": _deeper,
    "itself": lambda optimizer: optimizer.step,
    "partial": lambda optimizer: functools.partial(optimizer.step, None),
    "mock": lambda optimizer: mock.Mock(wraps=optimizer.step),
    "wraps": lambda optimizer: functools.wraps(optimizer.step)(_with_a_log(optimizer)),
    "hooked": lambda optimizer: types.MethodType(Optimizer.profile_hook_step(_update), optimizer),
}


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("face", ["guard", "masked", "inner"])
@pytest.mark.parametrize("replace", THROUGH_THE_HOOKS.values(), ids=THROUGH_THE_HOOKS)
def test_a_step_that_calls_the_one_it_replaces_is_held_through(
    replace: Callable[[Any], Any], face: str, late: bool
) -> None:
    model = _model()
    frozen = freeze_entries(model, f"weight[0] = {VALUE}")
    optimizer: Any = _adamw(model)
    if not late:
        optimizer.step = replace(optimizer)
    if face == "guard":
        frozen.guard(optimizer)
    stepped: Any = optimizer if face == "guard" else MaskedOptimizer(optimizer, frozen)
    if late:
        replaced = stepped if face == "masked" else optimizer
        replaced.step = replace(replaced)
    for seed in range(3):
        _backward(model, seed)
        stepped.step()
        frozen.assert_frozen()


def test_schedulers_and_accelerate_may_replace_the_step() -> None:
    model = _model()
    frozen = freeze_entries(model, f"weight[0] = {VALUE}")
    inner = _adamw(model)
    first = lr_scheduler.StepLR(inner, 1)
    optimizer = MaskedOptimizer(inner, frozen)
    second = lr_scheduler.ExponentialLR(optimizer, 0.9)
    assert hasattr(optimizer.step, "_wrapped_by_lr_sched")
    assert hasattr(inner.step, "_wrapped_by_lr_sched")
    for seed in range(3):
        _backward(model, seed)
        optimizer.step()
        frozen.assert_frozen()
        first.step()
        second.step()


@on_cpu("Accelerate chooses the device")
def test_accelerates_scaler_steps_through_a_step_of_its_own() -> None:
    accelerate = pytest.importorskip("accelerate")
    module = pytest.importorskip("accelerate.optimizer")
    accelerate.Accelerator(cpu=True)
    model = _model()
    frozen = freeze_entries(model, f"weight[0] = {VALUE}")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    masked = MaskedOptimizer(_adamw(model), frozen)
    optimizer = module.AcceleratedOptimizer(masked, device_placement=False, scaler=scaler)
    for _ in range(3):
        scaler.scale(model(torch.ones(1, 4)).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        frozen.assert_frozen()
        assert not optimizer.step_was_skipped
    guard = frozen.guard(optimizer)
    assert guard.optimizer is masked.inner


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_a_compiled_step_may_be_put_in_its_place() -> None:
    torch.compiler.reset()
    model = _model()
    frozen = freeze_entries(model, f"weight[0] = {VALUE}")
    optimizer: Any = SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    optimizer.step = torch.compile(optimizer.step, backend="eager")
    frozen.guard(optimizer)
    _backward(model)
    optimizer.step()
    frozen.assert_frozen()


# --------------------------------------------------------------------------------------------------------------------
# Signatures and names


class Scaled(SGD):
    """An optimizer that unscales by itself, as `GradScaler` allows."""

    _step_supports_amp_scaling = True

    def step(self, closure: Any = None, *, grad_scaler: Any = None) -> Any:  # type: ignore[override]
        self.seen = grad_scaler
        return super().step(closure)


@pytest.mark.parametrize("scheduled", [False, True], ids=["", "scheduled"])
def test_signatures_are_the_inner_ones(scheduled: bool) -> None:
    model = _model()
    inner: Any = Scaled(model.parameters(), lr=0.1)
    plain = {name: inspect.signature(getattr(inner, name)) for name in ("step", "zero_grad", "load_state_dict")}
    if scheduled:
        lr_scheduler.StepLR(inner, 1)
    masked = MaskedOptimizer(inner, freeze_entries(model, "weight[0]"))
    for optimizer in (masked, MaskedOptimizer(masked, ())):
        for name, signature in plain.items():
            assert inspect.signature(getattr(optimizer, name)) == signature
            assert getattr(optimizer, name).__self__ is optimizer
    assert MaskedOptimizer.step.__doc__ == masked.step.__doc__


@pytest.mark.filterwarnings("ignore:GradScaler is going to stop:FutureWarning")
def test_a_scaler_hands_itself_to_an_optimizer_that_asks_for_it(device: torch.device) -> None:
    model = _model()
    inner = Scaled(model.parameters(), lr=0.1)
    optimizer = MaskedOptimizer(inner, freeze_entries(model, f"weight[0] = {VALUE}"))
    scaler = torch.amp.GradScaler(device.type)
    scaler.scale(model(torch.ones(1, 4)).sum()).backward()
    scaler.step(optimizer)
    assert inner.seen is scaler
    assert _holds(model.weight)


def test_accelerate_passes_set_to_none_on() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = _model()
    optimizer = MaskedOptimizer(_adamw(model), freeze_entries(model, "weight[0]"))
    prepared = accelerate.Accelerator(cpu=True).prepare(optimizer)
    for set_to_none in (False, True):
        _backward(model)
        prepared.zero_grad(set_to_none=set_to_none)
        assert (model.weight.grad is None) == set_to_none


@pytest.mark.parametrize(
    ("package", "face"),
    [("lightning.pytorch.core.optimizer", "LightningOptimizer"), ("lightning.fabric.wrappers", "_FabricOptimizer")],
)
def test_the_faces_of_lightning_and_fabric_keep_their_names(package: str, face: str) -> None:
    module: Any = pytest.importorskip(package)
    model = _model()
    options = {} if face == "LightningOptimizer" else {"strategy": None}
    plain, masked = (
        getattr(module, face)(optimizer, **options)
        for optimizer in (_adamw(model), MaskedOptimizer(_adamw(model), freeze_entries(model, "weight[0]")))
    )
    assert str(masked) == str(plain)
    assert str(masked).startswith(("LightningAdamW (", "FabricAdamW ("))
    assert str(masked.optimizer) == str(plain.optimizer)


def test_a_face_of_lightning_is_guarded_inside() -> None:
    module: Any = pytest.importorskip("lightning.pytorch.core.optimizer")
    model = _model()
    frozen = freeze_entries(model, "weight[0]")
    inner = _adamw(model)
    assert frozen.guard(module.LightningOptimizer(inner)).optimizer is inner
    assert frozen.guard(module.LightningOptimizer(MaskedOptimizer(inner, frozen)), compact=True).optimizer is inner
    assert _hooks(inner) == 1


# --------------------------------------------------------------------------------------------------------------------
# Guarding a masked optimizer


def test_guarding_a_masked_optimizer_compactly_is_guarding_what_it_wraps() -> None:
    model, alike = _model(), _model()
    frozen, others = freeze_entries(model, f"weight[0] = {VALUE}"), freeze_entries(alike, f"weight[0] = {VALUE}")
    masked = MaskedOptimizer(_adamw(model), frozen)
    guard = frozen.guard(masked, compact=True)
    assert guard.optimizer is masked.inner
    reference = MaskedOptimizer(_adamw(alike), others, compact=True)
    nested = MaskedOptimizer(masked, frozen, compact=True)
    for seed in range(3):
        for each, optimizer in ((model, nested), (alike, reference)):
            _backward(each, seed)
            optimizer.step()
    assert masked.state[model.weight]["exp_avg"].shape == (8,)
    assert all(same_bits(a, b) for a, b in zip(model.parameters(), alike.parameters(), strict=True))
    assert nested.state_dict(compact=True)["state"][0]["exp_avg"].shape == (8,)
    twin = copy.deepcopy(masked)
    assert twin.frozen[0].report().holds
    _backward(twin.frozen[0].model)  # type: ignore[arg-type]
    twin.step()
    assert twin.state[twin.param_groups[0]["params"][0]]["exp_avg"].shape == (8,)


# --------------------------------------------------------------------------------------------------------------------
# Copies


def _deepcopied(optimizer: MaskedOptimizer) -> MaskedOptimizer:
    return copy.deepcopy(optimizer)


def _pickled(optimizer: MaskedOptimizer) -> MaskedOptimizer:
    twin: MaskedOptimizer = pickle.loads(pickle.dumps(optimizer))
    return twin


copies = pytest.mark.parametrize("copied", [_deepcopied, _pickled])


@copies
def test_a_masked_optimizer_that_steps_nothing_frozen_any_longer_is_copied(
    copied: Callable[[MaskedOptimizer], MaskedOptimizer],
) -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    frozen = freeze_entries(model, f"*.weight[0] = {VALUE}")
    optimizer = MaskedOptimizer(_adamw(model[0]), frozen)
    frozen.thaw("0")
    twin = copied(optimizer)
    (held,) = twin.frozen
    its: Any = held.model
    assert list(held) == ["1.weight"]
    twin.add_param_group({"params": list(its[1].parameters())})  # held from the next step on, as in the original
    _backward(its)
    twin.step()
    held.assert_frozen()
    assert not _holds(its[0].weight)


@copies
def test_a_masked_optimizer_of_a_handle_that_let_go_is_copied_and_holds_once_it_is_attached(
    copied: Callable[[MaskedOptimizer], MaskedOptimizer],
) -> None:
    model = _model()
    frozen = freeze_entries(model, f"weight[0] = {VALUE}")
    optimizer = MaskedOptimizer(_adamw(model), frozen)
    frozen.remove()
    twin = copied(optimizer)
    assert not _hooks(twin.inner)
    twin.frozen[0].attach()
    _backward(twin.frozen[0].model)  # type: ignore[arg-type]
    twin.step()
    twin.frozen[0].assert_frozen()


@copies
@pytest.mark.parametrize("compact", [False, True], ids=["", "compact"])
def test_a_copy_is_guarded_by_every_handle_that_guarded_the_original(
    copied: Callable[[MaskedOptimizer], MaskedOptimizer], compact: bool
) -> None:
    model = _model()
    first, second = (freeze_entries(model, f"weight[{row}] = {VALUE}") for row in (0, 1))
    optimizer = MaskedOptimizer(_adamw(model), first)
    second.guard(optimizer, compact=compact)
    twin = copied(optimizer)
    its: Any = twin.frozen[0].model
    handles = FrozenEntries.of(its)
    assert len(handles) == 2
    for seed in range(3):
        _backward(its, seed)
        twin.step()
    assert same_bits(its.weight.detach()[:2], torch.full((2, 4), VALUE))
    assert twin.state[its.weight]["exp_avg"].shape == ((4,) if compact else (3, 4))
    for handle in handles:
        handle.assert_frozen()
        handle.remove()
    _backward(its)
    twin.step()
    assert (its.weight[:2] != VALUE).all()


# --------------------------------------------------------------------------------------------------------------------
# Freed at once


def _around(model: nn.Module, frozen: FrozenEntries) -> list[Any]:
    wrapper = Around(_adamw(model))
    frozen.guard(wrapper)
    return [wrapper]


def _scheduled(model: nn.Module, frozen: FrozenEntries) -> list[Any]:
    optimizer = MaskedOptimizer(_adamw(model), frozen)
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    optimizer.step()
    scheduler.step()
    return [optimizer, scheduler]


def _twice(model: nn.Module, frozen: FrozenEntries) -> list[Any]:
    other = freeze_entries(model, "weight[1] = 1")
    return [MaskedOptimizer(MaskedOptimizer(_adamw(model), frozen), [frozen, other])]


HOLDERS: dict[str, Callable[[nn.Module, FrozenEntries], list[Any]]] = {
    "guard": lambda model, frozen: [frozen.guard(Adam(model.parameters()))],
    "guard_compact": lambda model, frozen: [frozen.guard(Adam(model.parameters()), compact=True)],
    "masked": lambda model, frozen: [MaskedOptimizer(_adamw(model), frozen)],
    "masked_compact": lambda model, frozen: [MaskedOptimizer(_adamw(model), frozen, compact=True)],
    "wrapper": _around,
    "scheduled": _scheduled,
    "two_handles": _twice,
    "copy": lambda model, frozen: [copy.deepcopy(MaskedOptimizer(_adamw(model), frozen, compact=True))],
}


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_a_guarded_model_that_is_dropped_is_freed_at_once(
    hold: Callable[[nn.Module, FrozenEntries], list[Any]],
) -> None:
    gc.collect()
    gc.disable()
    try:
        model = _model()
        frozen = freeze_entries(model, f"weight[0] = {VALUE}")
        made = hold(model, frozen)
        for each in made:
            if isinstance(each, Optimizer):
                _backward(model)
                each.step()
        weight = weakref.ref(model.weight)
        references = [weakref.ref(each) for each in [model, frozen, *made]]
        del model, frozen, made, each
        assert [reference() for reference in references] == [None] * len(references)
        assert weight() is None
    finally:
        gc.enable()
