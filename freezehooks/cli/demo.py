"""The command `demo`: how far frozen weights drift under a gradient hook alone, and under `MaskedOptimizer`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from .._handle import freeze_entries
from .._optimizer import MaskedOptimizer
from .output import Answer

BRIEF: Final = "watch weights drift that a gradient hook freezes, in ten seconds"
ABOUT: Final = """\
Train a small layer, freeze half of its weights in mid-training, train on, and print how far these weights have moved:
frozen by a hook that sets their gradient to 0, and by freezehooks. It needs torch alone, and takes a few seconds."""
EXAMPLES: Final = """\
  freezehooks demo
      the table, and the code that holds the weights
  freezehooks demo --json
      the same numbers for a program"""
ARGUMENTS: Final = ("--steps", "--quiet", "--json")

_WARM_UP: Final = 10

_OPTIMIZERS: Final[dict[str, Callable[..., torch.optim.Optimizer]]] = {
    "SGD, momentum 0.9": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
    "AdamW, weight decay 0.1": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
}

_BEFORE: Final = f"""\
A linear layer trains for {_WARM_UP} steps. Then half of its weights are frozen, and it trains for {{}} more.
How far the frozen weights have moved:
"""
_AFTER: Final = """
A gradient of 0 does not stop momentum and weight decay. The two lines that do:

  frozen = freeze_entries(model, "weight[:, :4]")
  optimizer = MaskedOptimizer(optimizer, frozen)"""


@dataclass(frozen=True, slots=True)
class Drift:
    """How far frozen weights moved under one optimizer, at most."""

    optimizer: str
    gradient_hook: float
    freezehooks: float

    def __str__(self) -> str:
        """Return it as a row of the table."""
        return f"{self.optimizer:24}{self.gradient_hook:20.3f}{self.freezehooks:14.3f}"


class ZeroGradient:
    """Set the gradient of some columns to 0: what is suggested most often, and no more."""

    def __init__(self, columns: slice) -> None:
        self.columns = columns

    def __call__(self, gradient: Tensor) -> Tensor:
        """Return the gradient with zeros in these columns."""
        gradient = gradient.clone()
        gradient[:, self.columns] = 0
        return gradient


def run(options: argparse.Namespace) -> Answer:
    """Run the command."""
    with torch.random.fork_rng(devices=[]):
        rows = [
            Drift(name, *(_drift(make, masked, options.steps) for masked in (False, True)))
            for name, make in _OPTIMIZERS.items()
        ]
    head = f"{'':24}{'gradient hook alone':>20}{'freezehooks':>14}"
    held = not any(row.freezehooks for row in rows)
    found: dict[str, Any] = {"steps": options.steps, "drift": rows}
    return Answer(0 if held else 1, [_BEFORE.format(options.steps), head, *map(str, rows), _AFTER], found)


def _drift(make: Callable[..., torch.optim.Optimizer], masked: bool, steps: int) -> float:
    """Warm an optimizer up, freeze half of the weights, and return how far they move from there."""
    torch.manual_seed(0)
    model = nn.Linear(8, 1)
    optimizer = make(model.parameters())
    _train(model, optimizer, _WARM_UP)
    before = model.weight.detach().clone()
    if masked:
        optimizer = MaskedOptimizer(optimizer, freeze_entries(model, "weight[:, :4]"))
    else:
        model.weight.register_hook(ZeroGradient(slice(4)))
    _train(model, optimizer, steps)
    return (model.weight.detach() - before)[:, :4].abs().max().item()


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        inputs = torch.randn(32, 8)
        optimizer.zero_grad()
        (model(inputs) - inputs.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
