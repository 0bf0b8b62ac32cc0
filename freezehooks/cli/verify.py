"""The command `verify`: whether the entries that rules freeze hold their values, bit for bit."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from .._counted import counted, share_of
from .._entries.bits import differ
from .._errors import CheckpointError, RegionError, SpecError
from .._held.parameter import FrozenParameter
from .._rules.rule import Rule
from .base import Base
from .checkpoints import open_checkpoint
from .comparison import Comparison, compare
from .output import say, shown
from .rules_file import asked_rules
from .selection import chosen_by_numbers, frozen_by, rules_by_name

BRIEF: Final = "whether the frozen entries of a checkpoint hold their values"
ABOUT: Final = (
    "Check that every entry that some rules freeze holds its value, bit for bit: the rule's number, or what it held "
    "in BASE. -0.0 is not 0.0."
)
EXAMPLES: Final = """\
  freezehooks verify model.pt --rule 'conv*.weight[center] = 0'
      is the center tap of these kernels exactly 0?
  freezehooks verify tuned.safetensors --rule 'wte[:50257]' --against base.safetensors
      are the old rows of the embedding those of the base, to the last bit?
  freezehooks verify last.ckpt --rules rules.yaml --against first.ckpt && ./release.sh
      in a pipeline: code 0 is given only where every entry was looked at and holds

A region chosen by numbers (zeros, smallest, nm) is chosen on BASE. BASE may have another shape, as before new rows
were added, if both have every entry that is kept.
"""
ARGUMENTS: Final = ("checkpoint", "--rules", "--rule", "--against", "--limit", "--key", "--against-key")

_TOLD: Final = "{}: found {}, expected {}"


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    rules = asked_rules(options)
    if not rules:
        raise SpecError("there is no rule to go by", "give --rules FILE, or --rule 'conv.weight[center] = 0'")
    tensors, others = open_checkpoint(options.checkpoint, options.key), None
    if options.against is not None:
        others = open_checkpoint(options.against, options.key if options.against_key is None else options.against_key)
    elif options.against_key is not None:
        raise CheckpointError("--against-key without --against says nothing", "name the base: --against BASE")
    base, selected = Base(tensors, others), rules_by_name(tensors, rules)
    base.check(selected)  # what can be told without numbers comes before the first line
    found = [_verified(name, tensors[name], own, base, options.limit) for name, own in selected.items()]
    if not any(entries for entries, _ in found):  # copies that are to be one, and there is one alone
        raise RegionError("the rules freeze no entry of the checkpoint: there is nothing to verify", "correct them")
    for rule in rules if others is None else ():
        for name in chosen_by_numbers(rule.region):
            say(f"note: `{rule}`: `{name}` was chosen on the checkpoint itself, for want of --against BASE")
    say(_verdict(found))
    return int(any(broken for _, broken in found))


def _verified(name: str, tensor: Tensor, rules: Sequence[Rule], base: Base, limit: int) -> tuple[int, int]:
    """Say what was found of a parameter, and return how many entries were looked at and how many do not hold."""
    held_by_rules = frozen_by(rules, name, base.reference(name, rules))
    seen, broken = torch.zeros(tensor.shape, dtype=torch.bool), torch.zeros(tensor.shape, dtype=torch.bool)
    for rule, frozen, held in _expected(held_by_rules, tensor):
        seen |= frozen
        broken |= differ(tensor, held)
        for line in _complaint(name, rule, int(frozen.sum()), compare(tensor, held, limit)):
            say(line)
    if not bool(broken.any()):
        said = ", ".join(f"`{rule}`" for rule in rules)
        say(f"ok  {shown(name)}: {said}: {counted(int(seen.sum()), 'entry holds', 'entries hold')}")
    return int(seen.sum()), int(broken.sum())


def _complaint(name: str, rule: Rule, frozen: int, wrong: Comparison) -> Iterator[str]:
    if wrong.count:
        yield f"NO  {shown(name)}: `{rule}`: {share_of(wrong.count, frozen, 'does not hold', 'do not hold')}"
        yield from wrong.listed(name, _TOLD)
    if wrong.worst is not None and wrong.count > 1:
        yield f"    worst, off by {wrong.gap:g}: {wrong.worst.told(name, _TOLD)}"


def _expected(parameter: FrozenParameter, tensor: Tensor) -> Iterator[tuple[Rule, Tensor, Tensor]]:
    """Yield each rule, where it freezes, and the tensor as it would be if the rule held."""
    for constraint in parameter.constraints:
        held = tensor.clone()
        constraint.impose_(held)
        yield constraint.rule, constraint.decided(tensor.device), held


def _verdict(found: Sequence[tuple[int, int]]) -> str:
    entries = counted(sum(entries for entries, _ in found), "entry", "entries")
    parameters = counted(len(found), "parameter", "parameters")
    broken = [count for _, count in found if count]
    if not broken:
        return f"verified {entries} of {parameters}"
    of = f"of {entries}, in {len(broken):,} of {parameters},"
    return f"NOT verified: {counted(sum(broken), f'{of} does not hold', f'{of} do not hold')}"
