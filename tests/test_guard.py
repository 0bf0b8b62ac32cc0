"""Around the step: closures, gradients set by hand, warm state, state that holds weights, LBFGS, mixing optimizers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adadelta, Adafactor, Adagrad, Adam, AdamW, Optimizer, Rprop, SparseAdam
from torch.optim.optimizer import register_optimizer_step_post_hook

from freezehooks import MaskedOptimizer, freeze_entries

from .claims import same_bits
from .draws import randn

MASK = torch.zeros(4, 5, dtype=torch.bool)
MASK[0] = MASK[2, ::2] = True


def _loss(weight: Tensor, batch: Tensor) -> Tensor:
    return torch.sum((torch.tanh(batch @ weight.T) - 0.2) ** 2)


def test_a_closure_sees_the_values_and_leaves_clean_gradients() -> None:
    weight = nn.Parameter(torch.randn(4, 5))
    frozen = freeze_entries({"weight": weight}, {"weight": (MASK, -0.0)})
    optimizer = MaskedOptimizer(SGD([weight], lr=0.1, momentum=0.9), frozen)

    def closure() -> float:
        assert same_bits(weight[MASK], torch.full((8,), -0.0))
        weight.grad = torch.ones(4, 5)  # by hand, past every hook
        return 4.25

    weight.data.fill_(3)
    assert optimizer.step(closure) == 4.25
    assert optimizer.step(closure=closure) == 4.25
    assert weight.grad is not None
    assert same_bits(weight.grad[MASK], torch.zeros(8))
    assert not bool(optimizer.state[weight]["momentum_buffer"][MASK].any())


@pytest.mark.parametrize("search", [None, "strong_wolfe"], ids=["fixed", "strong_wolfe"])
@pytest.mark.parametrize("value", [0.0, -0.0, 0.7], ids=str)
def test_lbfgs_works_in_the_free_subspace(value: float, search: str | None) -> None:
    """In float64 and over few steps: its sums over all entries have another order than those over the free ones."""
    batch, weight = torch.randn(9, 5, dtype=torch.float64), nn.Parameter(torch.randn(4, 5, dtype=torch.float64))
    values = torch.full((8,), value, dtype=torch.float64)
    free = weight.detach()[~MASK].requires_grad_()
    optimizer: Optimizer = LBFGS([weight], lr=0.1, max_iter=4, line_search_fn=search)
    optimizer = MaskedOptimizer(optimizer, freeze_entries({"weight": weight}, {"weight": (MASK, value)}))
    reference = LBFGS([free], lr=0.1, max_iter=4, line_search_fn=search)

    def closure() -> Tensor:
        assert same_bits(weight[MASK], values)
        optimizer.zero_grad()
        loss = _loss(weight, batch)
        loss.backward()
        return loss

    def reference_closure() -> Tensor:
        reference.zero_grad()
        loss = _loss(torch.full_like(weight, value).masked_scatter(~MASK, free), batch)
        loss.backward()
        return loss

    for _ in range(2):
        loss, expected = optimizer.step(closure), reference.step(reference_closure)
        assert same_bits(weight[MASK], values)
        torch.testing.assert_close(loss, torch.as_tensor(expected))
        torch.testing.assert_close(weight[~MASK], free)


def _warm(make: Callable[[list[Tensor]], Optimizer], weight: nn.Parameter, steps: int = 5) -> Optimizer:
    optimizer = make([weight])
    _train(optimizer, weight, steps)
    return optimizer


def _train(optimizer: Optimizer, weight: Tensor, steps: int) -> None:
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        optimizer.zero_grad()
        _loss(weight, randn(6, 5, seed=generator)).backward()
        optimizer.step()


_WARM: dict[str, Callable[[list[Tensor]], Optimizer]] = {
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam_amsgrad": lambda p: Adam(p, lr=0.1, amsgrad=True),
    "adamw": lambda p: AdamW(p, lr=0.1, weight_decay=0.1),
    "adadelta": lambda p: Adadelta(p, weight_decay=0.1),
}


@pytest.mark.parametrize("make", _WARM.values(), ids=_WARM)
def test_freezing_in_mid_training_zeroes_the_moments_and_holds(make: Callable[[list[Tensor]], Optimizer]) -> None:
    weight = nn.Parameter(torch.randn(4, 5))
    optimizer = _warm(make, weight)
    frozen = freeze_entries({"weight": weight}, {"weight": MASK})
    before = weight.detach().clone()
    MaskedOptimizer(optimizer, frozen)
    moments = [value for value in optimizer.state[weight].values() if value.shape == weight.shape]
    assert moments
    for value in moments:
        assert not bool(value[MASK].any())
        assert bool((value[~MASK] != 0).all())
    _train(optimizer, weight, 3)
    assert same_bits(weight[MASK], before[MASK])
    assert bool((weight[~MASK] != before[~MASK]).all())


def test_loaded_state_of_an_unfrozen_run_is_settled() -> None:
    weight = nn.Parameter(torch.randn(4, 5))
    state = copy.deepcopy(_warm(_WARM["momentum"], weight).state_dict())
    optimizer = MaskedOptimizer(_WARM["momentum"]([weight]), freeze_entries({"weight": weight}, {"weight": MASK}))
    optimizer.load_state_dict(state)
    buffer = optimizer.state[weight]["momentum_buffer"]
    assert not bool(buffer[MASK].any())
    assert same_bits(buffer[~MASK], state["state"][0]["momentum_buffer"][~MASK])


def test_settled_state_is_what_an_entry_that_never_moved_would_have() -> None:
    weight = nn.Parameter(torch.randn(4, 5))
    for make, name, start in (
        (lambda p: Rprop(p, lr=0.03), "step_size", 0.03),
        (lambda p: Adagrad(p, initial_accumulator_value=0.25), "sum", 0.25),
    ):
        optimizer = _warm(make, weight)
        with freeze_entries({"weight": weight}, {"weight": MASK}) as frozen:
            frozen.guard(optimizer)
            assert same_bits(optimizer.state[weight][name][MASK], torch.full((8,), start))


def test_state_that_holds_weights_gets_the_values() -> None:
    weight = nn.Parameter(torch.randn(4, 5))
    optimizer = _warm(lambda p: torch.optim.ASGD(p, t0=2, weight_decay=0.1), weight)
    guarded = MaskedOptimizer(optimizer, freeze_entries({"weight": weight}, {"weight": (MASK, 1.5)}))
    for _ in range(3):
        average = optimizer.state[weight]["ax"]
        assert average.shape == weight.shape
        assert same_bits(average[MASK], torch.full((8,), 1.5))
        _train(guarded, weight, 1)


def test_a_parameter_of_no_dimensions_keeps_its_step_count() -> None:
    weight = nn.Parameter(torch.tensor(2.0))
    optimizer = MaskedOptimizer(Adam([weight]), freeze_entries({"weight": weight}, "weight = 1"))
    for _ in range(3):
        weight.grad = torch.tensor(1.0)
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[weight]["step"] == 3


@pytest.mark.parametrize("steps_before", [0, 3], ids=["fresh", "warm"])
def test_lbfgs_forgets_a_history_that_moves_frozen_entries_and_keeps_a_clean_one(steps_before: int) -> None:
    weight, steepness = nn.Parameter(torch.randn(4, 5)), torch.linspace(1, 2, 20).view(4, 5)
    optimizer = LBFGS([weight], lr=0.1, max_iter=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.sum(weight.square() * steepness)
        loss.backward()
        return loss

    for _ in range(steps_before):
        optimizer.step(closure)
    frozen = freeze_entries({"weight": weight}, {"weight": MASK})
    frozen.guard(optimizer)
    assert not optimizer.state[weight]
    optimizer.step(closure)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[weight]["old_dirs"]
    frozen.assert_frozen()


def _muon(parameters: list[Tensor]) -> Optimizer:
    return torch.optim.Muon(parameters, lr=0.05, weight_decay=0)


def _adafactor(parameters: list[Tensor]) -> Optimizer:
    return Adafactor(parameters, lr=0.05)


_since_2_9 = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon since 2.9")


@pytest.mark.parametrize("make", [pytest.param(_muon, marks=_since_2_9), _adafactor], ids=["muon", "adafactor"])
def test_mixing_optimizers_follow_the_model_that_computes_with_the_values(
    make: Callable[[list[Tensor]], Optimizer],
) -> None:
    """Their update of one entry depends on others: the reference has all of them and masks the frozen ones."""
    weight = nn.Parameter(torch.randn(4, 5))
    latent = nn.Parameter(torch.where(MASK, torch.tensor(0.5), weight.detach()))
    optimizer = MaskedOptimizer(make([weight]), freeze_entries({"weight": weight}, {"weight": (MASK, 0.5)}))
    reference = make([latent])
    for seed in range(5):
        batch = randn(6, 5, seed=seed)
        optimizer.zero_grad()
        _loss(weight, batch).backward()
        assert weight.grad is not None
        weight.grad[MASK] = 9.0  # as a reducer or a user might write something back
        optimizer.step()
        reference.zero_grad()
        _loss(torch.where(MASK, torch.tensor(0.5), latent), batch).backward()
        reference.step()
        assert same_bits(weight[MASK], torch.full((8,), 0.5))
        if make is _muon:
            assert same_bits(weight[~MASK], latent[~MASK])
        else:  # scales by the norm of the whole weight, of which the reference's frozen entries have left the values
            torch.testing.assert_close(weight[~MASK], latent[~MASK])


def test_sparse_adam_holds() -> None:
    embedding = nn.Embedding(10, 3, sparse=True)
    before = embedding.weight.detach().clone()
    frozen = freeze_entries(embedding, "weight[:6]\nweight[8, 1]")
    optimizer = MaskedOptimizer(SparseAdam(embedding.parameters(), lr=0.1), frozen)
    for _ in range(4):
        optimizer.zero_grad()
        embedding(torch.tensor([1, 1, 5, 7, 8])).square().sum().backward()
        optimizer.step()
    assert same_bits(embedding.weight[:6], before[:6])
    assert bool((embedding.weight[7] != before[7]).all())
    assert (embedding.weight[8] != before[8]).tolist() == [True, False, True]


def test_whoever_looks_after_the_step_sees_the_values() -> None:
    weight = nn.Parameter(torch.ones(4, 5))
    seen: list[bool] = []

    def look(*args: Any) -> None:
        seen.append(bool((weight[MASK] == 1).all()))

    optimizer = SGD([weight], lr=0.1, weight_decay=0.5)
    optimizer.register_step_post_hook(look)  # before the guard is there
    everywhere = register_optimizer_step_post_hook(look)
    try:
        guarded = MaskedOptimizer(optimizer, freeze_entries({"weight": weight}, {"weight": (MASK, 1)}))
        guarded.register_step_post_hook(look)
        _train(guarded, weight, 1)
    finally:
        everywhere.remove()
    assert seen == [True] * 3


def test_two_optimizers_over_one_model_hold_what_each_steps() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    frozen = freeze_entries(model, "*.weight[0] = 1")
    optimizers = [
        MaskedOptimizer(AdamW(layer.parameters(), lr=0.1, weight_decay=0.1), frozen) for layer in model.children()
    ]
    for _ in range(3):
        model(torch.randn(2, 3)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            frozen.assert_frozen()


def test_one_optimizer_over_two_models_holds_both() -> None:
    models = [nn.Linear(3, 3), nn.Linear(3, 3)]
    handles = [freeze_entries(model, f"weight[{n}] = {n}") for n, model in enumerate(models)]
    optimizer = MaskedOptimizer(AdamW([p for m in models for p in m.parameters()], lr=0.1), handles)
    for _ in range(3):
        sum((m(torch.ones(1, 3)).sum() for m in models), torch.tensor(0.0)).backward()
        optimizer.step()
    assert models[0].weight[0].tolist() == [0] * 3
    assert models[1].weight[1].tolist() == [1] * 3


@pytest.fixture
def _no_warning_of_the_compiler() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch")
        yield


@pytest.mark.usefixtures("_no_warning_of_the_compiler")
def test_a_compiled_step_holds() -> None:
    torch.compiler.reset()
    weight = nn.Parameter(torch.randn(4, 5))
    frozen = freeze_entries({"weight": weight}, {"weight": (MASK, 0.5)})
    optimizer = MaskedOptimizer(AdamW([weight], lr=0.1, weight_decay=0.1), frozen)
    step = torch.compile(optimizer.step, backend="aot_eager")
    before = weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        _loss(weight, torch.randn(6, 5)).backward()
        step()
        assert same_bits(weight[MASK], torch.full((8,), 0.5))
    assert bool((weight[~MASK] != before[~MASK]).all())


def test_a_parameter_that_joins_or_is_replaced_in_a_step_hook_is_held() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    frozen = freeze_entries(model, "*.weight[0] = 1")
    optimizer = AdamW(model[0].parameters(), lr=0.1, weight_decay=0.5)
    frozen.guard(optimizer)

    def change(*args: object) -> None:
        if len(optimizer.param_groups) == 1:
            optimizer.add_param_group({"params": list(model[1].parameters())})
        optimizer.param_groups[0]["params"][0] = model[0].weight = nn.Parameter(torch.ones(2, 2))
        model[0].weight.grad = torch.ones(2, 2)

    optimizer.register_step_pre_hook(change)
    model(torch.ones(1, 2)).sum().backward()
    with pytest.warns(UserWarning, match=r"`0\.weight` was replaced"):
        optimizer.step()
    assert frozen.violations() == ()


def test_what_is_thawed_in_a_step_hook_is_stepped_freely() -> None:
    model = nn.Linear(2, 2)
    frozen = freeze_entries(model, "weight[0] = 1\nbias[0] = 1")
    optimizer = SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    frozen.guard(optimizer)
    optimizer.register_step_pre_hook(lambda *args: frozen.thaw("weight"))
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert model.weight[0].tolist() == pytest.approx([0.95, 0.95])
    frozen.assert_frozen()


@pytest.mark.parametrize("step_inside", [False, True])
def test_gradients_made_in_inference_mode_are_cleaned(step_inside: bool) -> None:
    weight = nn.Parameter(torch.zeros(4, 5))
    frozen = freeze_entries({"weight": weight}, {"weight": MASK})
    optimizer = MaskedOptimizer(Adam([weight]), frozen)
    with torch.inference_mode():
        weight.grad = torch.ones(4, 5)
        if step_inside:
            optimizer.step()
    if not step_inside:
        optimizer.step()
    frozen.assert_frozen()
    assert not optimizer.state[weight]["exp_avg"][MASK].any()
    assert bool((weight[~MASK] != 0).all())


def test_a_gradient_in_the_memory_of_one_that_was_cleaned_is_cleaned() -> None:
    weight = nn.Parameter(torch.zeros(4, 4))
    frozen = freeze_entries({"weight": weight}, "weight[0] = 0")
    optimizer = MaskedOptimizer(Adam([weight]), frozen)
    weight.sum().backward()
    assert weight.grad is not None
    weight.grad = weight.grad.t()  # counts the writes of both
    optimizer.step()
    assert not optimizer.state[weight]["exp_avg"][0].any()
