"""The promises as assertions; every comparison is of bits, so that nan equals nan and -0.0 is not 0.0."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .zoo import Animal, Held

held_twice = pytest.mark.filterwarnings("ignore:.* held by an earlier handle already")
"""Marks a test in which two handles hold some of the same entries, of which `freeze_entries` warns."""


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors are equal to the last bit."""
    assert first.dtype == second.dtype
    assert first.shape == second.shape
    return _bytes(first).equal(_bytes(second))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def assert_entries_hold(tensors: dict[str, Tensor], held: dict[str, Held], when: str) -> None:
    """Claim: every frozen entry equals its value, bit for bit."""
    for name, part in held.items():
        found = tensors[name].detach()[part.frozen]
        assert same_bits(found, part.values[part.frozen].to(found.dtype)), f"{name} drifted {when}"


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


def assert_model_holds(model: nn.Module, held: dict[str, Held], when: str) -> None:
    assert_entries_hold(parameters_of(model), held, when)


def assert_gradients_clean(model: nn.Module, held: dict[str, Held]) -> None:
    """Claim: the gradient at every frozen entry is exactly +0.0."""
    for name, part in held.items():
        gradient = parameters_of(model)[name].grad
        assert gradient is not None
        assert not bool(_bytes(gradient[part.frozen]).any()), f"the gradient of {name} is not +0.0 at frozen entries"


@contextmanager
def watched_forward(model: nn.Module, held: dict[str, Held]) -> Iterator[None]:
    """Claim: inside the block, every module computes with the values."""
    seen: list[str] = []

    def look(module: nn.Module, args: Any) -> None:
        local = {name: held[name] for name in held if model.get_submodule(name.rpartition(".")[0]) is module}
        seen.extend(local)
        assert_model_holds(model, local, "inside forward")

    handles = [module.register_forward_pre_hook(look) for module in model.modules()]
    yield
    for handle in handles:
        handle.remove()
    uncalled = {name for name in held if ".out_proj." in name}
    assert set(held) - uncalled <= set(seen)


def assert_training_holds(
    animal: Animal,
    model: nn.Module,
    held: dict[str, Held],
    optimizer: Optimizer,
    steps: int,
    each_step: Callable[[], None] = lambda: None,
) -> None:
    """Claim: through a training run every frozen entry holds at every point where anyone can look."""
    for _ in range(steps):
        batch = animal.batch()
        optimizer.zero_grad()
        with watched_forward(model, held):
            loss = animal.loss(model, batch)
        loss.backward()
        assert_gradients_clean(model, held)
        optimizer.step()
        assert_model_holds(model, held, "after the step")
        assert_entries_hold(model.state_dict(), held, "in state_dict()")
        each_step()


class FreeEntriesAlone:
    """The reference: a plain model, and an optimizer that steps its free entries in separate tensors.

    Frozen entries are constants of the model that no optimizer has. The free entries are in a flat tensor or, with
    `same_layout`, where they are in the model, between unused numbers: vectorized kernels may round the last few
    entries of a tensor differently, and only the second form is comparable bit for bit under them.
    """

    def __init__(
        self,
        model: nn.Module,
        held: dict[str, Held],
        make: Callable[[list[Tensor]], Optimizer],
        same_layout: bool = False,
    ) -> None:
        self.model = model
        named = dict(model.named_parameters())
        self.held = {name: part for name, part in held.items() if name in named}
        self.taken = {name: ~part.frozen | same_layout for name, part in held.items()}
        self.free = {name: self._cut(name, named[name]).requires_grad_() for name in self.held}
        self.optimizer = make([self.free.get(name, parameter) for name, parameter in named.items()])
        self._write()

    def _cut(self, name: str, tensor: Tensor) -> Tensor:
        whole = bool(self.taken[name].all())
        return tensor.detach().clone() if whole else tensor.detach()[self.taken[name]]

    def _write(self) -> None:
        for name, part in self.held.items():
            weight = self.model.get_parameter(name).data
            free = self.free[name].detach()
            weight[self.taken[name]] = free[self.taken[name]] if free.shape == weight.shape else free
            weight[part.frozen] = part.values[part.frozen]

    def step(self, loss: Callable[[nn.Module], Tensor]) -> None:
        self.model.zero_grad()
        loss(self.model).backward()
        for name, part in self.held.items():
            gradient = self.model.get_parameter(name).grad
            assert gradient is not None
            self.free[name].grad = self._cut(name, gradient.clone().masked_fill_(part.frozen, 0))
        self.optimizer.step()
        self._write()


def largest_difference(first: nn.Module, second: nn.Module) -> float:
    """Return the largest difference between two models' parameters, relative to the parameter's largest entry."""
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return max(float(((a - b).abs().max() / b.abs().max()).detach()) for a, b in pairs)
