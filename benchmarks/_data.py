"""What the scenarios train with: batches, losses, optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW, Optimizer

Loss = Callable[[nn.Module, Any], Tensor]
MakeOptimizer = Callable[[Iterable[Tensor]], Optimizer]
Labeled = list[tuple[Tensor, Tensor]]
"""Batches of inputs, with their labels or targets."""

ADAMW: Final[dict[str, MakeOptimizer]] = {"AdamW": AdamW, "AdamW(fused=True)": partial(AdamW, fused=True)}
BATCHES: Final = 4


def rows(shape: Sequence[int], device: torch.device) -> list[Tensor]:
    """Return batches of random numbers."""
    return [torch.randn(*shape, device=device) for _ in range(BATCHES)]


def images(shape: Sequence[int], device: torch.device, classes: int = 10) -> Labeled:
    """Return batches of random images with random labels."""
    return [(batch, torch.randint(classes, (len(batch),), device=device)) for batch in rows(shape, device)]


def sentences(shape: Sequence[int], device: torch.device, vocabulary: int) -> Labeled:
    """Return batches of random tokens, each with the one that follows it."""
    count, length = shape
    found = [torch.randint(vocabulary, (count, length + 1), device=device) for _ in range(BATCHES)]
    return [(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) for batch in found]


def new_tokens(shape: Sequence[int], device: torch.device, vocabulary: int) -> Labeled:
    """Return batches of tokens, one in eight of the last 16 of the vocabulary, with random targets."""
    batches = []
    for targets in rows((shape[0], 16), device):
        found = torch.randint(vocabulary - 16, tuple(shape), device=device)
        new = torch.randint(vocabulary - 16, vocabulary, tuple(shape), device=device)
        batches.append((torch.where(torch.rand(*shape, device=device) < 1 / 8, new, found), targets))
    return batches


def classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the loss of a model that classifies images."""
    images, labels = batch
    return functional.cross_entropy(model(images), labels)


def predict(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the loss of a model that predicts the next token."""
    tokens, following = batch
    return functional.cross_entropy(model(tokens).flatten(0, 1), following.flatten())


def regress(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the loss of a model that regresses targets."""
    inputs, targets = batch
    return functional.mse_loss(model(inputs), targets)


def reproduce(model: nn.Module, rows: Tensor) -> Tensor:
    """Return the loss of a model that reconstructs its input."""
    return functional.mse_loss(model(rows), rows)
