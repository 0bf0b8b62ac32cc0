"""One step of an optimizer on flat tensors of free entries, in the place of the parameters they are of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._entries.free import FreeEntries
from .._errors import UnsupportedParameterError
from .._held.parameter import FrozenPart


class Slot:
    """One parameter, and the flat tensor of its free entries that the optimizer steps in its place.

    Attributes:
        parameter: The parameter.
        parts: What the handles freeze of it.
        free: Which of its entries are free.
    """

    def __init__(self, parameter: Tensor, parts: list[FrozenPart]) -> None:
        self.parameter = parameter
        self.parts = parts
        self.free = FreeEntries.of(self.frozen, parameter)
        self._made_for = _makings(parameter, parts)
        self._version = -1
        self._is_stray = True

    @property
    def frozen(self) -> Tensor:
        """The bool tensor that is True where any of the parts freezes an entry."""
        frozen = self.parts[0].frozen
        for part in self.parts[1:]:
            frozen = frozen | part.frozen
        return frozen

    def fits(self, parts: list[FrozenPart]) -> bool:
        """Return whether these parts freeze the same entries, of a parameter that still lies as it did."""
        return self._made_for == _makings(self.parameter, parts)

    def flat(self) -> Tensor:
        """Return the free entries and their gradient as a tensor of their own, or as a view of the parameter."""
        self._is_stray = self.parameter._version != self._version
        flat = self.free.take(self.parameter.detach())
        self.give_gradient(flat)
        return flat

    def give_gradient(self, flat: Tensor) -> None:
        """Give a flat tensor the gradient of the free entries."""
        gradient = self._flat_gradient()
        if gradient is not None and gradient.dtype != flat.dtype:
            flat.grad_dtype = gradient.dtype  # type: ignore[attr-defined]  # since torch 2.10, and so is such a gradient
        flat.grad = gradient

    def _flat_gradient(self) -> Tensor | None:
        """Return the gradient of the free entries.

        Raises:
            UnsupportedParameterError: It is sparse.
        """
        gradient = self.parameter.grad
        if gradient is None or not self.free.count:
            return None
        if gradient.layout != torch.strided:
            raise UnsupportedParameterError(
                f"`{self.parts[0].name}` has a gradient of layout {gradient.layout}, and compact=True needs dense ones",
                "make the layer without sparse=True, or leave out compact=True",
            )
        return self.free.take(gradient.detach().resolve_conj().resolve_neg())

    def impose(self) -> None:
        """Write the values into the frozen entries."""
        for part in self.parts:
            part.impose(self.parameter)

    def write_back(self, flat: Tensor) -> None:
        """Write a flat tensor into the free entries; impose the frozen ones if something else was written meanwhile.

        The optimizer never reads or writes a frozen entry. What somebody wrote there through `.data` leaves no trace,
        and is put right by the next forward.
        """
        self.free.put_(self.parameter.detach(), flat)  # counted by autograd, as every step is
        if self._is_stray:
            self.impose()
        self._version, self._is_stray = self.parameter._version, False


def _makings(parameter: Tensor, parts: list[FrozenPart]) -> tuple[Any, ...]:
    """Return what a slot is made from; places are compared by identity, because a part gets new ones to change."""
    return parameter.shape, parameter.stride(), parameter.device, [p.places for part in parts for p in part.pieces]


# --------------------------------------------------------------------------------------------------------------------
# One step


class Stage:
    """One step of an optimizer on the flat tensors: from the gradients it finds to the weights it leaves."""

    def __init__(self, optimizer: Optimizer, slots: Callable[[], dict[Tensor, Slot]]) -> None:
        self._optimizer = optimizer
        self._slots_now = slots
        self._slots: dict[Tensor, Slot] = {}
        self._flats: dict[Tensor, Tensor] = {}
        self._groups: list[dict[str, Any]] | None = None
        self.state: dict[Tensor, Any] = defaultdict(dict)

    @property
    def has_begun(self) -> bool:
        """Whether the flat tensors are made."""
        return self._groups is not None

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups, with flat tensors in the place of parameters.

        They are made when the step first asks for them, which is after every step-pre-hook and every closure but
        that of LBFGS: what those do to gradients and weights is seen.
        """
        if self._groups is None:
            self._slots = self._slots_now()
            self._flats = {parameter: slot.flat() for parameter, slot in self._slots.items()}
            self._groups = [
                {**group, "params": [self._flats.get(parameter, parameter) for parameter in group["params"]]}
                for group in self._optimizer.param_groups
            ]
            for parameter, state in self._optimizer.state.items():
                self.state[self._flats.get(parameter, parameter)] = state
        return self._groups

    def write_weights(self) -> None:
        """Write the flat tensors into the parameters."""
        for parameter, flat in self._flats.items():
            self._slots[parameter].write_back(flat)

    def renew_gradients(self) -> None:
        """Take the gradients anew: a closure has made others."""
        for parameter, flat in self._flats.items():
            self._slots[parameter].give_gradient(flat)

    def end(self) -> None:
        """Hand weights and state over to the optimizer."""
        self.write_weights()
        parameters = {id(flat): parameter for parameter, flat in self._flats.items()}
        for key, state in self.state.items():
            if state:
                self._optimizer.state[parameters.get(id(key), key)] = state


class _StandIn:
    """Mixed into the class of an optimizer: has all that the optimizer has, and the groups and state of a stage."""

    _stage: Stage

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._stage.groups

    @property
    def state(self) -> dict[Tensor, Any]:
        return self._stage.state

    @property
    def _params(self) -> list[Tensor]:  # what LBFGS steps
        params: list[Tensor] = self._stage.groups[0]["params"]
        return params


@cache
def _class_of_stand_ins(kind: Any) -> Any:
    return type(kind.__name__, (_StandIn, kind), {})


def stand_in(optimizer: Optimizer, stage: Stage) -> Any:
    """Return what steps in the optimizer's place: made anew for each step, from what the optimizer is then."""
    kind: Any = type(optimizer)
    made: Any = object.__new__(_class_of_stand_ins(kind))
    vars(made).update(vars(optimizer), _stage=stage, _numel_cache=None)  # LBFGS counts its entries once
    return made
