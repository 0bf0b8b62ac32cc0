"""Frozen entries hold through training, and the free ones follow an optimizer that has only them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from freezehooks import MaskedOptimizer, freeze_entries

from .claims import (
    FreeEntriesAlone,
    assert_entries_hold,
    assert_model_holds,
    assert_training_holds,
    largest_difference,
    parameters_of,
    same_bits,
)
from .zoo import IDS, ZOO, Animal

STEPS = 50

_OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "momentum": lambda parameters, **how: SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=0.01, **how),
    "nesterov": lambda parameters, **how: SGD(parameters, lr=1e-3, momentum=0.9, nesterov=True, **how),
    "adam": lambda parameters, **how: Adam(parameters, lr=1e-2, **how),
    "adamw": lambda parameters, **how: AdamW(parameters, lr=1e-2, weight_decay=0.1, **how),
}
_KERNELS = {"single": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}

optimizers = pytest.mark.parametrize("make", _OPTIMIZERS.values(), ids=_OPTIMIZERS)
kernels = pytest.mark.parametrize("how", _KERNELS.values(), ids=_KERNELS)
animals = pytest.mark.parametrize("animal", ZOO, ids=IDS)


@animals
def test_the_entries_would_move_if_nothing_held_them(animal: Animal) -> None:
    model = animal.model()
    optimizer = AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    held = animal.held(model)
    with torch.no_grad():
        for name, part in held.items():
            model.get_parameter(name)[part.frozen] = part.values[part.frozen]
    for _ in range(3):
        optimizer.zero_grad()
        animal.loss(model, animal.batch()).backward()
        optimizer.step()
    with pytest.raises(AssertionError, match="drifted"):
        assert_model_holds(model, held, "without freezing")


@animals
@kernels
@optimizers
def test_frozen_entries_hold_at_every_point_of_training(
    animal: Animal, make: Callable[..., Optimizer], how: dict[str, Any], device: torch.device
) -> None:
    model = animal.model()
    held = animal.held(model)
    frozen = freeze_entries(model, animal.spec)
    optimizer = MaskedOptimizer(make(model.parameters(), **how), frozen)
    assert_training_holds(animal, model, held, optimizer, STEPS, frozen.assert_frozen)


def _train_beside_reference(
    animal: Animal, make: Callable[..., Optimizer], how: dict[str, Any], same_layout: bool, steps: int = STEPS
) -> tuple[torch.nn.Module, torch.nn.Module]:
    model = animal.model()
    held = animal.held(model)
    reference = FreeEntriesAlone(copy.deepcopy(model), held, lambda parameters: make(parameters, **how), same_layout)
    optimizer = MaskedOptimizer(make(model.parameters(), **how), freeze_entries(model, animal.spec))
    for _ in range(steps):
        batch = animal.batch()
        optimizer.zero_grad()
        animal.loss(model, batch).backward()
        optimizer.step()
        reference.step(partial(_loss_of, animal, batch))
    return model, reference.model


def _loss_of(animal: Animal, batch: tuple[Any, ...], model: torch.nn.Module) -> Tensor:
    return animal.loss(model, batch)


@animals
@kernels
@optimizers
def test_free_entries_follow_the_optimizer_that_holds_them_alone_bit_for_bit(
    animal: Animal, make: Callable[..., Optimizer], how: dict[str, Any]
) -> None:
    ours, theirs = _train_beside_reference(animal, make, how, same_layout="fused" in how)
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    assert all(same_bits(first, second) for first, second in pairs), largest_difference(ours, theirs)


@animals
@optimizers
def test_fused_free_entries_follow_the_flat_ones_to_the_last_rounding(
    animal: Animal, make: Callable[..., Optimizer]
) -> None:
    """Fused kernels round the tail of a tensor differently from its body, and the flat tensor has another tail.

    One step shows it; over many, Adam turns a rounding of a gradient that should be 0 into a step of full size.
    """
    ours, theirs = _train_beside_reference(animal, make, {"fused": True}, same_layout=False, steps=1)
    assert largest_difference(ours, theirs) <= torch.finfo(torch.float32).eps


@animals
def test_a_plain_checkpoint_loads_into_a_frozen_model_and_back(animal: Animal) -> None:
    model, plain = animal.model(), animal.model()
    frozen = freeze_entries(model, animal.spec)
    model.load_state_dict(plain.state_dict(), strict=True)
    assert_model_holds(model, animal.held(plain), "after loading a plain checkpoint")
    plain.load_state_dict(model.state_dict(), strict=True)
    frozen.assert_frozen(guarded=False)
    assert_entries_hold(parameters_of(plain), animal.held(model), "in the plain model")


@animals
def test_removal_leaves_no_trace(animal: Animal) -> None:
    model = animal.model()
    before = _footprint(model)
    frozen = freeze_entries(model, animal.spec)
    assert _footprint(model) != before
    frozen.remove()
    frozen.remove()
    assert _footprint(model) == before


def _footprint(model: torch.nn.Module) -> list[Any]:
    """The hooks and attributes of a model, its modules and its parameters."""
    modules = [
        (sorted(vars(module)), {name: len(value) for name, value in vars(module).items() if name.endswith("_hooks")})
        for module in model.modules()
    ]
    parameters = [
        (name, id(parameter), len(parameter._post_accumulate_grad_hooks or {}), len(parameter._backward_hooks or {}))  # type: ignore[attr-defined]
        for name, parameter in model.named_parameters(remove_duplicate=False)
    ]
    return [modules, parameters, list(model.state_dict())]


def test_momentum_alone_moves_an_entry_whose_gradient_is_zeroed() -> None:
    """Why an optimizer must be guarded: otherwise frozen entries drift."""
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = SGD([weight], lr=0.1, momentum=0.9)
    weight.grad = torch.ones(4)
    optimizer.step()
    frozen = freeze_entries({"weight": weight}, "weight[0] = 1")
    _backward(weight)
    optimizer.step()
    assert weight[0] != 1
    frozen.guard(optimizer)
    _backward(weight)
    optimizer.step()
    assert weight[0] == 1


def _backward(weight: Tensor) -> None:
    weight.grad = None
    weight.sum().backward()
