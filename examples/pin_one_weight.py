"""Hold one weight of a convolution at 1 while the other 26 train; thaw it; hold it again."""

from __future__ import annotations

import argparse

import torch
from torch import nn

from freezehooks import MaskedOptimizer, freeze_entries

ENTRY = (0, 1, 2, 1)


def train(conv: nn.Conv2d, optimizer: torch.optim.Optimizer, steps: int) -> float:
    """Fit the mean of the middle pixels, and return the pinned entry after the last step."""
    for _ in range(steps):
        images = torch.randn(16, 3, 8, 8)
        loss = (conv(images) - images[:, :, 1:-1, 1:-1].mean(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return conv.weight[ENTRY].item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200, help="training steps in each part (%(default)s)")
    steps = parser.parse_args().steps

    torch.manual_seed(0)
    conv = nn.Conv2d(3, 1, kernel_size=3)
    optimizer = torch.optim.AdamW(conv.parameters(), lr=1e-2, weight_decay=0.1)
    with torch.no_grad():
        conv.weight[ENTRY] = 1
    print(f"never frozen   weight{list(ENTRY)} = {train(conv, optimizer, steps):.6f}   it moved")

    frozen = freeze_entries(conv, "weight[0, 1, 2, 1] = 1")
    masked = MaskedOptimizer(optimizer, frozen)
    print(f"frozen         weight{list(ENTRY)} = {train(conv, masked, steps):.6f}")

    frozen.remove()
    print(f"detached       weight{list(ENTRY)} = {train(conv, masked, steps):.6f}   it moved again")

    frozen.attach()
    print(f"attached       weight{list(ENTRY)} = {conv.weight[ENTRY].item():.6f}")
    print(f"and trained    weight{list(ENTRY)} = {train(conv, masked, steps):.6f}")
    print(frozen)


if __name__ == "__main__":
    main()
