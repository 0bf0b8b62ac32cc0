"""A fully connected network computes a 1x1 convolution from a style code, one code for each digit of a batch.

The convolution lights a digit as a relief: its kernel mixes brightness and slopes by the code's angle and amount. The
gradient reaches the generator through the convolution, so it learns what no single fixed convolution can do.
"""

from __future__ import annotations

import argparse
import math

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from freezehooks.layers import SynthesizedConv2d


def load_features() -> Tensor:
    """Return brightness, slope to the right and slope downwards of every digit, (1797, 3, 8, 8)."""
    images = torch.tensor(load_digits().images, dtype=torch.float32) / 16
    down, right = torch.gradient(images, dim=(1, 2))
    return torch.stack([images, 2 * right, 2 * down], dim=1)


def draw_codes(count: int) -> Tensor:
    """Return styles: an angle in half turns from -1 to 1, and an amount of relief from 0 to 1."""
    return torch.stack([2 * torch.rand(count) - 1, torch.rand(count)], dim=1)


def relief(features: Tensor, codes: Tensor) -> Tensor:
    """Return the images to make, (batch, 1, 8, 8)."""
    return torch.einsum("bchw,bc->bhw", features, true_kernels(codes)).unsqueeze(1)


def true_kernels(codes: Tensor) -> Tensor:
    """Return the three true weights for each code, which the network never sees."""
    angle, amount = math.pi * codes[:, 0], codes[:, 1]
    return torch.stack([1 - amount, amount * angle.cos(), amount * angle.sin()], dim=1)


def best_fixed_loss(features: Tensor, target: Tensor) -> float:
    """Return the loss of the best 1x1 convolution that does not depend on the code."""
    columns = nn.functional.pad(features.movedim(1, -1), (0, 1), value=1.0).flatten(0, 2)  # 1 for the bias
    wanted = target.reshape(-1, 1)
    return nn.functional.mse_loss(columns @ torch.linalg.lstsq(columns, wanted).solution, wanted).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="training steps, of 64 digits each (%(default)s)")
    steps = parser.parse_args().steps

    torch.manual_seed(0)
    train, held_out = load_features().split([1400, 397])
    new_codes = draw_codes(len(held_out))
    wanted = relief(held_out, new_codes)

    generator = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 4))
    conv = SynthesizedConv2d(generator, in_channels=3, out_channels=1, kernel_size=1)  # 3 weights and a bias
    optimizer = torch.optim.AdamW(generator.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    before = nn.functional.mse_loss(conv(held_out, new_codes), wanted).item()
    for step in range(steps):
        features, codes = train[torch.randint(len(train), (64,))], draw_codes(64)
        optimizer.zero_grad()
        nn.functional.mse_loss(conv(features, codes), relief(features, codes)).backward()
        if step == 0:
            norm = nn.utils.get_total_norm([p.grad for p in generator.parameters() if p.grad is not None]).item()
            print(f"gradient norm at the generator, first step: {norm:.4f}, from {len(codes)} codes for 64 digits")
        optimizer.step()
        schedule.step()

    print(f"loss on {len(held_out)} held-out digits, each with a new code")
    print(f"  before training               {before:.6f}")
    print(f"  after {steps:5} steps             {nn.functional.mse_loss(conv(held_out, new_codes), wanted).item():.6f}")
    print(f"  best 1x1 without a code       {best_fixed_loss(held_out, wanted):.6f}")
    print("angle  amount   kernel wanted            kernel made")
    for degrees, amount in ((0, 0.0), (45, 1.0), (-90, 0.5)):
        code = torch.tensor([degrees / 180, amount])
        rows = true_kernels(code[None])[0], conv.synthesize_kernel(code)[0].flatten()
        print(f"{degrees:5}  {amount:6}   " + "    ".join(" ".join(f"{w:6.3f}" for w in row.tolist()) for row in rows))


if __name__ == "__main__":
    main()
