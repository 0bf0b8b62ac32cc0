"""Counts how many entries of a model train."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._entries.bits import count_true
from .._held.held import Model
from .._held.parameter import FrozenParameter
from .._hooks.gradient import watching


@dataclass(frozen=True, slots=True)
class Trainable:
    """How many entries of a model train. It prints as a line.

    Attributes:
        trainable: The entries that train: those of parameters that require a gradient, except the frozen ones.
        total: The entries of all parameters; a parameter with several names counts once.
    """

    trainable: int
    total: int

    @property
    def percent(self) -> float:
        """The percentage of all entries that train."""
        return 100 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        return f"trainable entries: {self.trainable:,} of {self.total:,} ({self.percent:.4g} %)"


def count_trainable(model: Model, held: Iterable[tuple[FrozenParameter, Tensor]]) -> Trainable:
    """Count the entries of a model, and those that train.

    Args:
        model: A module, or a mapping from name to leaf tensor.
        held: The frozen parameters with their tensors. What other handles freeze in the same model counts too.
    """
    known: dict[int, list[FrozenParameter]] = {}
    for frozen, parameter in held:
        known.setdefault(id(parameter), []).append(frozen)
    trainable = total = 0
    for parameter in {id(tensor): tensor for tensor in _tensors(model)}.values():
        total += parameter.numel()
        if parameter.requires_grad:
            frozen_by = dict.fromkeys([*known.get(id(parameter), ()), *watching(parameter)])
            trainable += parameter.numel() - count_frozen(list(frozen_by))
    return Trainable(trainable, total)


def _tensors(model: Model) -> list[Tensor]:
    found = model.parameters() if isinstance(model, nn.Module) else model.values()
    return [tensor for tensor in found if not is_lazy(tensor)]


def count_frozen(held: Sequence[FrozenParameter]) -> int:
    """Count the entries of one parameter that are frozen by any of several handles."""
    if len(held) < 2:
        return sum(each.frozen_count for each in held)
    return count_true(reduce(torch.logical_or, (each.frozen_in_whole() for each in held)))
