"""ResNet-50, written out so that figures do not depend on a library of models."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

EXPANSION = 4
"""How many times wider a bottleneck's output is than its 3x3 convolution."""


def _convolution(channels: int, width: int, size: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(channels, width, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width))


class Bottleneck(nn.Module):
    """A 3x3 convolution between two 1x1 ones, with a residual connection."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        wide = EXPANSION * width
        self.narrow = _convolution(channels, width, 1)
        self.look = _convolution(width, width, 3, stride)
        self.widen = _convolution(width, wide, 1)
        same = stride == 1 and channels == wide
        self.shortcut = nn.Identity() if same else _convolution(channels, wide, 1, stride)

    def forward(self, images: Tensor) -> Tensor:
        """Add the output of the convolutions to that of the shortcut."""
        seen = functional.relu(self.look(functional.relu(self.narrow(images))))
        return functional.relu(self.widen(seen) + self.shortcut(images))


def resnet(blocks: tuple[int, ...], width: int = 64, classes: int = 1000) -> nn.Module:
    """Return a ResNet of bottlenecks.

    Args:
        blocks: How many bottlenecks each stage has; ResNet-50 has (3, 4, 6, 3).
        width: Width of the first stage; each further one is twice as wide, at half the resolution.
        classes: The number of classes.
    """
    layers: list[nn.Module] = [_convolution(3, width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)]
    channels = width
    for stage, count in enumerate(blocks):
        for block in range(count):
            stride = 2 if stage and not block else 1
            layers.append(Bottleneck(channels, width << stage, stride))
            channels = EXPANSION * (width << stage)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
