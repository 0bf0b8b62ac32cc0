"""Runs the step of an optimizer on flat tensors of free entries instead of whole parameters."""

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
from .._ranks.sharding import is_sharded, local, summed_gradient


class FlatParameter:
    """The free entries of one parameter, as a flat tensor that the optimizer steps instead.

    The flat tensor and the memory for its gradient are allocated once. If the free entries are contiguous, the flat
    tensor is a view of the parameter, and neither is needed.

    Attributes:
        parameter: The parameter.
        held: What the handles freeze in it.
        free: The order of its free entries.
        flat: The flat tensor.
    """

    def __init__(self, parameter: Tensor, held: list[FrozenParameter]) -> None:
        self.parameter = parameter
        self.held = held
        self.free: FlatOrder = EntrySet.like(self._here, self.frozen).complement().order
        self._memory = self._here
        self._constraints = constraints_of(held)
        self._gradient: Tensor | None = None
        self._known_writes = -1
        self._is_stray = True
        self.flat = self.free.gather(self._counted)
        self._is_view = self.flat.untyped_storage().data_ptr() == self._here.untyped_storage().data_ptr()

    @property
    def _here(self) -> Tensor:
        """This rank's shard of the parameter, or all of it; writes do not move the version counter."""
        return local(self.parameter).data

    @property
    def _counted(self) -> Tensor:
        """The same memory; writes move the parameter's version counter."""
        return local(self.parameter).detach()

    @property
    def _writes(self) -> int:
        """How many writes autograd has counted; an operation on a sharded tensor counts there, not at the shard."""
        parameter = self.parameter
        return parameter._version + (local(parameter)._version if is_sharded(parameter) else 0)

    @property
    def frozen(self) -> Tensor:
        """The bool tensor, of this rank's shard, that is True at the entries that any of the handles freezes."""
        none = torch.zeros_like(self._here, dtype=torch.bool)
        return reduce(torch.logical_or, [each.frozen for each in self.held], none)

    @property
    def nbytes(self) -> int:
        """The memory used between steps, in bytes."""
        copies = [] if self._is_view else [self.flat, self._gradient]
        return self.free.nbytes + sum(copy.nbytes for copy in copies if copy is not None)

    def fits(self, held: list[FrozenParameter]) -> bool:
        """Return whether the given handles freeze the same entries, and the parameter is still in the same memory."""
        in_place = not self.parameter.is_meta and self._here.is_set_to(self._memory)
        return in_place and self._constraints == constraints_of(held)

    def gather(self) -> None:
        """Read the free entries and their gradient from the parameter."""
        self._is_stray = self._writes != self._known_writes
        if not self._is_view:
            self.free.gather(self._counted, out=self.flat)
        self.gather_gradient()

    def gather_gradient(self) -> None:
        """Read the gradient of the free entries from the parameter.

        Raises:
            UnsupportedParameterError: It is sparse.
        """
        gradient = self._flat_gradient()
        if gradient is not None and gradient.dtype != self.flat.dtype:
            self.flat.grad_dtype = gradient.dtype  # type: ignore[attr-defined]  # such gradients exist since torch 2.10
        self.flat.grad = gradient

    def _flat_gradient(self) -> Tensor | None:
        gradient = summed_gradient(self.parameter)
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
        """Write the flat tensor into the free entries, and impose if anything else wrote to the parameter meanwhile.

        The optimizer itself never reads or writes a frozen entry. A write through `.data` goes unnoticed, and is
        corrected by the next forward.
        """
        self.free.scatter_(self._counted, self.flat)  # moves the version counter, as every step does
        if self._is_stray:
            self.impose()
        self._known_writes, self._is_stray = self._writes, False


def constraints_of(held: list[FrozenParameter]) -> list[Constraint]:
    """Return the constraints of several frozen parameters, which are immutable and compared by identity."""
    return [constraint for each in held for constraint in each.constraints]


# --------------------------------------------------------------------------------------------------------------------
# A step


class FlatStep:
    """An optimizer's groups and state with flat tensors instead of parameters, and the proxy that steps them.

    It is reused for as long as the parameters stay the same. A step reads the options of the groups when it begins, and
    stores its state under the model's own parameters when it ends.

    Attributes:
        parameters: The flat parameters, by the model's parameters.
        state: The optimizer's state, by flat tensor, or by parameter if that is stepped whole.
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
        """Return the proxy that steps instead of the optimizer; the step begins when it first reads the groups."""
        self._optimizer, self.has_begun = optimizer, False
        vars(self._proxy).update(vars(optimizer), _flat_step=self, _numel_cache=None)  # LBFGS caches its entry count
        return self._proxy

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups, with flat tensors instead of parameters.

        Weights and gradients are read when the step first asks for the groups. That is after every step-pre-hook and,
        except in LBFGS, after the closure, so that what those write is seen.
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
        """Read the gradients again, after a closure has computed new ones."""
        if self.has_begun:
            for flat in self.parameters.values():
                flat.gather_gradient()

    def finish(self) -> None:
        """Write weights and state back to the parameters and the optimizer."""
        optimizer = self._optimizer
        if optimizer is not None and self.has_begun:
            self.scatter()
            parameters = {id(flat.flat): parameter for parameter, flat in self.parameters.items()}
            for key, state in self.state.items():
                if state:
                    optimizer.state[parameters.get(id(key), key)] = state
        self.leave()

    def leave(self) -> None:
        """Drop all references to the optimizer and its state."""
        self._optimizer, self.has_begun = None, False
        self._groups = []
        self.state.clear()
        vars(self._proxy).clear()
        for flat in self.parameters.values():
            flat.flat.grad = None


class _OptimizerProxy:
    """A mixin for an optimizer's class: it has the optimizer's attributes, but the groups and state of a flat step."""

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
