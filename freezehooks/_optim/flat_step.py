"""A step of an optimizer on flat tensors of free entries, in the place of the parameters they are of."""

from __future__ import annotations

from collections import defaultdict
from functools import cache, reduce
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._entries.entry_set import EntrySet
from .._entries.flat_order import FlatOrder
from .._errors import UnsupportedParameterError
from .._held.constraint import Constraint
from .._held.parameter import FrozenParameter
from .._ranks.sharding import local, local_gradient


class FlatParameter:
    """The free entries of one parameter, as a flat tensor that the optimizer steps in the parameter's place.

    The flat tensor and the memory for its gradient are made once. Where the free entries lie in one piece, it is a
    view of the parameter, and a step needs neither.

    Attributes:
        parameter: The parameter.
        held: What the handles freeze of it.
        free: Which of its entries are free, one after another.
        flat: The flat tensor.
    """

    def __init__(self, parameter: Tensor, held: list[FrozenParameter]) -> None:
        self.parameter = parameter
        self.held = held
        self.free: FlatOrder = EntrySet.like(self._here, self.frozen).complement().order
        self._memory = self._here
        self._constraints = constraints_of(held)
        self._gradient: Tensor | None = None
        self._version = -1
        self._is_stray = True
        self.flat = self.free.gather(self._counted)
        self._is_view = self.flat.untyped_storage().data_ptr() == self._here.untyped_storage().data_ptr()

    @property
    def _here(self) -> Tensor:
        """What of the parameter lies on this rank; writes to it are not counted by autograd."""
        return local(self.parameter).data

    @property
    def _counted(self) -> Tensor:
        """The same, counted with the parameter."""
        return local(self.parameter).detach()

    @property
    def frozen(self) -> Tensor:
        """The bool tensor that is True where any of the handles freezes an entry, of those on this rank."""
        none = torch.zeros_like(self._here, dtype=torch.bool)
        return reduce(torch.logical_or, [each.frozen for each in self.held], none)

    @property
    def nbytes(self) -> int:
        """The memory that it takes between steps, in bytes."""
        copies = [] if self._is_view else [self.flat, self._gradient]
        return self.free.nbytes + sum(copy.nbytes for copy in copies if copy is not None)

    def fits(self, held: list[FrozenParameter]) -> bool:
        """Return whether these freeze the same entries, of a parameter that still lies where it did."""
        in_place = not self.parameter.is_meta and self._here.is_set_to(self._memory)
        return in_place and self._constraints == constraints_of(held)

    def gather(self) -> None:
        """Take the free entries, and their gradient, from the parameter."""
        self._is_stray = self._counted._version != self._version
        if not self._is_view:
            self.free.gather(self._counted, out=self.flat)
        self.gather_gradient()

    def gather_gradient(self) -> None:
        """Take the gradient of the free entries from the parameter.

        Raises:
            UnsupportedParameterError: It is sparse.
        """
        gradient = self._flat_gradient()
        if gradient is not None and gradient.dtype != self.flat.dtype:
            self.flat.grad_dtype = gradient.dtype  # type: ignore[attr-defined]  # since torch 2.10, and so are those
        self.flat.grad = gradient

    def _flat_gradient(self) -> Tensor | None:
        gradient = local_gradient(self.parameter)
        if gradient is None:
            return None
        if gradient.layout != torch.strided:
            name = f"`{self.held[0].name}`" if self.held else "a parameter"
            raise UnsupportedParameterError(
                f"{name} has a gradient of layout {gradient.layout}, and compact=True needs dense ones",
                "make the layer without sparse=True, or leave out compact=True",
            )
        plain = gradient.detach().resolve_conj().resolve_neg()
        if self._is_view:
            return self.free.gather(plain)
        if self._gradient is None or self._gradient.dtype != plain.dtype:
            self._gradient = torch.empty_like(self.flat, dtype=plain.dtype)
        return self.free.gather(plain, out=self._gradient)

    def impose(self) -> None:
        """Write the values into the frozen entries."""
        for held in self.held:
            held.impose(self.parameter)

    def scatter(self) -> None:
        """Write the flat tensor into the free entries; impose the frozen ones if something else was written meanwhile.

        The optimizer never reads or writes a frozen entry. What somebody wrote there through `.data` leaves no trace,
        and is put right by the next forward.
        """
        self.free.scatter_(self._counted, self.flat)  # counted by autograd, as every step is
        if self._is_stray:
            self.impose()
        self._version, self._is_stray = self._counted._version, False


def constraints_of(held: list[FrozenParameter]) -> list[Constraint]:
    """Return what decides which entries are free; constraints are compared by identity, as they do not change."""
    return [constraint for each in held for constraint in each.constraints]


# --------------------------------------------------------------------------------------------------------------------
# A step


class FlatStep:
    """An optimizer's groups and state with flat tensors in the place of parameters, and the object that steps them.

    All of it is made once for the same parameters. A step takes what the groups say at its beginning, and leaves the
    state that it makes under the model's own parameters.

    Attributes:
        parameters: The flat parameters, by the model's.
        state: The optimizer's state, by flat tensor or by parameter.
    """

    def __init__(self, optimizer: Optimizer, parameters: dict[Tensor, FlatParameter]) -> None:
        self.parameters = parameters
        self.state: dict[Tensor, Any] = defaultdict(dict)
        self._groups: list[dict[str, Any]] = []
        kind: Any = type(optimizer)
        self._proxy: Any = object.__new__(_proxy_class(kind))
        self._optimizer: Optimizer | None = None
        self.has_begun = False

    def prepare(self, optimizer: Optimizer) -> Any:
        """Return what steps in the optimizer's place; it begins when the step first asks for its groups."""
        self._optimizer, self.has_begun = optimizer, False
        vars(self._proxy).update(vars(optimizer), _flat_step=self, _numel_cache=None)  # LBFGS counts its entries once
        return self._proxy

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups, with flat tensors in the place of parameters.

        Gradients and weights are taken when the step first asks for them, which is after every step-pre-hook and every
        closure but that of LBFGS: what those do is seen.
        """
        if not self.has_begun and self._optimizer is not None:
            self._begin(self._optimizer)
        return self._groups

    def _begin(self, optimizer: Optimizer) -> None:
        for flat in self.parameters.values():
            flat.gather()
        self._groups = [
            {**group, "params": [self._stepped(parameter) for parameter in group["params"]]}
            for group in optimizer.param_groups
        ]
        self.state.clear()
        for parameter, state in optimizer.state.items():
            self.state[self._stepped(parameter)] = state
        self.has_begun = True

    def _stepped(self, parameter: Tensor) -> Tensor:
        flat = self.parameters.get(parameter)
        return parameter if flat is None else flat.flat

    def scatter(self) -> None:
        """Write the flat tensors into the parameters."""
        if self.has_begun:
            for flat in self.parameters.values():
                flat.scatter()

    def gather_gradients(self) -> None:
        """Take the gradients anew: a closure has made others."""
        if self.has_begun:
            for flat in self.parameters.values():
                flat.gather_gradient()

    def finish(self) -> None:
        """Hand weights and state over to the optimizer."""
        optimizer = self._optimizer
        if optimizer is not None and self.has_begun:
            self.scatter()
            parameters = {id(flat.flat): parameter for parameter, flat in self.parameters.items()}
            for key, state in self.state.items():
                if state:
                    optimizer.state[parameters.get(id(key), key)] = state
        self.leave()

    def leave(self) -> None:
        """Let go of the optimizer, and of what the step took from it."""
        self._optimizer, self.has_begun = None, False
        self._groups = []
        self.state.clear()
        vars(self._proxy).clear()
        for flat in self.parameters.values():
            flat.flat.grad = None


class _OptimizerProxy:
    """Mixed into the class of an optimizer: has all that the optimizer has, and the groups and state of a flat step."""

    _flat_step: FlatStep

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._flat_step.groups

    @property
    def state(self) -> dict[Tensor, Any]:
        return self._flat_step.state

    @property
    def _params(self) -> list[Tensor]:  # what LBFGS steps
        params: list[Tensor] = self._flat_step.groups[0]["params"]
        return params


@cache
def _proxy_class(kind: Any) -> Any:
    return type(kind.__name__, (_OptimizerProxy, kind), {})
