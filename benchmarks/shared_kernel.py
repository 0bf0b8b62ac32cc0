"""Time the shared-kernel layer against the recipes it stands for, forward and backward.

Subjects take turns, round by round and each time in another order; printed is the median of each round's ratio to the
expand recipe, with quartiles.
`expand` is the same grouped convolution over an expanded view, written out; `repeat` copies the kernel for every
channel; `fold` folds the channels into the batch of a convolution with one channel.

    python -m benchmarks.shared_kernel
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from freezehooks.layers import SharedKernelConv2d

SHAPES = [(8, 3, 64, 7), (8, 16, 32, 3), (8, 64, 32, 5), (8, 128, 16, 3), (1, 3, 256, 11)]


def subjects(channels: int, size: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return each way to apply one kernel to all channels, on the same weight and bias."""
    layer = SharedKernelConv2d(channels, size, padding=size // 2)
    weight, bias, padding = layer.weight, layer.bias, size // 2
    many = (channels, 1, size, size)
    spread = bias.expand(channels) if bias is not None else None

    def fold(images: Tensor) -> Tensor:
        folded = functional.conv2d(images.flatten(0, 1).unsqueeze(1), weight, bias, padding=padding)
        return folded.squeeze(1).unflatten(0, images.shape[:2])

    return {
        "expand": lambda x: functional.conv2d(x, weight.expand(many), spread, padding=padding, groups=channels),
        "layer": layer,
        "repeat": lambda x: functional.conv2d(
            x, weight.repeat(channels, 1, 1, 1), spread, padding=padding, groups=channels
        ),
        "fold": fold,
    }


def measure(batch: int, channels: int, side: int, size: int, rounds: int) -> dict[str, list[float]]:
    """Return each subject's times as ratios to the expand recipe's of the same round, sorted."""
    images = torch.randn(batch, channels, side, side, requires_grad=True)
    ways = subjects(channels, size)
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
    parser.add_argument("--rounds", type=int, default=101, help="rounds for each shape (%(default)s)")
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    random.seed(0)
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, {rounds} rounds, times over those of the expand recipe")
    for batch, channels, side, size in SHAPES:
        cells = []
        for name, ratios in measure(batch, channels, side, size, rounds).items():
            low, middle, high = statistics.quantiles(ratios, n=4)
            cells.append(f"{name} {middle:.2f} ({low:.2f} to {high:.2f})")
        print(f"{batch}x{channels}x{side}x{side}, {size}x{size}:  " + "  ".join(cells[1:]))


if __name__ == "__main__":
    main()
