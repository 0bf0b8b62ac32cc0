"""MaskedOptimizer is the optimizer it wraps in every respect but one."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.profiler import ProfilerActivity

from freezehooks import FrozenEntries, MaskedOptimizer, SpecError, freeze_entries

from .claims import same_bits
from .draws import randn


def _model() -> nn.Linear:
    torch.manual_seed(2)
    return nn.Linear(4, 3)


def _train(model: nn.Module, optimizer: Optimizer, steps: int = 3) -> None:
    generator = torch.Generator().manual_seed(4)
    for _ in range(steps):
        optimizer.zero_grad()
        model(randn(5, 4, seed=generator)).square().sum().backward()
        optimizer.step()


def _frozen_pair() -> tuple[nn.Linear, MaskedOptimizer]:
    model = _model()
    frozen = freeze_entries(model, "weight[0] = 0.5")
    return model, MaskedOptimizer(AdamW(model.parameters(), lr=0.1, weight_decay=0.1), frozen)


def _same_state(first: dict[str, Any], second: dict[str, Any]) -> bool:
    values = zip(first["state"].values(), second["state"].values(), strict=True)
    same = all(same_bits(a[key], b[key]) for a, b in values for key in a)
    return same and first["param_groups"] == second["param_groups"]


@pytest.mark.parametrize("frozen", [(), [], "handle"], ids=["tuple", "list", "empty_handle"])
def test_with_nothing_frozen_it_is_transparent(frozen: Any) -> None:
    ours, plain = _model(), _model()
    handles = freeze_entries(ours, "") if frozen == "handle" else frozen
    wrapped, reference = MaskedOptimizer(AdamW(ours.parameters(), lr=0.1), handles), AdamW(plain.parameters(), lr=0.1)
    _train(ours, wrapped)
    _train(plain, reference)
    assert all(same_bits(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))
    assert _same_state(wrapped.state_dict(), reference.state_dict())
    assert repr(wrapped) == repr(reference)
    assert isinstance(wrapped, Optimizer)


def test_groups_state_and_defaults_are_the_inner_ones_on_both_sides() -> None:
    model, optimizer = _frozen_pair()
    _train(model, optimizer)
    inner = optimizer.inner
    optimizer.param_groups[0]["lr"] = 0.25
    assert inner.param_groups[0]["lr"] == 0.25
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state
    assert optimizer.defaults is inner.defaults
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state
    optimizer.param_groups = groups = list(inner.param_groups)
    assert inner.param_groups is groups
    optimizer.state = state = dict(inner.state)
    assert inner.state is state
    optimizer.defaults = defaults = dict(inner.defaults)
    assert inner.defaults is defaults


def test_state_dicts_are_interchangeable_with_a_plain_optimizer() -> None:
    model, optimizer = _frozen_pair()
    _train(model, optimizer)
    plain = AdamW(_model().parameters())
    plain.load_state_dict(optimizer.state_dict())
    assert _same_state(plain.state_dict(), optimizer.state_dict())
    _, again = _frozen_pair()
    again.load_state_dict(plain.state_dict())
    assert _same_state(again.state_dict(), optimizer.state_dict())


def test_attributes_are_read_written_and_deleted_through_it() -> None:
    class Scaled(SGD):
        grad_scale: Tensor | None = None

        def train(self) -> str:
            return "training"

    model = _model()
    optimizer: Any = MaskedOptimizer(Scaled(model.parameters()), ())
    assert optimizer.train() == "training"
    optimizer.grad_scale = torch.tensor(2.0)
    assert optimizer.inner.grad_scale == 2
    del optimizer.grad_scale
    assert optimizer.inner.grad_scale is None
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = optimizer.no_such_thing


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_grad_scaler_steps_by_the_unscaled_gradient(fused: bool, device: torch.device) -> None:
    ours, plain = _model(), _model()
    wrapped = MaskedOptimizer(SGD(ours.parameters(), lr=0.1, fused=fused), freeze_entries(ours, "weight[0]"))
    reference = SGD(plain.parameters(), lr=0.1, fused=fused)
    for model, optimizer in ((ours, wrapped), (plain, reference)):
        scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
        scaler.scale(model(torch.ones(1, 4)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert same_bits(ours.weight[1:], plain.weight[1:])
    assert same_bits(ours.bias, plain.bias)
    assert not bool((ours.weight[0] == plain.weight[0]).any())


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_an_inf_skips_the_step_at_a_free_entry_alone(fused: bool, device: torch.device) -> None:
    for row, skipped in ((0, False), (1, True)):
        model = _model()
        before = model.weight.detach().clone()
        optimizer = MaskedOptimizer(SGD(model.parameters(), lr=0.1, fused=fused), freeze_entries(model, "weight[0]"))
        scaler = torch.amp.GradScaler(device.type)
        factor = torch.ones(3, 4)
        factor[row, 2] = torch.inf
        scaler.scale((model.weight * factor).sum() + model.bias.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert bool(model.weight.isfinite().all())
        assert bool((model.weight[2] == before[2]).all()) == skipped


SCHEDULERS = {
    "step": lambda o: lr_scheduler.StepLR(o, 1),
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=9),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, cycle_momentum=True),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o),
}


@pytest.mark.parametrize("before", [True, False], ids=["made_before_freezing", "made_after"])
@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers_work_on_either_face_without_a_warning(schedule: Any, before: bool) -> None:
    model = _model()
    inner = SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = schedule(inner) if before else None
    optimizer = MaskedOptimizer(inner, freeze_entries(model, "weight[0] = 0.5"))
    scheduler = scheduler or schedule(optimizer)
    for metric in range(4):
        _train(model, optimizer, 1)
        scheduler.step(*([metric] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
        assert model.weight[0].tolist() == [0.5] * 4
    assert optimizer.param_groups[0]["lr"] == inner.param_groups[0]["lr"]


def test_step_hooks_fire_once_and_may_be_put_on_either_face() -> None:
    model, optimizer = _frozen_pair()
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *args: calls.append("pre"))
    optimizer.inner.register_step_post_hook(lambda *args: calls.append("post"))
    everywhere = register_optimizer_step_pre_hook(lambda *args: calls.append("global"))
    try:
        _train(model, optimizer, 1)
    finally:
        everywhere.remove()
    assert calls == ["global", "pre", "post"]


def test_state_dict_hooks_fire() -> None:
    _, optimizer = _frozen_pair()
    calls: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("save"))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("load"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["save", "load"]


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # torch's own, in some releases
def test_the_profiler_names_the_inner_optimizer() -> None:
    model, optimizer = _frozen_pair()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profile:
        _train(model, optimizer, 1)
    names = [event.key for event in profile.key_averages() if event.key.startswith("Optimizer.step")]
    assert names == ["Optimizer.step#AdamW.step"]


def test_torch_does_not_wrap_the_step_a_second_time() -> None:
    """It does so for every class whose instances are made or unpickled; hooks would then fire twice."""
    model, optimizer = _frozen_pair()
    calls: list[str] = []
    optimizer.register_step_post_hook(lambda *args: calls.append("post"))
    optimizer._patch_step_function()
    _train(model, optimizer, 1)
    assert calls == ["post"]


def test_an_added_group_is_held_from_the_next_step_on() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    frozen = freeze_entries(model, "*.weight[0] = 1")
    optimizer = MaskedOptimizer(AdamW(model[0].parameters(), lr=0.1, weight_decay=0.1), frozen)
    optimizer.add_param_group({"params": list(model[1].parameters()), "lr": 0.5})
    assert len(optimizer.inner.param_groups) == 2
    _train(model, optimizer)
    frozen.assert_frozen()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_is_the_inner_ones(set_to_none: bool) -> None:
    model, optimizer = _frozen_pair()
    model(torch.ones(1, 4)).sum().backward()
    optimizer.zero_grad(set_to_none=set_to_none)
    assert (model.weight.grad is None) == set_to_none


def _copied(kind: str, optimizer: MaskedOptimizer) -> MaskedOptimizer:
    twin: MaskedOptimizer = copy.deepcopy(optimizer) if kind == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    return twin


@pytest.mark.parametrize("kind", ["deepcopy", "pickle"])
def test_a_copy_steps_on_its_own_and_holds(kind: str) -> None:
    model, optimizer = _frozen_pair()
    _train(model, optimizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    twin = _copied(kind, optimizer)
    (frozen,) = twin.frozen
    assert isinstance(frozen.model, nn.Module)
    assert _same_state(twin.state_dict(), optimizer.state_dict())
    assert twin.param_groups[0]["params"][0] is frozen.model.weight
    _train(frozen.model, twin)
    frozen.assert_frozen()
    assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())
    _train(model, optimizer)
    assert all(same_bits(a, b) for a, b in zip(model.parameters(), frozen.model.parameters(), strict=True))
    assert len(FrozenEntries.of(frozen.model)) == 1


def test_an_unpickled_optimizer_does_not_break_others_of_its_class() -> None:
    model, optimizer = _frozen_pair()
    pickle.loads(pickle.dumps(optimizer))
    _train(model, optimizer)
    assert model.weight[0].tolist() == [0.5] * 4


def test_a_removed_handle_lets_the_wrapped_optimizer_move_the_entries() -> None:
    model, optimizer = _frozen_pair()
    optimizer.frozen[0].remove()
    _train(model, optimizer)
    assert not bool((model.weight[0] == 0.5).any())


@pytest.mark.parametrize(
    ("optimizer", "frozen", "message"),
    [
        (None, "weight[0] = 1", "`frozen` must be a handle or a sequence of them, found str; pass what freeze_entries"),
        (None, {"weight": 0}, "found dict"),
        (None, "", "found str"),
        (None, ["weight = 0"], "found str"),
        (None, None, "found NoneType"),
        ("adam", (), r"`optimizer` must be a torch\.optim\.Optimizer, found str"),
    ],
    ids=["text", "mapping", "empty_text", "list_of_text", "none", "no_optimizer"],
)
def test_what_is_no_handle_or_no_optimizer_is_refused(optimizer: Any, frozen: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        MaskedOptimizer(optimizer or SGD(_model().parameters()), frozen)
