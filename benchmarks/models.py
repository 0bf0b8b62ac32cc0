"""The models that are trained, and their sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the models and their batches are.

    Attributes:
        widths: Channels of the residual net's stages.
        images: Shape of its batches.
        hidden: Width of the perceptron, which has six layers.
        samples: Rows of its batches.
        vocabulary: Rows of the embedding.
        tokens: Shape of its batches.
        features: Width of an embedded token.
        chains: How many layers the chains have.
        mask: Shape of the parameter that one large mask is installed on.
    """

    widths: tuple[int, ...] = (16, 32, 64)
    images: tuple[int, ...] = (32, 3, 32, 32)
    hidden: int = 1024
    samples: int = 64
    vocabulary: int = 50_273
    tokens: tuple[int, ...] = (8, 128)
    features: int = 768
    chains: tuple[int, ...] = (10, 100, 1000)
    mask: tuple[int, ...] = (10_000, 1_000)


FULL = Sizes()
TINY = Sizes((2, 4), (2, 3, 8, 8), 8, 4, 40, (2, 4), 4, (2, 3, 4), (20, 10))
"""So small that figures mean nothing: to see that everything runs."""


class Residual(nn.Module):
    """Two 3x3 convolutions with batch norm, beside a shortcut."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        same = stride == 1 and channels == width
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels, width, 1, stride, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Add what the convolutions see to what the shortcut passes."""
        seen = functional.relu(self.norm1(self.conv1(images)))
        return functional.relu(self.norm2(self.conv2(seen)) + self.shortcut(images))


def residual_net(widths: tuple[int, ...]) -> nn.Module:
    """Return a stage of two residual blocks for each width, each but the first at half the resolution."""
    stem = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
    layers: list[nn.Module] = [stem, nn.BatchNorm2d(widths[0]), nn.ReLU()]
    for before, width in zip((widths[0], *widths), widths, strict=False):
        layers += [Residual(before, width, 1 if before == width else 2), Residual(width, width, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


def perceptron(width: int, layers: int = 6) -> nn.Module:
    """Return square linear layers with GELU in between."""
    stack: list[nn.Module] = []
    for _ in range(layers):
        stack += [nn.Linear(width, width), nn.GELU()]
    return nn.Sequential(*stack[:-1])


class Chain(nn.Module):
    """Many small linear layers, one after another."""

    def __init__(self, length: int, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(length)))

    def forward(self, rows: Tensor) -> Tensor:
        """Apply one layer after another."""
        output: Tensor = self.layers(rows)
        return output


class TokenModel(nn.Module):
    """An embedding, averaged over the tokens and seen through a fixed random projection."""

    projection: Tensor

    def __init__(self, vocabulary: int, features: int, outputs: int = 16) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocabulary, features)
        self.register_buffer("projection", torch.randn(features, outputs) / features**0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Project the mean of the embedded tokens."""
        mean: Tensor = self.wte(tokens).mean(dim=1)
        return mean @ self.projection
