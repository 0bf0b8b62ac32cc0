"""The command `verify`: whether the entries that rules freeze hold their values, bit for bit."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._counted import counted, share_of
from .._errors import CheckpointError, RegionError
from .._held.parameter import FrozenParameter
from .._rules.rule import Rule
from .base import Base
from .checkpoints import open_checkpoint
from .comparison import Comparison, Entry, compare, differ
from .output import say, shown
from .rules_file import add_rules_arguments, needed_rules
from .selection import part_of, rules_by_name, tying

_EXAMPLES = """\
examples:
  freezehooks verify model.pt --rule 'conv*.weight[center] = 0'
      is the centre tap of these kernels exactly 0?

  freezehooks verify tuned.safetensors --rule 'wte[:50257]' --against base.safetensors
      are the old rows of the embedding those of the base, to the last bit?

  freezehooks verify last.ckpt --rules rules.yaml --against first.ckpt && ./release.sh
      in a pipeline: code 0 is given only where every entry was looked at and holds

A region chosen by numbers (zeros, smallest, nm) is chosen on BASE. BASE may have another shape, as before new rows
were added, if both have every entry that is kept.
"""


def add_parser(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command to those of the command line."""
    parser = commands.add_parser(
        "verify",
        help="whether the frozen entries of a checkpoint hold their values",
        description="Check that every entry that some rules freeze holds its value, bit for bit: the rule's number, or "
        "what it held in BASE. -0.0 is not 0.0.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a file of torch.save or of safetensors")
    add_rules_arguments(parser)
    parser.add_argument("--against", metavar="BASE", help="the checkpoint whose numbers are kept")
    add_limit(parser)
    parser.add_argument("--key", help="where in the files the tensors are, with dots between nested keys")
    parser.add_argument(
        "--against-key", metavar="KEY", help="where they are in BASE, if not under --key ('': where usual)"
    )
    parser.set_defaults(run=run)


def add_limit(parser: argparse.ArgumentParser) -> None:
    """Let a command take how many entries to list."""
    parser.add_argument(
        "--limit", metavar="N", type=_count, default=10, help="how many entries to list of each parameter (default: 10)"
    )


def _count(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, found {text!r}") from None
    if number < 0:
        raise argparse.ArgumentTypeError(f"expected 0 or more, found {number}")
    return number


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    rules = needed_rules(options)
    tensors = open_checkpoint(options.checkpoint, options.key)
    base = _base(options, tensors)
    selected = rules_by_name(tensors, rules)
    for name, own in selected.items():  # what can be told without numbers comes before the first line
        base.check(name, tensors[name], own)
    base.check_all_seen(tensors, selected)
    total = _Total()
    for name, own in selected.items():
        before = total.entries
        findings = list(_findings(name, tensors[name], own, base, options.limit, total))
        _report(shown(name), total.entries - before, findings)
    if not total.entries:  # copies that are to be one, and there is one alone
        raise RegionError("the rules freeze no entry of the checkpoint: there is nothing to verify", "correct them")
    for note in dict.fromkeys(note for own in selected.values() for note in base.notes(own)):
        say(note)
    say(total.text())
    return int(total.broken > 0)


def _base(options: argparse.Namespace, tensors: Mapping[str, Tensor]) -> Base:
    if options.against is None:
        if options.against_key is not None:
            raise CheckpointError("--against-key without --against says nothing", "name the base: --against BASE")
        return Base(tensors, None)
    key = options.key if options.against_key is None else options.against_key
    return Base(tensors, open_checkpoint(options.against, key))


@dataclass(slots=True)
class _Total:
    """How much was looked at, and how much of it does not hold."""

    parameters: int = 0
    entries: int = 0
    broken: int = 0
    broken_parameters: int = 0

    def text(self) -> str:
        entries = counted(self.entries, "entry", "entries")
        parameters = counted(self.parameters, "parameter", "parameters")
        if not self.broken:
            return f"verified {entries} of {parameters}"
        of = f"of {entries}, in {self.broken_parameters:,} of {parameters},"
        return f"NOT verified: {counted(self.broken, f'{of} does not hold', f'{of} do not hold')}"


@dataclass(frozen=True, slots=True)
class _Finding:
    """What one rule says of one parameter, and what of it does not hold."""

    rule: Rule
    frozen: int
    comparison: Comparison


def _findings(
    name: str, tensor: Tensor, rules: Sequence[Rule], base: Base, limit: int, total: _Total
) -> Iterator[_Finding]:
    part = part_of(name, base.reference(name, tensor), rules)
    base.check_kept(name, tensor, part)
    seen, broken = torch.zeros(tensor.shape, dtype=torch.bool), torch.zeros(tensor.shape, dtype=torch.bool)
    for rule, frozen, held in _expected(part, tensor, rules):
        seen |= frozen
        broken |= differ(tensor, held)
        yield _Finding(rule, int(frozen.sum()), compare(tensor, held, limit))
    total.parameters += 1
    total.entries += int(seen.sum())
    total.broken += int(broken.sum())
    total.broken_parameters += bool(broken.any())


def _expected(part: FrozenParameter, tensor: Tensor, rules: Sequence[Rule]) -> Iterator[tuple[Rule, Tensor, Tensor]]:
    """Yield each rule, where it freezes, and the tensor as it would be if the rule held."""
    for piece in part.pieces:
        held = tensor.clone()
        piece.impose_(held)
        yield piece.rule, piece.places.frozen(tensor.shape, tensor.device), held
    rule = tying(rules)
    if part.tie is not None and rule is not None:
        held, copies = tensor.clone(), torch.ones(tensor.shape, dtype=torch.bool)
        part.tie.impose_(held)
        copies.narrow(part.tie.dim, 0, 1).fill_(False)  # the first is what the others are compared with
        yield rule, copies, held


def _report(name: str, count: int, findings: Sequence[_Finding]) -> None:
    wrong = [finding for finding in findings if finding.comparison.count]
    if not wrong:
        said = ", ".join(f"`{finding.rule}`" for finding in findings)
        say(f"ok  {name}: {said}: {counted(count, 'entry holds', 'entries hold')}")
    for finding in wrong:
        say("\n".join(_complaint(name, finding)))


def _complaint(name: str, finding: _Finding) -> Iterator[str]:
    comparison = finding.comparison
    yield f"NO  {name}: `{finding.rule}`: {share_of(comparison.count, finding.frozen, 'does not hold', 'do not hold')}"

    def told(entry: Entry) -> str:
        return f"{entry.place(name)}: found {entry.found}, expected {entry.expected}"

    yield from comparison.listed(told)
    if comparison.worst is not None and comparison.count > 1:
        yield f"    worst, off by {comparison.gap:g}: {told(comparison.worst)}"
