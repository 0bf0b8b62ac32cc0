"""Why a zeroed gradient does not freeze: the drift of an entry with gradient hooks only and with MaskedOptimizer."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from freezehooks import MaskedOptimizer, freeze_entries

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD, momentum 0.9": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
    "AdamW, weight decay 0.1": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
}


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    inputs = torch.randn(32, 8)
    optimizer.zero_grad()
    (model(inputs) - inputs.sum(1, keepdim=True)).square().mean().backward()
    optimizer.step()


class ZeroGradient:
    """Zero the gradient of the frozen entries, as most answers on the web suggest, and do nothing else."""

    def __init__(self, entries: slice) -> None:
        self.entries = entries

    def __call__(self, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[:, self.entries] = 0
        return gradient


def drift(make: Callable[..., torch.optim.Optimizer], masked: bool, steps: int) -> float:
    """Train for a while, freeze half of the weights, and return how far they move from there."""
    torch.manual_seed(0)
    model = nn.Linear(8, 1)
    optimizer = make(model.parameters())
    for _ in range(10):
        step(model, optimizer)
    before = model.weight.detach().clone()
    if masked:
        optimizer = MaskedOptimizer(optimizer, freeze_entries(model, "weight[:, :4]"))
    else:
        model.weight.register_hook(ZeroGradient(slice(4)))
    for _ in range(steps):
        step(model, optimizer)
    return (model.weight - before)[:, :4].abs().max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100, help="steps after freezing (%(default)s)")
    steps = parser.parse_args().steps

    print(f"largest drift of a frozen entry in {steps} steps")
    print(f"{'':24}  {'gradient hook alone':>20}  {'MaskedOptimizer':>16}")
    for name, make in OPTIMIZERS.items():
        print(f"{name:24}  {drift(make, False, steps):20.6f}  {drift(make, True, steps):16.6f}")


if __name__ == "__main__":
    main()
