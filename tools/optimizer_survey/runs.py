"""A small model in training under one optimizer: free, frozen by the library, or frozen by hand."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from freezehooks import FrozenEntries, MaskedOptimizer, entries, freeze_entries, keep

from .subjects import Subject

if TYPE_CHECKING:
    from typing_extensions import Self

NUMBER: Final = 0.5
"""The number at which entries are frozen."""

State = tuple[dict[str, Tensor], Any]
"""The saved state of a run: that of the model, and that of the optimizer."""


class Run:
    """A model in training, with nothing frozen.

    Args:
        subject: The optimizer.
        state: What an earlier run saved, to go on from.
    """

    def __init__(self, subject: Subject, state: State | None = None) -> None:
        _seed(0)
        self.subject = subject
        self.model = subject.model()
        if state is not None:
            self.model.load_state_dict(state[0])
        self.freeze()
        self.optimizer: Any = self.wrapped(subject.make(self.model))
        if state is not None:
            self.optimizer.load_state_dict(state[1])
        if hasattr(self.optimizer, "train"):  # of schedule-free ones
            self.optimizer.train()

    def freeze(self) -> None:
        """Freeze the entries, before there is an optimizer."""

    def wrapped(self, optimizer: Any) -> Any:
        """Return the optimizer to step, which may be a wrapper."""
        return optimizer

    def impose(self) -> None:
        """Write the values, if the library does not."""

    def let_go(self) -> None:
        """Thaw everything."""

    def step(self, number: int) -> None:
        """Make a training step; the same number gives the same batch, and the same random numbers to the optimizer."""
        _seed(number)
        batch = torch.randn(5, 2, 4, 4)

        def backward(go: Callable[[Tensor], None] = Tensor.backward) -> Tensor:
            self.impose()
            self.model.zero_grad()
            with torch.enable_grad():
                loss: Tensor = self.model(batch).sin().square().mean()
                go(loss)
            return loss.detach()

        self.subject.advance(self.optimizer, backward)
        self.impose()

    def steps(self, numbers: range) -> None:
        """Make several training steps."""
        for number in numbers:
            self.step(number)

    def weights(self) -> dict[str, Tensor]:
        """Return copies of the parameters by name."""
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    def saved(self) -> State:
        """Return the state to save."""
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))

    def copied(self) -> Self:
        """Return a copy of the run, made by copying model and optimizer."""
        twin = object.__new__(type(self))
        twin.__dict__.update(vars(self))
        twin.model, twin.optimizer = copy.deepcopy((self.model, self.optimizer))
        return twin


class Guarded(Run):
    """A run whose frozen entries the library holds."""

    frozen: FrozenEntries

    def freeze(self) -> None:
        self.frozen = freeze_entries(self.model, spec_of(self.model))

    def wrapped(self, optimizer: Any) -> Any:
        return MaskedOptimizer(optimizer, self.frozen)

    def let_go(self) -> None:
        self.frozen.remove()


class ByHand(Run):
    """A run whose gradients are zeroed by hand at frozen entries, and whose values are written by hand."""

    def freeze(self) -> None:
        self.values = values_of(self.model)
        self._clean_gradients()
        self.impose()

    def _clean_gradients(self) -> None:
        frozen = frozen_of(self.model)
        self.hooks = [
            parameter.register_post_accumulate_grad_hook(_Clean(frozen[name]))
            for name, parameter in self.model.named_parameters()
        ]

    def impose(self) -> None:
        if self.hooks:
            frozen = frozen_of(self.model)
            for name, parameter in self.model.named_parameters():
                parameter.data.copy_(torch.where(frozen[name], self.values[name], parameter.data))

    def let_go(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def copied(self) -> Self:
        twin = super().copied()
        twin._clean_gradients()  # a copied tensor has no hooks
        return twin


class _Clean:
    def __init__(self, frozen: Tensor) -> None:
        self.frozen = frozen

    def __call__(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is not None:
            parameter.grad = torch.where(self.frozen, torch.zeros_like(gradient), gradient)


def spec_of(model: nn.Module) -> dict[str, Any]:
    """Return the spec: a row at a number, scattered entries at what they hold, and scattered ones at a number."""
    spec: dict[str, Any] = {}
    for number, (name, frozen) in enumerate(frozen_of(model).items()):
        spec[name] = ((entries[0], NUMBER), (frozen, keep), (frozen, NUMBER))[number % 3]
    return spec


def frozen_of(model: nn.Module) -> dict[str, Tensor]:
    """Return which entries are frozen, by the name of their parameter."""
    named = enumerate(model.named_parameters())
    return {name: _first_row(each.shape) if n % 3 == 0 else _scattered(each.shape) for n, (name, each) in named}


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """Return their values by the name of their parameter: what they hold now, or a number."""
    named = enumerate(model.named_parameters())
    return {name: each.detach().clone() if n % 3 == 1 else torch.tensor(NUMBER) for n, (name, each) in named}


def _first_row(shape: torch.Size) -> Tensor:
    frozen = torch.zeros(shape, dtype=torch.bool)
    frozen[0] = True
    return frozen


def _scattered(shape: torch.Size) -> Tensor:
    return (torch.arange(shape.numel()) % 3 == 0).view(shape)


def _seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)  # which some optimizers draw from
