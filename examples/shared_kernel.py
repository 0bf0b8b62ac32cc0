"""Learn the kernel that blurred every channel of two photographs, by a layer and by a rule, side by side.

`SharedKernelConv2d` has one kernel for all channels; the rule `weight = tied(0)` ties the three kernels of a plain
depthwise convolution. From the same start the same optimizer takes both to the same kernel, to the last bit.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from freezehooks import MaskedOptimizer, freeze_entries
from freezehooks.layers import SharedKernelConv2d

SIZE = 7


def photographs() -> Tensor:
    """Return both photographs at a quarter of their size, less the mean around each pixel, (2, 3, 106, 160).

    Without the large bright and dark areas, which look the same under any blur, a few steps find the kernel.
    """
    images = torch.stack([torch.tensor(image) for image in load_sample_images().images])
    images = nn.functional.avg_pool2d(images.movedim(-1, 1).float(), 4)
    images = images - nn.functional.avg_pool2d(images, 5, stride=1, padding=2, count_include_pad=False)
    return images / images.std()


def blur_kernel() -> Tensor:
    """Return a blur along a slanted line, a little off the center, of shape (7, 7) and sum 1."""
    down, right = torch.meshgrid(*[torch.arange(SIZE) - SIZE // 2] * 2, indexing="ij")
    along, across = right - 0.5 * down, down + 0.5 * right
    kernel = torch.exp(-across.square() / 0.8 - (along - 0.5).square() / 5)
    return kernel / kernel.sum()


def train(conv: nn.Conv2d, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Fit the photographs blurred by the known kernel."""
    images = photographs()
    target = nn.functional.conv2d(images, blur_kernel().expand(3, 1, SIZE, SIZE), padding=SIZE // 2, groups=3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(conv(images), target).backward()
        optimizer.step()
        schedule.step()


def draw(kernels: dict[str, Tensor], path: Path) -> None:
    """Draw kernels side by side on one scale, dark for large, with the weights in thousandths."""
    figure, axes = plt.subplots(1, len(kernels), figsize=(10, 3.9), layout="constrained")
    limit = max(kernel.max().item() for kernel in kernels.values())
    for axis, (title, kernel) in zip(axes, kernels.items(), strict=True):
        image = axis.imshow(kernel.numpy(), cmap="Blues", vmin=0, vmax=limit)
        for (row, column), weight in np.ndenumerate(kernel.numpy()):
            color = "white" if weight > limit / 2 else "black"
            axis.text(column, row, f"{round(1000 * weight)}", color=color, ha="center", va="center", fontsize=9)
        axis.set(title=title, xticks=[], yticks=[])
    figure.colorbar(image, ax=axes, shrink=0.8, label="weight")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500, help="AdamW steps for each of the two (%(default)s)")
    parser.add_argument("--picture", type=Path, default=Path("outputs/shared_kernel.png"), help="%(default)s")
    options = parser.parse_args()

    torch.manual_seed(0)
    shared = SharedKernelConv2d(3, SIZE, padding=SIZE // 2, bias=False)
    plain = nn.Conv2d(3, 3, SIZE, padding=SIZE // 2, groups=3, bias=False)
    plain.load_state_dict(shared.to_conv().state_dict())  # the same start: three kernels, all equal
    tied = freeze_entries(plain, "weight = tied(0)")

    train(shared, torch.optim.AdamW(shared.parameters(), lr=3e-2), options.steps)
    train(plain, MaskedOptimizer(torch.optim.AdamW(plain.parameters(), lr=3e-2), tied), options.steps)
    one, three = shared.weight.detach(), plain.weight.detach()
    print(tied)
    print(f"largest difference from the kernel that blurred: {(one[0, 0] - blur_kernel()).abs().max().item():.6f}")
    print(f"the three tied kernels are equal: {torch.equal(three, three[:1].expand_as(three))}")
    print(f"same to the last bit: {torch.equal(one.expand_as(three), three)}")
    learned = {"learned by\nSharedKernelConv2d": one[0, 0], "learned by\nweight = tied(0)": three[0, 0]}
    draw({"the kernel that blurred\nboth photographs": blur_kernel(), **learned}, options.picture)
    print(f"kernels drawn in {options.picture}")


if __name__ == "__main__":
    mpl.use("Agg")
    main()
