"""The free entries of one parameter as a flat tensor, which an optimizer steps instead."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor

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
        is_view: Whether that is a view of the parameter.
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
        self.is_view = self.flat.untyped_storage().data_ptr() == self._here.untyped_storage().data_ptr()

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
        copies = [] if self.is_view else [self.flat, self._gradient]
        return self.free.nbytes + sum(copy.nbytes for copy in copies if copy is not None)

    def fits(self, held: list[FrozenParameter]) -> bool:
        """Return whether the given handles freeze the same entries, and the parameter is still in the same memory."""
        in_place = not self.parameter.is_meta and self._here.is_set_to(self._memory)
        return in_place and self._constraints == constraints_of(held)

    def move_to(self, flat: Tensor, gradient: Tensor) -> None:
        """Replace the flat tensor by one of the same numbers, and the memory for its gradient."""
        self.flat, self._gradient = flat, gradient

    def gather(self) -> None:
        """Read the free entries and their gradient from the parameter."""
        self._is_stray = self._writes != self._known_writes
        if not self.is_view:
            self.free.gather(self._counted, out=self.flat)
        self.gather_gradient()

    def gather_gradient(self) -> None:
        """Read the gradient of the free entries from the parameter.

        Raises:
            UnsupportedParameterError: It is sparse.
        """
        self.give(self._flat_gradient())

    def give(self, gradient: Tensor | None) -> None:
        """Let the flat tensor have a gradient, of whatever dtype."""
        flat: Any = self.flat
        if gradient is not None and gradient.dtype != getattr(flat, "grad_dtype", gradient.dtype):
            flat.grad_dtype = gradient.dtype  # which there is since torch 2.10
        flat.grad = gradient

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
        if self.is_view:
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
