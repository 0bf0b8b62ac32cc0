"""The command `diff`: which entries of two checkpoints differ, and the rules that say which do not."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Final

from torch import Tensor

from .._counted import counted, share_of
from .base import overlap
from .checkpoints import counterparts, open_checkpoint
from .comparison import compare
from .output import say, shown
from .unchanged import unchanged_rules

BRIEF: Final = "which entries of two checkpoints differ, and rules for those that do not"
ABOUT: Final = "Compare two checkpoints entry by entry, bit for bit; then say what did not change, as rules."
EXAMPLES: Final = """\
  freezehooks diff base.pt tuned.pt
      which entries did fine-tuning move?
  freezehooks diff base.pt tuned.pt --limit 0
      how many of each parameter, no entry by itself
  freezehooks verify next.pt --rules unchanged.txt --against base.pt
      the rules at the end of the answer, put into unchanged.txt, hold the next run to the same
"""
ARGUMENTS: Final = ("a", "b", "--limit", "--key", "--key-b")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    first = open_checkpoint(options.a, options.key)
    second = open_checkpoint(options.b, options.key if options.key_b is None else options.key_b)
    names = counterparts(second, first)
    differing = _say_differences(first, second, names, options.limit)
    unchanged = list(unchanged_rules(first, second, names))
    heading = "What did not change, as rules for `freezehooks verify B --rules FILE --against A`:"
    for line in [f"# {heading if unchanged else 'No entry that a rule can name stayed as it was.'}", *unchanged]:
        say(line)
    return int(differing > 0)


def _say_differences(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], names: Mapping[str, str], limit: int
) -> int:
    """Say what differs, one tensor after another, and return of how many something does."""
    missing = sorted(set(first) - set(names.values()))
    differing = len(missing)
    for name, tensor in second.items():
        lines = (
            list(_lines(name, first[names[name]], tensor, limit)) if name in names else [f"{shown(name)}: only in B"]
        )
        differing += bool(lines)
        for line in lines:
            say(line)
    for name in missing:
        say(f"{shown(name)}: only in A")
    tensors = counted(len(second) + len(missing), "tensor", "tensors")
    said = counted(differing, f"of {tensors} differs", f"of {tensors} differ")
    say(said if differing else f"nothing differs: {tensors}")
    return differing


def _lines(name: str, a: Tensor, b: Tensor, limit: int) -> Iterator[str]:
    """Yield what differs between a tensor of A and one of B; nothing where nothing does."""
    if a.dtype != b.dtype:
        yield f"{shown(name)}: {a.dtype} in A, {b.dtype} in B"
    if a.shape != b.shape:
        yield f"{shown(name)}: shape {tuple(a.shape)} in A, {tuple(b.shape)} in B"
    if a.dtype == b.dtype and a.ndim == b.ndim:
        box = overlap(a, b)
        comparison = compare(b[box], a[box], limit)
        if comparison.count:
            found = share_of(comparison.count, b[box].numel(), "differs", "differ")
            yield f"{shown(name)} {tuple(b.shape)}: {found}, by up to {comparison.gap:g}"
        yield from comparison.listed(name, "{0}: {2} in A, {1} in B")
