"""Tells which optimizers are elementwise: they step every entry independently of the others."""

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
"""The elementwise optimizers: the step of an entry depends on nothing but its own gradient, weight and state."""


def is_elementwise(optimizer: Optimizer) -> bool:
    """Return whether an optimizer is known to be elementwise."""
    kind: Any = type(optimizer)
    return _is_elementwise(kind)


@cache
def _is_elementwise(kind: Any) -> bool:
    return any(steps_like(kind, known) for known in ELEMENTWISE)


def steps_like(kind: Any, known: Any) -> bool:
    """Return whether an optimizer class steps exactly like another one: it is that class, or inherits its step."""
    return issubclass(kind, known) and _step_functions(kind) == _step_functions(known)


def _step_functions(kind: Any) -> tuple[Any, Any]:
    return inspect.unwrap(kind.step), getattr(kind, "_init_group", None)
