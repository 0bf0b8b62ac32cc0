"""Train with FSDP2, all parameters sharded and some entries frozen, and compare with one process on the whole batch.

torchrun --nproc-per-node 2 examples/distributed/train_fsdp2.py
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from freezehooks import FrozenEntries, MaskedOptimizer, freeze_entries

RULES = """
0.weight[center] = 0        # no kernel sees its center
0.bias[:2] = 0.5
3.weight[smallest(0.5)]     # the smaller half keeps its values
"""


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(288, 10)).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(32, 1, 8, 8, generator=generator, dtype=torch.float64)
    return images, torch.randint(10, (32,), generator=generator)


def train(model: nn.Module, frozen: FrozenEntries, steps: int, part: slice) -> None:
    """Train on this rank's share of each batch."""
    optimizer = MaskedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1), frozen)
    for step in range(steps):
        images, targets = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[part]), targets[part]).backward()
        optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50, help="steps of training (%(default)s)")
    steps = parser.parse_args().steps

    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = build()
    for layer in (model[0], model[3]):
        fully_shard(layer)
    fully_shard(model)
    frozen = freeze_entries(
        model, RULES
    )  # freezing before sharding works too; regions and values refer to the whole tensors
    train(model, frozen, steps, slice(rank, None, ranks))

    alone = build()
    alone_frozen = freeze_entries(alone, RULES)
    train(alone, alone_frozen, steps, slice(None))
    at_frozen, at_free = [0.0], [0.0]
    for name, parameter in alone.named_parameters():
        weight: Any = model.get_parameter(name)
        difference = (weight.full_tensor() - parameter).abs().detach()
        held = alone_frozen[name].frozen if name in alone_frozen else torch.zeros_like(difference, dtype=torch.bool)
        at_frozen += difference[held].tolist()
        at_free += difference[~held].tolist()
    print(f"rank {rank}: regions and values take {frozen.nbytes} bytes, in one process {alone_frozen.nbytes}")
    if rank == 0:
        print(frozen)
        print(f"{ranks} ranks against one process, {steps} steps")
        print(f"largest difference of a frozen entry: {max(at_frozen):.1e}")
        print(f"largest difference of a free entry:   {max(at_free):.1e}")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort the interpreter at exit


if __name__ == "__main__":
    main()
