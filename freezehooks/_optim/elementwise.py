"""Which optimizers step every entry by its own numbers."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any, Final

import torch
from torch.optim import Optimizer

ELEMENTWISE: Final = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.ASGD,
    torch.optim.RMSprop,
    torch.optim.Rprop,
)
"""In the formula of each of these, an entry's step depends on that entry's gradient, weight and state alone."""


def is_elementwise(optimizer: Optimizer) -> bool:
    """Return whether each entry's step depends on that entry's gradient, weight and state alone, as far as is known."""
    kind: Any = type(optimizer)
    return _is_elementwise(kind)


@cache
def _is_elementwise(kind: Any) -> bool:
    return any(steps_like(kind, known) for known in ELEMENTWISE)


def steps_like(kind: Any, known: Any) -> bool:
    """Return whether a class of optimizers makes its steps as another does: itself, or a subclass that changes none."""
    return issubclass(kind, known) and _makings(kind) == _makings(known)


def _makings(kind: Any) -> tuple[Any, Any]:
    return inspect.unwrap(kind.step), getattr(kind, "_init_group", None)
