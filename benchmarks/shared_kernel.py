"""Time the shared-kernel layer against the code that it replaces, forward and backward.

`expand`, the reference, is the same grouped convolution over an expanded view, written out; `repeat` copies the kernel
for every channel. `--fold` also folds the channels into the batch of a convolution with one channel, which is so slow
that it disturbs the others.

    python -m benchmarks.shared_kernel [--fold]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from freezehooks.layers import SharedKernelConv2d

from ._comparison import Case, Options, rows_of
from ._measure import Clock, Timing, interleave
from .models import FULL

SHAPES = [(8, 3, 64, 7), (8, 16, 32, 3), (8, 64, 32, 5), (8, 128, 16, 3), (1, 3, 256, 11)]


class Recipe(nn.Module):
    """One of the alternatives, as the module in whose forward people write it."""

    def __init__(self, layer: SharedKernelConv2d, recipe: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> None:
        super().__init__()
        self.weight, self.bias, self.recipe = layer.weight, layer.bias, recipe

    def forward(self, images: Tensor) -> Tensor:
        """Apply the shared kernel to every channel."""
        return self.recipe(images, self.weight, self.bias)


def subjects(channels: int, size: int, device: torch.device, folded: bool) -> dict[str, nn.Module]:
    """Return all ways to apply one kernel to all channels, with the same weight and bias."""
    layer = SharedKernelConv2d(channels, size, padding=size // 2, device=device)
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


def shared(options: Options, folded: bool = False) -> Iterator[Case]:
    """One kernel for all channels, as a layer, over an expanded view and repeated.

    Must hold: the layer is never slower than either, within the quartiles of its time.
    """
    for batch, channels, side, size in SHAPES if options.sizes is FULL else SHAPES[1:2]:
        images = torch.randn(batch, channels, side, side, device=options.device, requires_grad=True)
        clock = Clock(options.device)
        ways = subjects(channels, size, options.device, folded)
        turns = {name: partial(_turn, way=way, images=images, clock=clock) for name, way in ways.items()}
        timings = interleave(turns, *options.turns(301))
        case = Case(f"{batch}x{channels}x{side}x{side}, kernel {size}x{size}", rows_of(timings, "expand"))
        for other in ("expand", "repeat"):
            against = rows_of(timings, other)["layer"].ratio
            case.rows[other].claim(f"layer no slower, {against.median:.2f} x", against.low <= 1)
        yield case


def _turn(number: int, way: nn.Module, images: Tensor, clock: Clock) -> Timing:  # noqa: ARG001  # all rounds are alike
    start = clock()
    way(images).sum().backward()
    return Timing(clock() - start)


def main() -> None:
    """Print a row for each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=301, help="rounds for each shape (%(default)s)")
    parser.add_argument("--fold", action="store_true", help="measure folding into the batch too")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    options = Options(torch.device("cpu"), arguments.rounds)
    print(f"torch {torch.__version__}, one thread, {arguments.rounds} rounds, times over those of the expand recipe")
    for case in shared(options, arguments.fold):
        cells = [f"{r.name} {r.ratio.median:.2f} ({r.ratio.low:.2f} to {r.ratio.high:.2f})" for r in case.rows.values()]
        print(f"{case.title}:  " + "  ".join(cells[1:]))


if __name__ == "__main__":
    main()
