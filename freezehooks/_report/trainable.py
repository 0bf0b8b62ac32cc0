"""How many entries of a model train."""

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
        trainable: The entries that train: those of parameters that require a gradient, less the frozen ones.
        total: The entries of all parameters; a parameter that stands under several names counts once.
    """

    trainable: int
    total: int

    @property
    def percent(self) -> float:
        """The entries that train, in percent of all."""
        return 100 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        return f"trainable entries: {self.trainable:,} of {self.total:,} ({self.percent:.4g} %)"


def count_trainable(model: Model, held: Iterable[tuple[FrozenParameter, Tensor]]) -> Trainable:
    """Count the entries of a model, and those of them that train.

    Args:
        model: A module, or a mapping from name to leaf tensor.
        held: Each part with the parameter that it holds. What other handles freeze of the same model counts too.
    """
    known: dict[int, list[FrozenParameter]] = {}
    for part, parameter in held:
        known.setdefault(id(parameter), []).append(part)
    trainable = total = 0
    for parameter in {id(tensor): tensor for tensor in _tensors(model)}.values():
        total += parameter.numel()
        if parameter.requires_grad:
            parts = dict.fromkeys([*known.get(id(parameter), ()), *watching(parameter)])
            trainable += parameter.numel() - count_frozen(list(parts))
    return Trainable(trainable, total)


def _tensors(model: Model) -> list[Tensor]:
    found = model.parameters() if isinstance(model, nn.Module) else model.values()
    return [tensor for tensor in found if not is_lazy(tensor)]


def count_frozen(parts: Sequence[FrozenParameter]) -> int:
    """Return how many entries of one parameter are frozen, by any of several handles."""
    if len(parts) < 2:
        return sum(part.frozen_count for part in parts)
    return count_true(reduce(torch.logical_or, (part.frozen_in_whole() for part in parts)))
