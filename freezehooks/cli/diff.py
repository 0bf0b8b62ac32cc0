"""The command `diff`: which entries of two checkpoints differ, and the rules that say which do not."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .._counted import counted, share_of
from .base import overlap
from .checkpoints import counterparts, open_checkpoint
from .comparison import Comparison, compare
from .output import say, shown
from .unchanged import unchanged_rules
from .verify import add_limit

_EXAMPLES = """\
examples:
  freezehooks diff base.pt tuned.pt
      which entries did fine-tuning move?

  freezehooks diff base.pt tuned.pt --limit 0
      how many of each parameter, no entry by itself

  freezehooks verify next.pt --rules unchanged.txt --against base.pt
      the rules at the end of the answer, put into unchanged.txt, hold the next run to the same
"""


def add_parser(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command to those of the command line."""
    parser = commands.add_parser(
        "diff",
        help="which entries of two checkpoints differ, and rules for those that do not",
        description="Compare two checkpoints entry by entry, bit for bit; then say what did not change, as rules.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("first", metavar="A", help="a file of torch.save or of safetensors")
    parser.add_argument("second", metavar="B", help="another")
    add_limit(parser)
    parser.add_argument("--key", help="where in the files the tensors are, with dots between nested keys")
    parser.add_argument("--key-b", metavar="KEY", help="where they are in B, if not under --key ('': where usual)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    first = open_checkpoint(options.first, options.key)
    second = open_checkpoint(options.second, options.key if options.key_b is None else options.key_b)
    names = counterparts(second, first)
    differing = _say_differences(first, second, names, options.limit)
    total = len(second) + len(set(first) - set(names.values()))
    tensors = counted(total, "tensor", "tensors")
    differ = counted(differing, f"of {tensors} differs", f"of {tensors} differ")
    say(differ if differing else f"nothing differs: {tensors}")
    unchanged = list(unchanged_rules(first, second, names))
    if unchanged:
        say("# What did not change, as rules for `freezehooks verify B --rules FILE --against A`:")
    else:
        say("# No entry that a rule can name stayed as it was.")
    for line in unchanged:
        say(line)
    return int(differing > 0)


def _say_differences(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], names: Mapping[str, str], limit: int
) -> int:
    """Say what differs, one tensor after another, and return of how many something does."""
    differing = 0
    for name, tensor in second.items():
        lines = [f"{shown(name)}: only in B"]
        if name in names:
            lines = list(_Pair(name, first[names[name]], tensor).lines(limit))
        differing += bool(lines)
        if lines:
            say("\n".join(lines))
    missing = sorted(set(first) - set(names.values()))
    for name in missing:
        say(f"{shown(name)}: only in A")
    return differing + len(missing)


@dataclass(frozen=True, slots=True)
class _Pair:
    """One tensor of either file."""

    name: str
    first: Tensor
    second: Tensor

    def lines(self, limit: int) -> Iterator[str]:
        """Yield what differs; nothing where nothing does."""
        a, b = self.first, self.second
        if a.dtype != b.dtype:
            yield f"{shown(self.name)}: {a.dtype} in A, {b.dtype} in B"
        if a.shape != b.shape:
            yield f"{shown(self.name)}: shape {tuple(a.shape)} in A, {tuple(b.shape)} in B"
        if a.dtype == b.dtype and a.ndim == b.ndim:
            box = overlap(a, b)
            yield from self._entries(compare(b[box], a[box], limit), b[box].numel())

    def _entries(self, comparison: Comparison, total: int) -> Iterator[str]:
        if not comparison.count:
            return
        found = share_of(comparison.count, total, "differs", "differ")
        yield f"{shown(self.name)} {tuple(self.second.shape)}: {found}, by up to {comparison.gap:g}"
        yield from comparison.listed(lambda e: f"{e.place(self.name)}: {e.expected} in A, {e.found} in B")
