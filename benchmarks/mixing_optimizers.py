"""Compare free entries with two references, under optimizers whose update of one entry depends on others.

For each optimizer this trains one layer, half of its weights frozen at 0.5, and prints the largest difference of a free
entry after all steps, relative to the largest weight, from two references: the same optimizer on a model that computes
with `where(frozen, value, weight)`, and the same optimizer on a flat tensor of only the free entries.

    python -m benchmarks.mixing_optimizers
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Adafactor, AdamW, Optimizer

from freezehooks import MaskedOptimizer, freeze_entries

SHAPE, VALUE = (16, 12), 0.5
FROZEN = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) < 0.5

OPTIMIZERS: dict[str, Callable[[list[Tensor]], Optimizer]] = {
    "AdamW (elementwise)": lambda p: AdamW(p, lr=1e-2, weight_decay=0),
    "Adafactor": lambda p: Adafactor(p, lr=1e-2),
    "LBFGS, strong Wolfe": lambda p: LBFGS(p, line_search_fn="strong_wolfe"),
    "Muon": lambda p: torch.optim.Muon(p, lr=1e-2, weight_decay=0),
}


def train(optimizer: Optimizer, weight: Callable[[], Tensor], steps: int) -> Tensor:
    """Fit random targets and return the weight that the last forward would compute with."""
    inputs, targets = torch.randn(64, SHAPE[1]), torch.randn(64, SHAPE[0])

    def closure() -> float:
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(torch.tanh(inputs @ weight().T), targets)
        loss.backward()
        return loss  # type: ignore[return-value]  # torch's annotation wants a float

    for _ in range(steps):
        optimizer.step(closure)
    return weight().detach().clone()


def compare(make: Callable[[list[Tensor]], Optimizer], steps: int) -> dict[str, float]:
    """Return the largest relative difference of a free entry from each reference; nan if it cannot be built."""
    start = torch.randn(SHAPE)
    runs: dict[str, Tensor] = {}
    weight = nn.Parameter(start.clone())
    optimizer = MaskedOptimizer(make([weight]), freeze_entries({"weight": weight}, {"weight": (FROZEN, VALUE)}))
    latent = nn.Parameter(torch.where(FROZEN, VALUE, start))
    free = nn.Parameter(start[~FROZEN])
    subjects: dict[str, tuple[Callable[[], Optimizer], Callable[[], Tensor]]] = {
        "masked": (lambda: optimizer, lambda: weight),
        "where": (lambda: make([latent]), lambda: torch.where(FROZEN, VALUE, latent)),
        "alone": (lambda: make([free]), lambda: torch.full(SHAPE, VALUE).masked_scatter(~FROZEN, free)),
    }
    for name, (build, read) in subjects.items():
        torch.manual_seed(1)
        try:
            runs[name] = train(build(), read, steps)
        except ValueError:  # Muon takes matrices and nothing else
            runs[name] = torch.full(SHAPE, torch.nan)
    scale = runs["masked"].abs().max()
    return {name: ((run - runs["masked"]).abs().max() / scale).item() for name, run in runs.items() if name != "masked"}


def main() -> None:
    """Print a row for each optimizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="steps of each optimizer (%(default)s)")
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    print(
        f"torch {torch.__version__}, float64, {steps} steps, largest difference of a free entry over the largest weight"
    )
    print(f"{'':30}  {'where(frozen, value, weight)':>28}  {'free entries alone':>18}")
    for name, make in OPTIMIZERS.items():
        found = compare(make, steps)
        print(f"{name:30}  {found['where']:28.1e}  {found['alone']:18.1e}")


if __name__ == "__main__":
    main()
