"""Figures to watch while a frozen parameter trains: its drift, and the norms of its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from .._held.parameter import FrozenParameter
from .._ranks.sharding import local_gradient


@dataclass(frozen=True, slots=True)
class GradientNorms:
    """The 2-norms of a parameter's gradient, over its frozen entries and over its free ones.

    Attributes:
        frozen: Over the frozen entries; 0 if they are held.
        free: Over the free entries.
    """

    frozen: float
    free: float


def gradient_norms(held: Sequence[FrozenParameter], parameter: Tensor) -> GradientNorms | None:
    """Return the norms of a parameter's gradient as it is now, or None if it has none.

    For a sharded parameter, they are the norms of this rank's shard.

    Args:
        held: What the handles freeze in the parameter.
        parameter: The parameter.
    """
    gradient = local_gradient(parameter)
    if gradient is None or gradient.is_meta:
        return None
    frozen = reduce(torch.logical_or, [each.frozen for each in held]).to(gradient.device)
    numbers = gradient.detach()
    if numbers.layout != torch.strided:
        numbers = numbers.coalesce()  # adds up entries that are listed more than once
        frozen, numbers = frozen[tuple(numbers.indices())], numbers.values()
    sizes = numbers.abs()
    return GradientNorms(_norm(sizes, ~frozen), _norm(sizes, frozen))


def _norm(sizes: Tensor, left_out: Tensor) -> float:
    """Return the 2-norm of what is not left out, in at least single precision."""
    counted = sizes.masked_fill(left_out, 0)
    precise = torch.promote_types(counted.dtype, torch.float32)
    return float(torch.linalg.vector_norm(counted, dtype=precise))


def drift(held: Sequence[FrozenParameter], parameter: Tensor) -> float:
    """Return the largest absolute difference of a frozen entry from its value; inf if one became nan.

    For a sharded parameter, it is the largest in this rank's shard.

    Args:
        held: What the handles freeze in the parameter.
        parameter: The parameter.
    """
    found = [each.violation(parameter) for each in held]
    return max((violation.drift for violation in found if violation is not None), default=0.0)
