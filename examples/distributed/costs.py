"""Print what frozen entries cost each rank of a large model under FSDP2, with neither the model nor the ranks at hand.

python examples/distributed/costs.py --ranks 64

FSDP2 gives every rank a share of the rows of each parameter, and what is frozen is held in that share alone. So this
makes one share of each kind of parameter, freezes entries of it, takes a step, and counts the bytes that are there;
tests/test_costs.py compares the figures with those of a small model on one, two and four ranks.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cache
from typing import NamedTuple

import torch
from torch import nn

from freezehooks import FrozenEntries, freeze_entries

LLAMA_3_70B = {  # how many parameters of each kind there are, and their shape
    "embed_tokens.weight": (1, (128_256, 8_192)),
    "layers.*.q_proj.weight": (80, (8_192, 8_192)),
    "layers.*.k_proj.weight": (80, (1_024, 8_192)),
    "layers.*.v_proj.weight": (80, (1_024, 8_192)),
    "layers.*.o_proj.weight": (80, (8_192, 8_192)),
    "layers.*.gate_proj.weight": (80, (28_672, 8_192)),
    "layers.*.up_proj.weight": (80, (28_672, 8_192)),
    "layers.*.down_proj.weight": (80, (8_192, 28_672)),
    "layers.*.norms.weight": (160, (8_192,)),
    "norm.weight": (1, (8_192,)),
    "lm_head.weight": (1, (128_256, 8_192)),
}


class Rule(NamedTuple):
    """What is frozen in every parameter whose name matches, or which rows of it train alone in the whole model."""

    target: str
    held: str = ""
    new_rows: int | None = None

    def __str__(self) -> str:
        return f"{self.target}{self.held}" if self.new_rows is None else f"{self.target}[{self.new_rows}:]"

    def trains(self, name: str) -> bool:
        return self.new_rows is None or fnmatchcase(name, self.target)

    def in_share(self, name: str, first_row: int, rows: int) -> str:
        """Return what is frozen in some rows of a parameter: region and value as text, or nothing."""
        if not fnmatchcase(name, self.target):
            return ""
        if self.new_rows is None:
            return self.held
        old = min(self.new_rows - first_row, rows)
        return f"[:{old}]" if old > 0 else ""


NEW_TOKENS = Rule("embed_tokens.weight", new_rows=128_000)
RULES = (
    Rule("*_proj.weight", "[:, ::2] = 0"),
    Rule("*_proj.weight", "[nm(2, 4)] = 0"),
    Rule("*_proj.weight", "[nm(2, 4)]"),
)


class Cost(NamedTuple):
    """What a rank pays: bytes, and how many parameters have frozen entries in its shares."""

    held: int = 0  # regions and values: `frozen.nbytes`
    moments: int = 0  # of AdamW
    compact_moments: int = 0  # the same with compact=True,
    copies: int = 0  # and what that keeps beside them: the guard's `nbytes`
    parameters: int = 0

    def writes(self, *, compact: bool = False) -> dict[str, int]:
        """Return how many writes freezing adds to a training step, by part of it."""
        n = self.parameters
        around = n + min(n, 1)  # each weight after the optimizer's step, and all gradients at once before it
        copied = 3 * n if self.copies else 0  # weights and gradients out, weights back; none if the free lie in a row
        return {"forward": 2 * n, "backward": n, "step": copied if compact else around}


def cost_on(rank: int, ranks: int, model: Mapping[str, tuple[int, tuple[int, ...]]], rule: Rule) -> Cost:
    """Return what a rule costs one rank."""
    paid = [Cost()]
    for name, (count, shape) in model.items():
        shares = torch.empty(shape, device="meta").chunk(ranks)  # as FSDP2 does
        if rule.trains(name) and rank < len(shares):  # else there is no state, or no share
            held = rule.in_share(name, rank * len(shares[0]), len(shares[rank]))
            paid += [cost_of_share(shares[rank].shape, held)] * count
    return Cost(*map(sum, zip(*paid, strict=True)))


@cache
def cost_of_share(shape: torch.Size, held: str) -> Cost:
    """Freeze entries of one share, and count what is there after a step."""
    share = nn.Parameter(torch.randn(shape))
    share.grad = torch.zeros(shape)
    frozen = freeze_entries({"share": share}, f"share{held}" if held else [])
    moments, _ = _bytes_of_step(share, frozen, compact=False)
    compact_moments, copies = _bytes_of_step(share, frozen, compact=True)
    return Cost(frozen.nbytes, moments, compact_moments, copies, len(frozen))


def _bytes_of_step(share: nn.Parameter, frozen: FrozenEntries, *, compact: bool) -> tuple[int, int]:
    optimizer = torch.optim.AdamW([share], fused=True)
    guard = frozen.guard(optimizer, compact=compact)
    optimizer.step()
    moments = sum(each.nbytes for each in optimizer.state[share].values() if each.ndim)  # not the count of steps
    copies = guard.nbytes
    guard.remove()
    return moments, copies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=64, help="how many GPUs share the model (%(default)s)")
    ranks = parser.parse_args().ranks
    print("| rule | held | moments | moments, compact | copies, compact | writes a step |")
    print("| --- | --- | --- | --- | --- | --- |")
    for rule in (NEW_TOKENS, *RULES):
        costs = [cost_on(rank, ranks, LLAMA_3_70B, rule) for rank in range(ranks)]
        most = Cost(*map(max, zip(*costs, strict=True)))
        figures = " | ".join(f"{each / 1e6:,.0f} MB" if each else "0" for each in most[:4])
        print(f"| `{rule}` | {figures} | {sum(most.writes().values()):,} |")


if __name__ == "__main__":
    main()
