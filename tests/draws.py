"""Random numbers that are the same on every device: drawn on the CPU, then moved to the one that a test runs on."""

from __future__ import annotations

import torch
from torch import Tensor

Seed = int | torch.Generator
"""A number, or a generator of the CPU to draw on from."""


def rand(*shape: int, seed: Seed) -> Tensor:
    """Return numbers between 0 and 1."""
    return _here(torch.rand(shape, generator=_generator(seed), device="cpu"))


def randn(*shape: int, seed: Seed, dtype: torch.dtype | None = None) -> Tensor:
    """Return normally distributed numbers."""
    return _here(torch.randn(shape, generator=_generator(seed), device="cpu", dtype=dtype))


def randint(low: int, high: int, *shape: int, seed: Seed) -> Tensor:
    """Return integers from `low` to one below `high`."""
    return _here(torch.randint(low, high, shape, generator=_generator(seed), device="cpu"))


def _generator(seed: Seed) -> torch.Generator:
    return torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed


def _here(numbers: Tensor) -> Tensor:
    return numbers.to(torch.empty(0).device)  # torch.get_default_device() of 2.6 knows of no `with torch.device(...)`
