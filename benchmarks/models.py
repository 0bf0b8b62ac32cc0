"""The models that are trained, and their sizes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from .gpt2 import Architecture


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the models and their batches are.

    Attributes:
        widths: Channels of the residual net's stages.
        images: Shape of its batches.
        hidden: Width of the perceptron, which has six layers.
        wide: Width of the perceptron for a GPU.
        samples: Rows of their batches.
        vocabulary: Rows of the embedding.
        tokens: Shape of its batches.
        features: Width of an embedded token.
        wide_tokens: Rows and width of the embedding for a GPU.
        head: Features and vocabulary of a language model's head.
        wide_head: The same for the head for a GPU.
        chains: How many layers the chains have.
        mask: Shape of the parameter that one large mask is installed on.
        gpt2: Vocabulary, context, width, heads and layers of GPT-2.
        sentences: Shape of its batches.
        bottlenecks: How many of them each stage of ResNet-50 has.
        narrowest: Width of its first stage.
        photos: Shape of its batches.
    """

    widths: tuple[int, ...] = (16, 32, 64)
    images: tuple[int, ...] = (32, 3, 32, 32)
    hidden: int = 1024
    wide: int = 4096
    samples: int = 64
    vocabulary: int = 50_273
    tokens: tuple[int, ...] = (8, 128)
    features: int = 768
    wide_tokens: tuple[int, int] = (128_256, 4096)
    head: tuple[int, int] = (768, 50_273)
    wide_head: tuple[int, int] = (4096, 128_256)
    chains: tuple[int, ...] = (10, 100, 1000)
    mask: tuple[int, ...] = (10_000, 1_000)
    gpt2: Architecture = field(default_factory=Architecture)
    sentences: tuple[int, ...] = (8, 1024)
    bottlenecks: tuple[int, ...] = (3, 4, 6, 3)
    narrowest: int = 64
    photos: tuple[int, ...] = (64, 3, 224, 224)


FULL = Sizes()
TINY = Sizes(
    widths=(2, 4),
    images=(2, 3, 8, 8),
    hidden=8,
    wide=12,
    samples=4,
    vocabulary=40,
    tokens=(2, 4),
    features=4,
    wide_tokens=(40, 4),
    head=(4, 40),
    wide_head=(4, 40),
    chains=(2, 3, 4),
    mask=(20, 10),
    gpt2=Architecture(vocabulary=20, context=6, width=8, heads=2, layers=2),
    sentences=(2, 6),
    bottlenecks=(1, 1),
    narrowest=2,
    photos=(2, 3, 32, 32),
)
"""Sizes so small that figures mean nothing, to see that everything runs."""


class Residual(nn.Module):
    """Two 3x3 convolutions with batch norm, and a residual connection."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        same = stride == 1 and channels == width
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels, width, 1, stride, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Add the output of the convolutions to that of the shortcut."""
        seen = functional.relu(self.norm1(self.conv1(images)))
        return functional.relu(self.norm2(self.conv2(seen)) + self.shortcut(images))


def residual_net(widths: tuple[int, ...]) -> nn.Module:
    """Return a stage of two residual blocks for each width, each but the first at half the resolution."""
    stem = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
    layers: list[nn.Module] = [stem, nn.BatchNorm2d(widths[0]), nn.ReLU()]
    for before, width in zip((widths[0], *widths), widths, strict=False):
        layers += [Residual(before, width, 1 if before == width else 2), Residual(width, width, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


def perceptron(width: int, layers: int = 6) -> nn.Sequential:
    """Return square linear layers with GELU in between."""
    stack: list[nn.Module] = []
    for _ in range(layers):
        stack += [nn.Linear(width, width), nn.GELU()]
    return nn.Sequential(*stack[:-1])


class Head(nn.Module):
    """A language model's head after a layer that trains."""

    def __init__(self, features: int, vocabulary: int) -> None:
        super().__init__()
        self.body = nn.Linear(features, features)
        self.head = nn.Linear(features, vocabulary, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.head(functional.gelu(self.body(rows)))
        return logits


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
    """An embedding, averaged over the tokens and projected by a fixed random matrix."""

    projection: Tensor

    def __init__(self, vocabulary: int, features: int, outputs: int = 16) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocabulary, features)
        self.register_buffer("projection", torch.randn(features, outputs) / features**0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Project the mean of the embedded tokens."""
        mean: Tensor = self.wte(tokens).mean(dim=1)
        return mean @ self.projection
