"""Copies of one kernel in one parameter: all slices along a dimension are one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .._entries.entry_set import EntrySet
from .._entries.writes import Writes
from .._errors import FrozenValueError, RegionError, RuleConflictError, UnsupportedParameterError, shortened
from .._rules.rule import Rule, Tied
from .constraint import Constraint


class TiedEntries(Constraint):
    """What one rule ties of one parameter.

    The gradient at every copy is the sum of the gradients at all of them: the gradient of the one tensor that they
    stand for. From equal values, equal gradients and equal state an elementwise optimizer makes equal steps; what its
    kernels round differently between copies is set right after the step, from the first copy.

    Attributes:
        dim: The dimension along which the copies lie.
        start: How copies that differ become one: "first", "mean", or None to refuse them.
    """

    is_tie = True

    def __init__(self, rule: Rule, tied: Tied, parameter: Tensor) -> None:
        self.rule = rule
        self.entries = EntrySet.of(torch.zeros_like(parameter, dtype=torch.bool, requires_grad=False))
        self.dim = tied.dim
        self.start = tied.start

    @staticmethod
    def resolve(rule: Rule, tied: Tied, parameter: Tensor) -> TiedEntries:
        """Work out what `rule` ties of a parameter, without changing it.

        Raises:
            RegionError: The parameter has no such dimension.
            FrozenValueError: The copies differ, and the rule does not say which to take.
        """
        if not -parameter.ndim <= tied.dim < parameter.ndim:
            raise RegionError(
                f"dimension {tied.dim} is out of range for a tensor of {parameter.ndim}",
                f"use 0 to {parameter.ndim - 1}" if parameter.ndim else "name a tensor with dimensions",
            )
        if not parameter.shape[tied.dim]:
            raise RegionError(f"dimension {tied.dim} has size 0: there is no slice to tie", "leave the rule out")
        tie = TiedEntries(rule, tied, parameter)
        tie._check_copies(parameter)
        return tie

    def check_start(self, parameter: Tensor) -> None:
        self._check_copies(parameter)
        if parameter.grad is not None:
            self._check_dense(parameter.grad)

    def _check_copies(self, parameter: Tensor) -> None:
        """Refuse copies that differ, where the rule does not say which to take."""
        gap = (parameter.detach() - self._first(parameter.detach())).abs()
        if self.start is None and bool((gap != 0).any()):
            copies, worst = parameter.shape[self.dim], gap.max().item()
            raise FrozenValueError(
                f"the {copies} slices along dimension {self.dim} differ, by up to {worst:g}",
                f"write `tied({self.dim}, start=first)` or `tied({self.dim}, start=mean)`",
            )

    def begin_(self, tensor: Tensor) -> None:
        if self.start == "mean":
            self._first(tensor).copy_(tensor.mean(self.dim, keepdim=True))
        self.impose_(tensor)

    def impose_(self, tensor: Tensor) -> None:
        others = tensor.narrow(self.dim, 1, tensor.shape[self.dim] - 1)
        others.copy_(self._first(tensor).expand(others.shape))

    def add_impose(self, writes: Writes, tensor: Tensor) -> None:
        writes.call(partial(self.impose_, tensor))

    def _first(self, tensor: Tensor) -> Tensor:
        return tensor.narrow(self.dim, 0, 1)

    def summed(self, gradient: Tensor) -> Tensor:
        """Return the gradient of the one tensor, at every copy of it.

        Raises:
            UnsupportedParameterError: The gradient is sparse, and the sum at every copy would not be.
        """
        self._check_dense(gradient)
        return gradient.sum(self.dim, keepdim=True).expand(gradient.shape)

    def complete_gradient(self, parameter: Tensor) -> None:
        """Sum a gradient that came without the hook: set by hand, or from before the copies were tied.

        One that was summed is the same at every copy, to the bit, and stays as it is.
        """
        gradient = parameter.grad
        if gradient is not None and not gradient.is_meta and bool((gradient != self._first(gradient)).any()):
            parameter.grad = self.summed(gradient).clone(memory_format=torch.preserve_format)

    def _check_dense(self, gradient: Tensor) -> None:
        if gradient.layout != torch.strided:
            raise UnsupportedParameterError(
                f"rule `{self.rule}`: a tied parameter needs dense gradients, found {gradient.layout}",
                "make the layer without sparse=True",
            )

    def decided(self, device: torch.device) -> Tensor:
        copies = torch.ones(self.entries.shape, dtype=torch.bool, device=device)
        self._first(copies).fill_(False)  # what the others are equal to
        return copies

    def for_shard(self, shard: Tensor, cut: Callable[[Tensor], Tensor]) -> TiedEntries:
        """Refuse: the copies would lie on several ranks.

        Raises:
            UnsupportedParameterError: Always.
        """
        raise UnsupportedParameterError(
            f"rule `{self.rule}`: the copies lie on several ranks, where their gradients are not summed",
            "tie parameters that FSDP2 and tensor parallelism leave whole, or use DistributedDataParallel",
        )

    def check_beside(self, other: Constraint, like: Tensor, name: str) -> None:
        """Refuse a rule that freezes other entries, or other values, in one copy than in another.

        Raises:
            RuleConflictError: It does, or ties the parameter once more; the message names both rules.
        """
        if other.is_tie:
            raise RuleConflictError(
                f"rules `{self.rule}` and `{other.rule}` both tie `{name}`", "leave one of them out"
            )
        frozen, held = other.entries.mask(like.device), other.held_in(like)
        for tensor in (frozen, torch.where(frozen, held, held.new_zeros(()))):
            differing = (tensor != self._first(tensor)).nonzero()
            if len(differing):
                raise RuleConflictError(
                    f"rules `{shortened(other.rule)}` and `{self.rule}` disagree about entry "
                    f"{differing[0].tolist()} of `{name}`",
                    f"freeze the same entries, at the same values, in every slice along dimension {self.dim}",
                )
