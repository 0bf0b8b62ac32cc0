"""The constraint that ties entries of one parameter: copies of one kernel, a symmetric matrix."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._entries.entry_set import EntrySet
from .._entries.plain import as_tensor, owns_its_entries
from .._entries.writes import Writes
from .._errors import FrozenValueError, RuleConflictError, StateMismatchError, UnsupportedParameterError, shortened
from .._rules.rule import Rule
from .._rules.ties import Labeled, Tie
from .constraint import SAME_TENSORS, Constraint
from .copies import Copies


class TiedEntries(Constraint):
    """Entries of one parameter that one rule ties.

    The gradient at every copy is the sum of the gradients at all copies: the gradient of the one tensor that they
    represent. From equal values, gradients and state an elementwise optimizer makes equal steps. If its kernels round
    copies differently, the first copy overwrites the others after the step.

    Attributes:
        tie: The value of the rule.
    """

    is_tie = True

    def __init__(self, rule: Rule, tie: Tie, parameter: Tensor) -> None:
        self.rule = rule
        self.tie = tie
        self.entries = EntrySet.of(torch.zeros_like(parameter, dtype=torch.bool, requires_grad=False))
        self._copies = Copies.of(tie, parameter)

    @staticmethod
    def resolve(rule: Rule, tie: Tie, parameter: Tensor) -> TiedEntries:
        """Return the tied entries of a rule for a parameter, without changing the parameter.

        Raises:
            RegionError: The tie does not fit the parameter's shape.
            FrozenValueError: The copies differ, and the rule does not say which to start from.
        """
        found = TiedEntries(rule, tie, parameter)
        found._check_copies(parameter)
        return found

    @staticmethod
    def from_state(rule: Rule, tie: Tie, state: dict[str, Any], parameter: Tensor) -> TiedEntries:
        """Do what `resolve` does, and check that a saved state was made with the same labels.

        Raises:
            StateMismatchError: It was saved with labels that tie other entries.
        """
        found = TiedEntries.resolve(rule, tie, parameter)
        if isinstance(tie, Labeled):
            saved = Copies.of(Labeled(state["labels"]), parameter)
            layout = parameter.shape, parameter.device
            if not saved.first_positions(*layout).equal(found._copies.first_positions(*layout)):
                raise StateMismatchError("it was saved with other labels", SAME_TENSORS)
        return found

    def check_start(self, parameter: Tensor) -> None:
        self._check_copies(parameter)
        if parameter.grad is not None:
            self._check_dense(parameter.grad)

    def _check_copies(self, parameter: Tensor) -> None:
        """Reject copies that differ if the rule does not say which to start from."""
        gap = self._gap(parameter.detach())
        if self.tie.start is None and bool((gap != 0).any()):
            raise FrozenValueError(
                f"{self.tie.in_words(parameter.shape)} differ, by up to {gap.max().item():g}",
                f"write `{self.tie.written('first')}` or `{self.tie.written('mean')}`",
            )

    def _gap(self, tensor: Tensor) -> Tensor:
        """Return the distance of each entry from its first copy."""
        return (tensor - self._copies.first(tensor)).abs()

    def begin_(self, tensor: Tensor) -> None:
        if self.tie.start == "mean" and bool((self._gap(tensor) != 0).any()):  # the mean of equal copies may round
            tensor.copy_(self._copies.mean(tensor))
        self.impose_(tensor)

    def impose_(self, tensor: Tensor) -> None:
        self._copies.spread_(tensor)

    def add_impose(self, writes: Writes, tensor: Tensor) -> None:
        writes.call(partial(self.impose_, tensor))

    def summed(self, gradient: Tensor) -> Tensor:
        """Return the sum of the gradients over the copies, at every copy.

        Raises:
            UnsupportedParameterError: The gradient is sparse, and its sum would not be.
        """
        self._check_dense(gradient)
        return self._copies.sum(gradient)

    def complete_gradient(self, parameter: Tensor) -> None:
        """Sum a gradient for which the hook was not called: set by hand, or from before the rule was applied.

        A gradient that was summed is equal at every copy, to the bit, and stays as it is. The decision is made on the
        device, without waiting for it.
        """
        gradient = parameter.grad
        if gradient is None or gradient.is_meta:
            return
        summed = self.summed(gradient)
        is_summed = (gradient == self._copies.first(gradient)).all()
        completed = torch.where(is_summed, gradient, summed)
        if owns_its_entries(gradient) and not gradient.requires_grad:
            gradient.copy_(completed)
        else:
            parameter.grad = torch.empty_like(gradient, requires_grad=False).copy_(completed)

    def _check_dense(self, gradient: Tensor) -> None:
        if gradient.layout != torch.strided:
            raise UnsupportedParameterError(
                f"rule `{self.rule}`: a tied parameter needs dense gradients, found {gradient.layout}",
                "make the layer without sparse=True",
            )

    def decided(self, device: torch.device) -> Tensor:
        return self._copies.others(self.entries.shape, device)

    def for_shard(self, shard: Tensor, cut: Callable[[Tensor], Tensor]) -> TiedEntries:
        """Reject sharding: the copies would lie on several ranks.

        Raises:
            UnsupportedParameterError: Always.
        """
        raise UnsupportedParameterError(
            f"rule `{self.rule}`: the copies lie on several ranks, where their gradients are not summed",
            "tie parameters that FSDP2 and tensor parallelism do not shard, or use DistributedDataParallel",
        )

    def state(self) -> dict[str, Any]:
        return {"labels": as_tensor(self.tie.labels).clone()} if isinstance(self.tie, Labeled) else {}

    def check_beside(self, other: Constraint, like: Tensor, name: str) -> None:
        """Reject a rule that freezes one copy of an entry and not another, or at different values.

        Raises:
            RuleConflictError: It does, or it ties the same parameter; the message names both rules.
        """
        if other.is_tie:
            raise RuleConflictError(
                f"rules `{self.rule}` and `{other.rule}` both tie `{name}`", "leave one of them out"
            )
        frozen, held = other.entries.mask(like.device), other.held_in(like)
        for tensor in (frozen, torch.where(frozen, held, held.new_zeros(()))):
            differing = (tensor != self._copies.first(tensor)).nonzero()
            if len(differing):
                raise RuleConflictError(
                    f"rules `{shortened(other.rule)}` and `{self.rule}` disagree about entry "
                    f"{differing[0].tolist()} of `{name}`",
                    f"freeze the same entries, at the same values, in {self.tie.in_words()}",
                )
