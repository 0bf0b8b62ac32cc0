"""Chooses the entries that the scenarios hold."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from freezehooks import center

from .subjects import Held


def random_entries(model: nn.Module, fraction: float) -> list[Held]:
    """Choose a fraction of every matrix and kernel at random."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.ndim > 1]
    return [Held(name, torch.rand(parameter.shape, device=parameter.device) < fraction) for name, parameter in named]


def spec_of(held: Iterable[Held]) -> dict[str, Any]:
    """Return the spec with which a user of this library would hold these entries."""
    return {entries.name: (entries.index, entries.value) for entries in held}


def centers(model: nn.Module) -> tuple[list[Held], dict[str, Any]]:
    """Return the centers of all 3x3 kernels, and the spec with which a user would hold them at 0."""
    modules = model.named_modules()
    names = [f"{name}.weight" for name, m in modules if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    return [Held(name, (slice(None), slice(None), 1, 1)) for name in names], dict.fromkeys(names, (center, 0))
