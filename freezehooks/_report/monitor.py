"""What to watch of a frozen parameter while it trains: how far it drifted, and how large its gradient is."""

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
        frozen: Over the frozen entries; 0 where they are held.
        free: Over the free entries.
    """

    frozen: float
    free: float


def gradient_norms(parts: Sequence[FrozenParameter], parameter: Tensor) -> GradientNorms | None:
    """Return the norms of a parameter's gradient as it is now, or None where it has none.

    Of a parameter that is spread over ranks, they are of this rank's part.

    Args:
        parts: What the handles freeze of the parameter.
        parameter: The parameter.
    """
    gradient = local_gradient(parameter)
    if gradient is None or gradient.is_meta:
        return None
    frozen = reduce(torch.logical_or, [part.frozen for part in parts]).to(gradient.device)
    numbers = gradient.detach()
    if numbers.layout != torch.strided:
        numbers = numbers.coalesce()  # an index that stands there twice is one entry
        frozen, numbers = frozen[tuple(numbers.indices())], numbers.values()
    sizes = numbers.abs()
    return GradientNorms(_norm(sizes, ~frozen), _norm(sizes, frozen))


def _norm(sizes: Tensor, left_out: Tensor) -> float:
    """Return the 2-norm of what is not left out, in no less than single precision."""
    counted = sizes.masked_fill(left_out, 0)
    precise = torch.promote_types(counted.dtype, torch.float32)
    return float(torch.linalg.vector_norm(counted, dtype=precise))


def drift(parts: Sequence[FrozenParameter], parameter: Tensor) -> float:
    """Return the largest absolute difference of a frozen entry from its value; inf where one became nan.

    Of a parameter that is spread over ranks, it is of this rank's part.

    Args:
        parts: What the handles freeze of the parameter.
        parameter: The parameter.
    """
    found = [part.violation(parameter) for part in parts]
    return max((violation.drift for violation in found if violation is not None), default=0.0)
