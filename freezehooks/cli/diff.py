"""The command `diff`: which entries of two checkpoints differ, and rules for those that do not."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from .._counted import counted, share_of
from .base import overlap
from .checkpoints import open_checkpoint
from .comparison import Comparison, compare
from .output import Answer, shown
from .pairs import Pairing
from .unchanged import unchanged_rules

BRIEF: Final = "which entries of two checkpoints differ, and rules for those that do not"
ABOUT: Final = (
    "Compare two checkpoints bit for bit: how many entries of each tensor differ, and on demand which; then say what "
    "did not change, as rules. A tensor of several names is compared once."
)
EXAMPLES: Final = """\
  freezehooks diff base.pt tuned.pt
      how many entries of each tensor did fine-tuning move?
  freezehooks diff base.pt tuned.pt --limit 5
      and which: the first five of each
  freezehooks diff base.pt tuned.pt --rules-only > unchanged.txt
  freezehooks verify next.pt --rules unchanged.txt --against base.pt
      what did not change, as rules that hold the next run to the same
"""
ARGUMENTS: Final = ("a", "b", "--limit", "--key", "--key-b", "--rules-only", "--quiet", "--json")

_HEADING: Final = "# What did not change, as rules for `freezehooks verify B --rules FILE --against A`:"
_NO_RULES: Final = "# No entry that a rule can name stayed as it was."


@dataclass(frozen=True, slots=True)
class _Difference:
    """How a tensor of B, under all of its names, differs from the one in A: as facts, and entry by entry."""

    names: list[str]
    facts: list[str]
    shape: tuple[int, ...] = ()
    entries: Comparison | None = None

    def __bool__(self) -> bool:
        return bool(self.facts or (self.entries and self.entries.count))


def run(options: argparse.Namespace) -> Answer:
    """Run the command."""
    first = open_checkpoint(options.a, options.key)
    second = open_checkpoint(options.b, options.key if options.key_b is None else options.key_b)
    pairing, limit = Pairing.of(second, first), options.limit or 0
    compared = (
        _difference([name, *pairing.also[name]], first[other], second[name], limit)
        for name, other in pairing.pairs.items()
    )
    differing = list(filter(None, compared))
    differing += [_Difference([name], ["only in B"]) for name in pairing.alone]
    differing += [_Difference([name], ["only in A"]) for name in pairing.missing]
    unchanged = list(unchanged_rules(first, second, pairing.pairs))
    rules = [_HEADING, *unchanged] if unchanged else [_NO_RULES]
    count = len(pairing.pairs) + len(pairing.alone) + len(pairing.missing)
    lines = rules if options.rules_only else [*_said(differing, counted(count, "tensor", "tensors")), *rules]
    told = {"tensors": count, "differing": differing, "unchanged": [line for line in unchanged if line[0] != "#"]}
    return Answer(int(bool(differing)), lines, told)


def _difference(names: list[str], a: Tensor, b: Tensor, limit: int) -> _Difference:
    facts = [f"{a.dtype} in A, {b.dtype} in B"] if a.dtype != b.dtype else []
    facts += [f"shape {tuple(a.shape)} in A, {tuple(b.shape)} in B"] if a.shape != b.shape else []
    if a.dtype != b.dtype or a.ndim != b.ndim:
        return _Difference(names, facts)
    box = overlap(a, b)
    return _Difference(names, facts, tuple(b.shape), compare(b[box], a[box], limit))


def _said(differing: Sequence[_Difference], tensors: str) -> Iterator[str]:
    """Yield the lines to print: how many tensors differ, how many entries of each, and the listed entries."""
    said = counted(len(differing), f"of {tensors} differs", f"of {tensors} differ")
    yield said if differing else f"nothing differs: {tensors}"
    for each in differing:
        name = ", also ".join(map(shown, each.names))
        yield from (f"{name}: {fact}" for fact in each.facts)
        if each.entries and each.entries.count:
            share = share_of(each.entries.count, each.entries.compared, "differs", "differ")
            yield f"{name} {each.shape}: {share}, by up to {each.entries.gap:g}"
    for each in differing:
        if each.entries and each.entries.examples:
            yield f"{shown(each.names[0])}:"
            yield from each.entries.listed(each.names[0], "{0}: {2} in A, {1} in B")
