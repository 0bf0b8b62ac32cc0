"""Convolve a sparse volume with a kernel that has only the seven taps of a cross, with three settings of the bias.

An empty neighborhood gives the bias, exactly 0, or the bias at given positions only. Absent taps stay exactly 0 under
AdamW without a wrapper, while taps of a plain convolution that merely start at 0 drift away.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from freezehooks import cross
from freezehooks.layers import MaskedConv3d

SIDE = 9
VOXELS = ((2, 2, 2), (2, 3, 2), (6, 5, 6))
POSITIONS = {"empty, slice 0": (0, 8, 8), "empty, slice 8": (8, 0, 0), "by a voxel": (2, 2, 1)}
OFFSETS = torch.arange(-1, 2).abs()
CROSS = (OFFSETS[:, None, None] + OFFSETS[:, None] + OFFSETS <= 1).int()  # the same as cross(3), as a tensor


def train(conv: nn.Conv3d, steps: int) -> None:
    """Fit the discrete Laplacian, plus 1, of random sparse volumes."""
    laplacian = CROSS.float()
    laplacian[1, 1, 1] = -6
    optimizer = torch.optim.AdamW(conv.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        volumes = torch.rand(4, 1, SIDE, SIDE, SIDE) * (torch.rand(4, 1, SIDE, SIDE, SIDE) < 0.1)
        target = nn.functional.conv3d(volumes, laplacian[None, None], padding=1) + 1
        optimizer.zero_grad()
        (conv(volumes) - target).square().mean().backward()
        optimizer.step()


def report(name: str, conv: nn.Conv3d, taps: int) -> None:
    """Print the convolution's output for a volume with three voxels, and the taps off the cross after training."""
    assert conv.bias is not None
    volume = torch.zeros(1, 1, SIDE, SIDE, SIDE)
    volume[0, 0, [z for z, _, _ in VOXELS], [y for _, y, _ in VOXELS], [x for _, _, x in VOXELS]] = 1
    output, bias = conv(volume)[0, 0], conv.bias.item()
    values = [output[position].item() for position in POSITIONS.values()]
    words = ["the bias" if value == bias else "exactly 0" if value == 0 else f"{value:.4f}" for value in values]
    absent = conv.weight[:, :, CROSS == 0].abs().max().item()
    print(f"{name:18}{taps:3} of 27  {bias:7.4f}  " + "  ".join(f"{word:>14}" for word in words) + f"  {absent:.6g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200, help="AdamW steps for each convolution (%(default)s)")
    steps = parser.parse_args().steps

    first_slices = torch.zeros(SIDE, SIDE, SIDE, dtype=torch.bool)
    first_slices[:4] = True
    places: dict[str, str | Tensor] = {
        "everywhere": "everywhere",
        "response": "response",
        "tensor, slices 0-3": first_slices,
    }
    print(f"{'bias_at':18}{'taps':>8}  {'bias':>8}  {'  '.join(f'{at:>14}' for at in POSITIONS)}  largest absent tap")
    for name, bias_at in places.items():
        torch.manual_seed(0)
        conv = MaskedConv3d(1, 1, kernel_size=3, padding=1, mask=cross(3), bias_at=bias_at)
        train(conv, steps)
        report(name, conv, int(conv.mask.sum()))

    torch.manual_seed(0)
    plain = nn.Conv3d(1, 1, kernel_size=3, padding=1)
    with torch.no_grad():
        plain.weight[:, :, CROSS == 0] = 0
    train(plain, steps)
    report("plain, zeroed once", plain, plain.weight.numel())

    by_tensor = MaskedConv3d(1, 1, kernel_size=3, mask=CROSS)
    print(f"the mask is the same from cross(3) and from a tensor: {torch.equal(conv.mask, by_tensor.mask)}")


if __name__ == "__main__":
    main()
