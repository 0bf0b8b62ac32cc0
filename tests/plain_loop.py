"""The small network that Fabric and Accelerate train in the tests, as a plain loop would."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

PLAIN: Final = "0.weight[:, ::2] = 0.1\n0.bias[1]"
SPEC: Final = f"{PLAIN}\n2[smallest(0.5)] = -0.0"


def net(seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)


def batch(step: int) -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
