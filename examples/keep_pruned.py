"""Prune a small trained network by magnitude, then fine-tune it: what was pruned stays pruned."""

from __future__ import annotations

import argparse
import copy

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from freezehooks import MaskedOptimizer, freeze_entries


def data() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    return torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Train on the first 1400 digits."""
    inputs, targets = data()
    for _ in range(steps):
        batch = torch.randint(1400, (128,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[batch]), targets[batch]).backward()
        optimizer.step()


def report(when: str, model: nn.Module) -> None:
    """Print how many weights are exactly 0, and the accuracy on the digits not trained on."""
    inputs, targets = data()
    weights = torch.cat([p.flatten() for p in model.parameters() if p.ndim > 1])
    sparsity = (weights == 0).float().mean().item()
    accuracy = (model(inputs[1400:]).argmax(1) == targets[1400:]).float().mean().item()
    print(f"{when:28} sparsity {sparsity:6.1%}   accuracy {accuracy:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400, help="steps of training and of fine-tuning (%(default)s)")
    steps = parser.parse_args().steps

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    train(model, torch.optim.AdamW(model.parameters(), lr=3e-3), steps)
    report("trained", model)

    with freeze_entries(model, "*.weight[smallest(0.8)] = 0"):
        pass  # imposing has pruned the weights; the zeros stay when the hooks are removed
    report("pruned", model)

    plain = copy.deepcopy(model)
    train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-3), steps)
    report("fine-tuned, nothing frozen", plain)

    frozen = freeze_entries(model, "*.weight[zeros] = 0")
    train(model, MaskedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), frozen), steps)
    report("fine-tuned, zeros frozen", model)
    print(frozen)


if __name__ == "__main__":
    main()
