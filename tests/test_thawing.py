"""Entries thawed in mid-training take steps like those of a new optimizer, whatever their gradients are like."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam, Adamax, AdamW, NAdam, Optimizer, RAdam

from freezehooks import FrozenEntries, MaskedOptimizer, freeze_entries

from .claims import same_bits
from .draws import randn

Maker = Callable[[list[Tensor]], Optimizer]

LR: Final = 1e-3
MAKERS: Final[dict[str, Maker]] = {
    "adam": partial(Adam, lr=LR),
    "adam_amsgrad": partial(Adam, lr=LR, amsgrad=True),
    "adam_decayed": partial(Adam, lr=LR, weight_decay=0.01),
    "adam_maximize": partial(Adam, lr=LR, weight_decay=0.01, maximize=True),
    "adam_foreach": partial(Adam, lr=LR, foreach=True),
    "adam_fused": partial(Adam, lr=LR, fused=True),
    "adamw": partial(AdamW, lr=LR, weight_decay=0.01),
    "nadam": partial(NAdam, lr=LR),
    "radam": partial(RAdam, lr=LR),
    "adamax": partial(Adamax, lr=LR),
}
makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
either_mode = pytest.mark.parametrize("compact", [False, True], ids=["masked", "compact"])
GRADIENTS: Final = {"noise": (0.0, 1.0), "drift_and_noise": (1.0, 1.0), "drift": (1.0, 0.1), "constant": (1.0, 0.0)}
gradients = pytest.mark.parametrize(("mean", "noise"), GRADIENTS.values(), ids=GRADIENTS)


def _let_go(frozen: FrozenEntries, way: str) -> None:
    if way == "thaw":
        frozen.thaw("*")
    else:
        frozen.remove()


def _age(optimizer: Optimizer, step: float = 2000) -> None:
    """Pretend that many steps were made, to save time: moments at frozen entries do not depend on their number."""
    for state in optimizer.state.values():
        state["step"].fill_(step)
        if "mu_product" in state:
            state["mu_product"].fill_(1e-30)


def _largest_step(
    make: Maker, region: Any, mean: float, noise: float, compact: bool, way: str, scale: Tensor | float = 1.0
) -> float:
    """Return the largest step of a thawed entry in learning rates."""
    generator = torch.Generator().manual_seed(3)
    weight = nn.Parameter(torch.zeros(500))
    frozen = freeze_entries({"weight": weight}, {"weight": region})
    where = frozen["weight"].frozen
    optimizer = MaskedOptimizer(make([weight]), frozen, compact=compact)
    largest = 0.0
    for n in range(85):
        if n == 20:
            _age(optimizer)
            _let_go(frozen, way)
        weight.grad = randn(500, seed=generator) * noise * scale + mean * scale
        before = weight.detach().clone()
        optimizer.step()
        largest = max(largest, float((weight.detach() - before).abs()[where].max()) / LR)
    return largest


_HALF: Final = torch.arange(500) % 2 == 0
_ONE: Final = torch.arange(500) == 17


@makers
@gradients
@either_mode
@pytest.mark.parametrize("way", ["thaw", "remove"])
def test_thawed_entries_take_steps_of_at_most_two_learning_rates(
    make: Maker, mean: float, noise: float, compact: bool, way: str
) -> None:
    assert _largest_step(make, _HALF, mean, noise, compact, way) <= 2


@makers
@gradients
@pytest.mark.parametrize("region", [_ONE, torch.ones(500, dtype=torch.bool)], ids=["one_entry", "whole"])
def test_the_bound_holds_for_one_entry_and_for_a_whole_parameter(
    make: Maker, mean: float, noise: float, region: Tensor
) -> None:
    for compact in (False, True):
        assert _largest_step(make, region, mean, noise, compact, "remove") <= 2


@makers
def test_the_bound_holds_for_gradients_of_any_scale(make: Maker) -> None:
    scale = torch.logspace(-4, 4, 500)
    assert _largest_step(make, _HALF, 0.0, 1.0, False, "remove", scale) <= 2


@makers
def test_under_a_constant_gradient_thawed_entries_step_by_one_learning_rate(make: Maker) -> None:
    assert 0.8 <= _largest_step(make, _HALF, 1.0, 0.0, False, "remove") <= 1.06


@makers
@either_mode
def test_entries_that_were_free_train_as_if_nothing_had_been_let_go(make: Maker, compact: bool) -> None:
    weights = []
    for thaws in (False, True):
        generator = torch.Generator().manual_seed(3)
        weight = nn.Parameter(torch.zeros(64))
        frozen = freeze_entries({"weight": weight}, "weight[:20]")
        optimizer = MaskedOptimizer(make([weight]), frozen, compact=compact)
        for n in range(12):
            if n == 6 and thaws:
                frozen.remove()
            weight.grad = randn(64, seed=generator)
            optimizer.step()
        weights.append(weight.detach())
    if make is MAKERS["adam_fused"]:  # the last few entries of a tensor are rounded otherwise
        torch.testing.assert_close(weights[0][20:], weights[1][20:])
    else:
        assert same_bits(weights[0][20:], weights[1][20:])
    assert bool((weights[1][:20] != 0).all())


@makers
@pytest.mark.parametrize("way", ["thaw", "remove", "closure", "other_regions"])
def test_compact_and_masked_runs_let_go_alike(make: Maker, way: str) -> None:
    if make is MAKERS["adam_fused"]:
        pytest.skip("fused kernels round the last few entries of a tensor otherwise")
    runs = []
    for compact in (False, True):
        generator = torch.Generator().manual_seed(3)
        weight = nn.Parameter(torch.zeros(16, 8))
        frozen = freeze_entries({"weight": weight}, "weight[:, 1::3] = 0.5\nweight[3, ::3]")
        optimizer = MaskedOptimizer(make([weight]), frozen, compact=compact)

        def closure(weight: Tensor = weight, generator: torch.Generator = generator) -> float:
            weight.grad = randn(16, 8, seed=generator)
            return 0.0

        for n in range(12):
            if n == 5 and way == "other_regions":
                frozen.remove()
                freeze_entries({"weight": weight}, "weight[:2]").guard(optimizer.inner, compact=compact)
            elif n == 5:
                _let_go(frozen, way)
            if way == "closure":
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        runs.append((weight.detach(), optimizer.state_dict()))
    assert same_bits(runs[0][0], runs[1][0])
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=0, atol=0)


def _hooks(optimizer: Any) -> int:
    return sum(len(value) for name, value in vars(optimizer).items() if name.endswith("_hooks"))


@pytest.mark.parametrize("has_others", [False, True], ids=["alone", "beside_other_hooks"])
def test_the_hooks_come_off_when_the_averages_stand_alone(has_others: bool) -> None:
    weight = nn.Parameter(torch.zeros(8))
    optimizer = Adam([weight])
    if has_others:
        optimizer.register_step_post_hook(lambda *args: None)
    frozen = freeze_entries({"weight": weight}, "weight[:2]")
    frozen.guard(optimizer)
    for n in range(120):
        if n == 5:
            frozen.remove()
            assert _hooks(optimizer) > has_others
        weight.grad = torch.ones(8)
        optimizer.step()
    if not has_others:
        assert _hooks(optimizer) == 0
    freeze_entries({"weight": weight}, "weight[:2] = 1").guard(optimizer)
    optimizer.step()
    assert weight[:2].tolist() == [1, 1]


@pytest.mark.parametrize("kind", ["before_the_first_step", "guard_removed", "sgd", "adamax"])
def test_no_hook_stays_where_nothing_has_to_be_averaged(kind: str) -> None:
    weight = nn.Parameter(torch.zeros(8))
    optimizer = {"sgd": torch.optim.SGD, "adamax": Adamax}.get(kind, Adam)([weight])
    frozen = freeze_entries({"weight": weight}, "weight[:2]")
    guard = frozen.guard(optimizer)
    weight.grad = torch.ones(8)
    if kind != "before_the_first_step":
        optimizer.step()
    if kind == "guard_removed":
        guard.remove()
    else:
        frozen.remove()
    optimizer.step()
    assert _hooks(optimizer) == 0


def test_a_guard_that_is_removed_for_good_leaves_no_hook() -> None:
    weight = nn.Parameter(torch.zeros(8))
    optimizer = Adam([weight])
    frozen = freeze_entries({"weight": weight}, "weight[:2]")
    guard = frozen.guard(optimizer)
    weight.grad = torch.ones(8)
    optimizer.step()
    frozen.remove()
    assert _hooks(optimizer) > 0
    guard.remove()
    assert _hooks(optimizer) == 0


def test_entries_that_are_frozen_again_hold_and_start_anew_when_they_are_let_go_again() -> None:
    weight = nn.Parameter(torch.zeros(8))
    frozen = freeze_entries({"weight": weight}, "weight[:4]")
    optimizer = MaskedOptimizer(Adam([weight], lr=LR), frozen)
    for n in range(40):
        if n in (5, 20):
            frozen.remove()
            _age(optimizer)
        elif n == 10:
            frozen.attach()
            held = weight.detach()[:4].clone()
        weight.grad = torch.ones(8) * (100 if n >= 20 else 1)
        before = weight.detach().clone()
        optimizer.step()
        if 10 <= n < 20:
            frozen.assert_frozen()
            assert same_bits(weight[:4], held)
        assert float((weight.detach() - before)[:4].abs().max()) <= 1.5 * LR


def test_an_overflow_under_a_grad_scaler_leaves_the_averages_alone(device: torch.device) -> None:
    weight = nn.Parameter(torch.zeros(8))
    frozen = freeze_entries({"weight": weight}, "weight[:4]")
    optimizer = MaskedOptimizer(Adam([weight], lr=LR, fused=True), frozen)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    for n in range(12):
        if n == 4:
            frozen.remove()
            _age(optimizer)
        optimizer.zero_grad()
        scaler.scale((weight * (torch.inf if n == 5 else 2.0)).sum()).backward()
        before = weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert float((weight.detach() - before)[:4].abs().max()) <= 1.1 * LR
    seen = optimizer.state[weight]["exp_avg_sq"][:4] / (1 - 0.999**2000)
    assert bool(((seen > 3) & (seen < 5)).all())  # of the unscaled gradient


def test_complex_and_half_precision_entries_keep_the_bound() -> None:
    for dtype in (torch.complex64, torch.bfloat16):
        weight = nn.Parameter(torch.zeros(40, dtype=dtype))
        frozen = freeze_entries({"weight": weight}, "weight[:20]")
        optimizer = MaskedOptimizer(Adam([weight], lr=LR), frozen)
        generator = torch.Generator().manual_seed(1)
        for n in range(40):
            if n == 4:
                frozen.remove()
                _age(optimizer)
            weight.grad = randn(40, seed=generator, dtype=dtype)
            before = weight.detach().clone()
            optimizer.step()
            assert float((weight.detach() - before)[:20].abs().max()) <= 3 * LR  # with two components, each at most two


def test_a_loss_does_not_jump_when_entries_are_let_go() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    frozen = freeze_entries(model, "0.weight[:16]\n2.weight[:, ::2]")
    optimizer = MaskedOptimizer(Adam(model.parameters(), lr=3e-3), frozen)
    losses = []
    for n in range(700):
        if n == 600:
            frozen.remove()
        batch = torch.randn(64, 8)
        loss = (model(batch) - batch.sum(1, keepdim=True).sin()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert max(losses[600:]) <= 1.5 * max(losses[550:600])


@either_mode
def test_what_was_guarded_and_let_go_without_a_step_between_keeps_the_bound(compact: bool) -> None:
    weight = nn.Parameter(torch.zeros(8))
    optimizer = Adam([weight], lr=LR)
    for _ in range(3):
        weight.grad = torch.ones(8)
        optimizer.step()
    _age(optimizer)
    frozen = freeze_entries({"weight": weight}, "weight[:4]")
    frozen.guard(optimizer, compact=compact)
    frozen.remove()
    for _ in range(40):
        before = weight.detach().clone()
        weight.grad = torch.ones(8)
        optimizer.step()
        assert float((weight.detach() - before)[:4].abs().max()) <= 1.5 * LR


@either_mode
def test_what_another_state_of_the_handle_lets_go_keeps_the_bound(compact: bool) -> None:
    weight = nn.Parameter(torch.linspace(1, 8, 8))
    frozen = freeze_entries({"weight": weight}, "weight[smallest(0.5)] = 0")
    saved = copy.deepcopy(frozen.state_dict())
    frozen.remove()
    weight.data.copy_(torch.linspace(8, 1, 8))
    frozen = freeze_entries({"weight": weight}, "weight[smallest(0.5)] = 0")
    optimizer = MaskedOptimizer(Adam([weight], lr=LR), frozen, compact=compact)
    for n in range(40):
        if n == 4:
            _age(optimizer)
            frozen.load_state_dict(saved)
        before = weight.detach().clone()
        weight.grad = torch.ones(8)
        optimizer.step()
        if n >= 4:
            assert float((weight.detach() - before)[4:].abs().max()) <= 1.5 * LR
            frozen.assert_frozen()


def test_a_copy_of_what_was_let_go_trains() -> None:
    weight = nn.Parameter(torch.zeros(8))
    frozen = freeze_entries({"weight": weight}, "weight[:4]")
    optimizer = MaskedOptimizer(Adam([weight]), frozen)
    weight.grad = torch.ones(8)
    optimizer.step()
    frozen.remove()
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    twin.param_groups[0]["params"][0].grad = torch.ones(8)
    twin.step()


@either_mode
def test_moments_that_are_loaded_where_entries_were_let_go_before_any_step_stay_as_they_are(compact: bool) -> None:
    """As if a new run chose other entries than the run that it resumes, and loads that choice first."""

    def run(numbers: list[float]) -> tuple[nn.Parameter, MaskedOptimizer, FrozenEntries]:
        weight = nn.Parameter(torch.tensor(numbers))
        frozen = freeze_entries({"weight": weight}, "weight[smallest(0.5)] = 0")
        return weight, MaskedOptimizer(Adam([weight], lr=LR), frozen, compact=compact), frozen

    def step(weight: nn.Parameter, optimizer: Optimizer, count: int) -> None:
        generator = torch.Generator().manual_seed(count)
        optimizer.zero_grad()
        (weight * randn(4, seed=generator)).sum().backward()
        optimizer.step()

    weight, optimizer, frozen = run([1.0, 2.0, 3.0, 4.0])
    again, loading, fresh = run([4.0, 3.0, 2.0, 1.0])
    for count in range(3):
        step(weight, optimizer, count)
    saved = copy.deepcopy(optimizer.state_dict())
    fresh.load_state_dict(frozen.state_dict())
    again.data.copy_(weight.data)
    loading.load_state_dict(copy.deepcopy(saved))
    plain = nn.Parameter(weight.detach().clone())
    reference = Adam([plain], lr=LR)
    reference.load_state_dict(copy.deepcopy(saved))
    for count in range(3, 6):
        step(weight, optimizer, count)
        step(again, loading, count)
        step(plain, reference, count)
        assert same_bits(again, weight)
    assert same_bits(again[2:], plain[2:])
