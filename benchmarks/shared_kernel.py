"""Time the shared-kernel layer against the recipes it stands for, forward and backward.

Subjects take turns, round by round and each time in another order; printed is the median of each round's ratio to the
expand recipe, with quartiles.
`expand` is the same grouped convolution over an expanded view, written out; `repeat` copies the kernel for every
channel. `--fold` adds folding the channels into the batch of a convolution with one channel, which is so much slower
that it disturbs the others.

    python -m benchmarks.shared_kernel [--fold]
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from freezehooks.layers import SharedKernelConv2d

SHAPES = [(8, 3, 64, 7), (8, 16, 32, 3), (8, 64, 32, 5), (8, 128, 16, 3), (1, 3, 256, 11)]


class Recipe(nn.Module):
    """One of the recipes, as the module in whose forward people write it."""

    def __init__(self, layer: SharedKernelConv2d, recipe: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> None:
        super().__init__()
        self.weight, self.bias, self.recipe = layer.weight, layer.bias, recipe

    def forward(self, images: Tensor) -> Tensor:
        """Apply the one kernel to every channel."""
        return self.recipe(images, self.weight, self.bias)


def subjects(channels: int, size: int, folded: bool) -> dict[str, nn.Module]:
    """Return each way to apply one kernel to all channels, on the same weight and bias."""
    layer = SharedKernelConv2d(channels, size, padding=size // 2)
    padding, groups, many = size // 2, channels, (channels, 1, size, size)

    def expand(images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        spread = None if bias is None else bias.expand(channels)
        return functional.conv2d(images, weight.expand(many), spread, padding=padding, groups=groups)

    def repeat(images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        copies = None if bias is None else bias.repeat(channels)
        return functional.conv2d(images, weight.repeat(channels, 1, 1, 1), copies, padding=padding, groups=groups)

    def fold(images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output = functional.conv2d(images.flatten(0, 1).unsqueeze(1), weight, bias, padding=padding)
        return torch.unflatten(output.squeeze(1), 0, images.shape[:2])

    ways: dict[str, nn.Module] = {"expand": Recipe(layer, expand), "layer": layer, "repeat": Recipe(layer, repeat)}
    return {**ways, "fold": Recipe(layer, fold)} if folded else ways


def measure(batch: int, channels: int, side: int, size: int, rounds: int, folded: bool) -> dict[str, list[float]]:
    """Return each subject's times as ratios to the expand recipe's of the same round, sorted."""
    images = torch.randn(batch, channels, side, side, requires_grad=True)
    ways = subjects(channels, size, folded)
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways.items())
    for _ in range(rounds):
        seconds = {}
        random.shuffle(order)
        for name, way in order:
            start = time.perf_counter()
            way(images).sum().backward()
            seconds[name] = time.perf_counter() - start
        for name, spent in seconds.items():
            ratios[name].append(spent / seconds["expand"])
    return {name: sorted(found) for name, found in ratios.items()}


def main() -> None:
    """Print a row for each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=301, help="rounds for each shape (%(default)s)")
    parser.add_argument("--fold", action="store_true", help="measure folding into the batch too")
    options = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, {options.rounds} rounds, times over those of the expand recipe")
    for batch, channels, side, size in SHAPES:
        cells = []
        for name, ratios in measure(batch, channels, side, size, options.rounds, options.fold).items():
            low, middle, high = statistics.quantiles(ratios, n=4)
            cells.append(f"{name} {middle:.2f} ({low:.2f} to {high:.2f})")
        print(f"{batch}x{channels}x{side}x{side}, {size}x{size}:  " + "  ".join(cells[1:]))


if __name__ == "__main__":
    main()
