"""What one rule holds of one parameter: the verbs that fixed and tied entries have in common."""

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
"""What to do where a state was saved with another mask, other values or other labels."""


class Constraint(ABC):
    """What one rule holds of one parameter, or of the shard of it that lies on this rank.

    Attributes:
        rule: The rule, as it was given.
        entries: The entries that it freezes; none where it ties.
    """

    rule: Rule
    entries: EntrySet

    keeps = False
    """Whether the value is what the entries held when they were frozen, or loaded since."""

    is_tie = False
    """Whether it makes entries equal to one another, whose gradients are then summed."""

    @abstractmethod
    def impose_(self, tensor: Tensor) -> None:
        """Write what the rule says into a plain tensor of the parameter's shape."""

    @abstractmethod
    def add_impose(self, writes: Writes, tensor: Tensor) -> None:
        """Add to `writes` what `impose_` does."""

    @abstractmethod
    def for_shard(self, shard: Tensor, cut: Callable[[Tensor], Tensor]) -> Constraint:
        """Return the constraint on another tensor: on a shard of the parameter, or on the whole of which this is one.

        Args:
            shard: The tensor that the new constraint is on.
            cut: From a tensor like the one that this constraint is on to one of the shard's shape.
        """

    def check_start(self, parameter: Tensor) -> None:  # noqa: B027  # most constraints ask for nothing
        """Refuse a parameter, or its gradient, that the rule cannot begin with.

        Raises:
            FrozenValueError: Entries differ that are to be equal, and the rule does not say which to take.
            UnsupportedParameterError: The gradient is sparse, and its sum over tied entries would not be.
        """

    def begin_(self, tensor: Tensor) -> None:
        """Write into a tensor that was just frozen, or loaded."""
        self.impose_(tensor)

    def capture_kept(self, tensor: Tensor) -> None:  # noqa: B027  # most constraints keep nothing
        """Make what the entries of a plain tensor hold now the value to keep, where the rule keeps."""

    def complete_gradient(self, parameter: Tensor) -> None:  # noqa: B027  # only ties have something to complete
        """Do to a gradient that came without its hook what the hook would have done."""

    def check_beside(self, other: Constraint, like: Tensor, name: str) -> None:
        """Refuse another constraint on the same parameter that disagrees with this one.

        Args:
            other: It; its rule is named behind this one's.
            like: A tensor of the parameter's shape and dtype.
            name: The parameter's name.

        Raises:
            RuleConflictError: They disagree about an entry; the message names both rules.
        """
        if other.is_tie and not self.is_tie:
            other.check_beside(self, like, name)

    def held_in(self, like: Tensor) -> Tensor:
        """Return zeros like a tensor, with the values in the frozen entries."""
        held = torch.zeros_like(like, requires_grad=False)
        self.impose_(held)
        return held

    def decided(self, device: torch.device) -> Tensor:
        """Return the bool tensor of the entries whose numbers the rule decides."""
        return self.entries.mask(device)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors that it holds in memory."""
        return ()

    def state(self) -> dict[str, Any]:
        """Return plain tensors and builtins that say what the rule alone does not."""
        return {}
