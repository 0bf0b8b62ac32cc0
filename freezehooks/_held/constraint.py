"""The base class of constraints: what one rule does to one parameter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from .._entries.entry_set import EntrySet
from .._entries.writes import Writes
from .._rules.rule import Rule

SAME_TENSORS: Final = "use the tensors of the saved run, or start from its weights alone"
"""The advice for a state that was saved with another mask, other values or other labels."""


class Constraint(ABC):
    """What one rule holds in one parameter, or in this rank's shard of it: fixed entries, or tied ones.

    Attributes:
        rule: The rule, as it was given.
        entries: The entries that it freezes; none if it is a tie.
    """

    rule: Rule
    entries: EntrySet

    keeps = False
    """Whether the value is `keep`: what the entries held when they were frozen or last loaded."""

    is_tie = False
    """Whether it ties entries, so that they stay equal and their gradients are summed."""

    @abstractmethod
    def impose_(self, tensor: Tensor) -> None:
        """Write the values into a plain tensor of the parameter's shape."""

    @abstractmethod
    def add_impose(self, writes: Writes, tensor: Tensor) -> None:
        """Add to `writes` what `impose_` does."""

    @abstractmethod
    def for_shard(self, shard: Tensor, cut: Callable[[Tensor], Tensor]) -> Constraint:
        """Return the constraint for a shard of the parameter; or, given a shard's constraint, for the whole parameter.

        Args:
            shard: The tensor that the new constraint is for.
            cut: A function from a tensor like the one that this constraint is for to one of the shard's shape.
        """

    def check_start(self, parameter: Tensor) -> None:  # noqa: B027  # most constraints have nothing to check
        """Reject a parameter, or its gradient, that the constraint cannot start from.

        Raises:
            FrozenValueError: Tied entries differ, and the rule does not say which to start from.
            UnsupportedParameterError: The gradient is sparse, and its sum over tied entries would not be.
        """

    def begin_(self, tensor: Tensor) -> None:
        """Write into a tensor that was just frozen, or loaded."""
        self.impose_(tensor)

    def capture_kept(self, tensor: Tensor) -> None:  # noqa: B027  # most constraints keep nothing
        """Take what the entries of a plain tensor hold now as their values, if the rule's value is `keep`."""

    def complete_gradient(self, parameter: Tensor) -> None:  # noqa: B027  # only ties have something to complete
        """Do what a gradient hook does, to a gradient for which the hook was not called."""

    def check_beside(self, other: Constraint, like: Tensor, name: str) -> None:
        """Reject another constraint on the same parameter that disagrees with this one.

        Args:
            other: The other constraint; the message names its rule second.
            like: A tensor of the parameter's shape and dtype.
            name: The parameter's name.

        Raises:
            RuleConflictError: They disagree about an entry; the message names both rules.
        """
        if other.is_tie and not self.is_tie:
            other.check_beside(self, like, name)

    def held_in(self, like: Tensor) -> Tensor:
        """Return zeros of a tensor's shape and dtype, with the values written into the frozen entries."""
        held = torch.zeros_like(like, requires_grad=False)
        self.impose_(held)
        return held

    def decided(self, device: torch.device) -> Tensor:
        """Return the bool tensor that is True at the entries that the rule determines."""
        return self.entries.mask(device)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors that the constraint keeps in memory."""
        return ()

    def state(self) -> dict[str, Any]:
        """Return what is not in the rule's text, as plain tensors and builtins."""
        return {}
