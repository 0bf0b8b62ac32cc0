"""Runs the step of an optimizer on flat tensors of free entries instead of whole parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .bucket import Bucket
from .flat_parameter import FlatParameter


class FlatStep:
    """An optimizer's groups and state with flat tensors instead of parameters, and the proxy that steps them.

    It is reused for as long as the parameters stay the same. A step reads the options of the groups when it begins, and
    stores its state under the model's own parameters when it ends.

    Attributes:
        parameters: The flat parameters, by the model's parameters.
        copied: The same, small ones in buckets.
        state: The optimizer's state, by flat tensor, or by parameter if that is stepped whole.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: dict[Tensor, FlatParameter],
        copied: list[FlatParameter | Bucket],
    ) -> None:
        self.parameters = parameters
        self.copied = copied
        self.state: dict[Tensor, Any] = defaultdict(dict)
        self._groups: list[dict[str, Any]] = []
        kind: Any = type(optimizer)
        self._proxy_class: Any = _proxy_class(kind)
        self._optimizer: Optimizer | None = None
        self.has_begun = False

    def prepare(self, optimizer: Optimizer) -> Any:
        """Return the proxy that steps instead of the optimizer; the step begins when it first reads the groups."""
        self._optimizer, self.has_begun = optimizer, False
        proxy = object.__new__(self._proxy_class)  # a new one: a compiled step cannot fill one that it has not made
        vars(proxy).update(vars(optimizer), _flat_step=self, _numel_cache=None)  # LBFGS caches its entry count
        return proxy

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups, with flat tensors instead of parameters.

        Weights and gradients are read when the step first asks for the groups, which is after every step-pre-hook, and
        again after each closure, so that what those write is seen.
        """
        if not self.has_begun and self._optimizer is not None:
            self._begin(self._optimizer)
        return self._groups

    def _begin(self, optimizer: Optimizer) -> None:
        self._gather()
        self._groups = [
            {**group, "params": [self._stepped(parameter) for parameter in group["params"]]}
            for group in optimizer.param_groups
        ]
        self.state.clear()
        for parameter, state in optimizer.state.items():
            self.state[self._stepped(parameter)] = state
        self.has_begun = True

    def _to_copy(self) -> Iterable[FlatParameter | Bucket]:
        """Return what is copied; the compiler does not take views from outside beside what they are views of."""
        return self.parameters.values() if torch.compiler.is_compiling() else self.copied

    def _stepped(self, parameter: Tensor) -> Tensor:
        flat = self.parameters.get(parameter)
        return parameter if flat is None else flat.flat

    def scatter(self) -> None:
        """Write the flat tensors into the parameters."""
        if self.has_begun:
            for each in self._to_copy():
                each.scatter()

    def gather_again(self) -> None:
        """Read weights and gradients again, after a closure that may have written to either."""
        if self.has_begun:
            self._gather()

    def _gather(self) -> None:
        for each in self._to_copy():
            each.gather()

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
