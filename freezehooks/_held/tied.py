"""Copies of one kernel in one parameter: all slices along a dimension are one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._errors import FrozenValueError, RegionError, RuleConflictError, UnsupportedParameterError
from .._rules.rule import Rule, Tied


class Tie:
    """What one rule ties of one parameter.

    The gradient at every copy is the sum of the gradients at all of them: the gradient of the one tensor that they
    stand for. From equal values, equal gradients and equal state an elementwise optimizer makes equal steps; what its
    kernels round differently between copies is set right after the step, from the first copy.

    Attributes:
        rule: The rule, as it was given.
        dim: The dimension along which the copies lie.
        start: How copies that differ become one: "first", "mean", or None to refuse them.
    """

    def __init__(self, rule: Rule, tied: Tied) -> None:
        self.rule = rule
        self.dim = tied.dim
        self.start = tied.start

    @staticmethod
    def resolve(rule: Rule, tied: Tied, parameter: Tensor) -> Tie:
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
        tie = Tie(rule, tied)
        tie.check_start(parameter)
        return tie

    def check_start(self, parameter: Tensor) -> None:
        """Refuse copies that differ, where the rule does not say which to take.

        Raises:
            FrozenValueError: They do.
        """
        gap = (parameter.detach() - self._first(parameter.detach())).abs()
        if self.start is None and bool((gap != 0).any()):
            copies, worst = parameter.shape[self.dim], gap.max().item()
            raise FrozenValueError(
                f"the {copies} slices along dimension {self.dim} differ, by up to {worst:g}",
                f"write `tied({self.dim}, start=first)` or `tied({self.dim}, start=mean)`",
            )

    def begin_(self, tensor: Tensor) -> None:
        """Make the copies one, as the rule says."""
        if self.start == "mean":
            self._first(tensor).copy_(tensor.mean(self.dim, keepdim=True))
        self.impose_(tensor)

    def impose_(self, tensor: Tensor) -> None:
        """Write the first copy into the others."""
        others = tensor.narrow(self.dim, 1, tensor.shape[self.dim] - 1)
        others.copy_(self._first(tensor).expand(others.shape))

    def _first(self, tensor: Tensor) -> Tensor:
        return tensor.narrow(self.dim, 0, 1)

    def summed(self, gradient: Tensor) -> Tensor:
        """Return the gradient of the one tensor, at every copy of it.

        Raises:
            UnsupportedParameterError: The gradient is sparse, and the sum at every copy would not be.
        """
        self.check_gradient(gradient)
        return gradient.sum(self.dim, keepdim=True).expand(gradient.shape)

    def sum_missed(self, parameter: Tensor) -> None:
        """Sum a gradient that came without the hook: set by hand, or from before the copies were tied.

        One that was summed is the same at every copy, to the bit, and stays as it is.
        """
        gradient = parameter.grad
        if gradient is not None and not gradient.is_meta and bool((gradient != self._first(gradient)).any()):
            parameter.grad = self.summed(gradient).clone(memory_format=torch.preserve_format)

    def check_gradient(self, gradient: Tensor) -> None:
        """Refuse a sparse gradient.

        Raises:
            UnsupportedParameterError: It is one.
        """
        if gradient.layout != torch.strided:
            raise UnsupportedParameterError(
                f"rule `{self.rule}`: a tied parameter needs dense gradients, found {gradient.layout}",
                "make the layer without sparse=True",
            )

    def check_beside(self, rule: Rule, frozen: Tensor, held: Tensor, name: str) -> None:
        """Refuse a rule that freezes other entries, or other values, in one copy than in another.

        Raises:
            RuleConflictError: It does; the message names both rules.
        """
        for tensor in (frozen, torch.where(frozen, held, held.new_zeros(()))):
            differing = (tensor != self._first(tensor)).nonzero()
            if len(differing):
                raise RuleConflictError(
                    f"rules `{rule}` and `{self.rule}` disagree about entry {differing[0].tolist()} of `{name}`",
                    f"freeze the same entries, at the same values, in every slice along dimension {self.dim}",
                )

    def state(self) -> dict[str, Any]:
        """Return nothing: the rule says it all."""
        return {}
