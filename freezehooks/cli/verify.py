"""The command `verify`: whether the entries that rules freeze hold their values, bit for bit."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from torch import Tensor

from .._counted import counted
from .._entries.select import select
from .._errors import CheckpointError, RegionError, SpecError, error_context, shortened
from .._rules.rule import Rule, keep
from .._rules.spec import rules_of
from .base import Base
from .checkpoints import open_checkpoint
from .claims import Claim, Finding
from .output import Answer
from .pairs import first_names
from .rules_file import given_rules
from .saved_state import saved_claims
from .selection import chosen_by_numbers, constraints_by, rules_by_name
from .trained import trained_alone

BRIEF: Final = "whether the frozen entries of a checkpoint hold their values"
ABOUT: Final = (
    "Check that every entry that some rules freeze holds its value, bit for bit: the rule's number, or what it held "
    "in BASE. -0.0 is not 0.0. Or check what a handle has saved, or that everything but some entries is as it was."
)
EXAMPLES: Final = """\
  freezehooks verify model.pt --rule 'layer*.conv?.weight[center] = 0'
      is the center tap of these kernels exactly 0?
  freezehooks verify tuned.safetensors --rule 'wte[:50257]' --against base.safetensors
      are the old rows of the embedding those of the base, to the last bit?
  freezehooks verify tuned.pt --train-only 'wte[50257:]' --against base.pt
      is everything but the new rows as it was, with no tensor added or missing?
  freezehooks verify model.pt --frozen frozen.pt
      does everything hold that torch.save(frozen.state_dict(), "frozen.pt") wrote down, masks and tensors too?
  freezehooks verify last.ckpt --rules rules.yaml --against first.ckpt --quiet && ./release.sh
      in a pipeline: code 0 is given only where every entry was looked at and holds

A value-dependent region (zeros, smallest, nm) is chosen on BASE. BASE may have another shape, as before new rows
were added, if both have every entry that is kept.
"""
ARGUMENTS: Final = (
    *("checkpoint", "--rules", "--rule", "--train-only", "--frozen", "--against", "--limit", "--key", "--against-key"),
    *("--quiet", "--json"),
)

_LISTED: Final = 10
"""How many entries of each parameter are listed by default."""


def run(options: argparse.Namespace) -> Answer:
    """Run the command."""
    rules, trained = given_rules(options), rules_of(options.train_only)
    _check_asked(options, rules, trained)
    tensors, others = open_checkpoint(options.checkpoint, options.key), None
    if options.against is not None:
        others = open_checkpoint(options.against, options.key if options.against_key is None else options.against_key)
    found = list(_findings(options, rules, trained, tensors, others))
    if not any(each.entries or each.fact for each in found):  # such as a tie of a single slice
        raise RegionError("the rules freeze no entry of the checkpoint: there is nothing to verify", "correct them")
    return _answer(found, list(_notes(rules)) if others is None else [], _not_looked_at(tensors, found))


def _check_asked(options: argparse.Namespace, rules: Sequence[Rule], trained: Sequence[Rule]) -> None:
    """Reject arguments that together ask no question, or more than one."""
    asked = {"a rule": rules, "--train-only": trained, "--frozen": options.frozen}
    first, *more = [name for name, what in asked.items() if what] or [""]
    if more:
        raise SpecError(f"{first} and {more[0]} are two questions", "ask one after the other")
    if not first:
        advice = "give --rules FILE, or --rule 'conv.weight[center] = 0'"
        raise SpecError("there is no rule to go by", advice)
    if trained and options.against is None:
        raise CheckpointError("--train-only asks what is as it was before", "name the base: --against BASE")
    if options.frozen and options.against is not None:
        raise CheckpointError("--frozen says itself what the entries are to hold", "leave --against out")
    if options.against_key is not None and options.against is None:
        raise CheckpointError("--against-key without --against says nothing", "name the base: --against BASE")


def _findings(
    options: argparse.Namespace,
    rules: Sequence[Rule],
    trained: Sequence[Rule],
    tensors: Mapping[str, Tensor],
    others: Mapping[str, Tensor] | None,
) -> Iterator[Finding]:
    limit = _LISTED if options.limit is None else options.limit
    if options.frozen is not None:
        yield from (Finding.of(*claimed, limit) for claimed in saved_claims(options.frozen, tensors))
    elif others is not None and trained:
        yield from trained_alone(trained, tensors, others, limit)
    else:
        yield from _by_rules(rules, tensors, others, limit)


def _by_rules(
    rules: Sequence[Rule], tensors: Mapping[str, Tensor], others: Mapping[str, Tensor] | None, limit: int
) -> Iterator[Finding]:
    base, selected = Base(tensors, others), rules_by_name(tensors, rules)
    base.check(selected)  # check everything that needs no data before reading any
    for name, own in selected.items():
        yield Finding.of(name, tensors[name], _claims(own, name, tensors[name], base.reference(name, own)), limit)


def _claims(rules: Sequence[Rule], name: str, tensor: Tensor, base: Tensor) -> list[Claim]:
    if len(rules) > 1 or rules[0].value is not keep:
        return [Claim.by(constraint, tensor) for constraint in constraints_by(rules, name, base)]
    with error_context(f"rule `{shortened(rules[0])}`", f"parameter `{name}` of shape {tuple(tensor.shape)}"):
        return [Claim(f"`{rules[0]}`", select(rules[0].region, base), base)]  # a shortcut for the most common case


def _notes(rules: Sequence[Rule]) -> Iterator[str]:
    for rule in rules:
        for name in chosen_by_numbers(rule.region):
            yield f"`{rule}`: `{name}` was chosen on the checkpoint itself, since there is no --against BASE"


def _not_looked_at(tensors: Mapping[str, Tensor], found: Sequence[Finding]) -> list[str]:
    """Return the first names of the tensors that were not looked at."""
    firsts = first_names(tensors)
    known = {firsts[each.name] for each in found if each.entries or each.fact if each.name in firsts}
    return list(dict.fromkeys(name for name in firsts.values() if name not in known))


def _answer(found: Sequence[Finding], notes: Sequence[str], others: Sequence[str]) -> Answer:
    holds = not any(each.broken or each.fact for each in found)
    lines = [
        *(line for each in found for line in each.lines()),
        *(f"note: {note}" for note in notes),
        _verdict(found),
        f"{counted(len(others), 'other tensor was', 'other tensors were')} not looked at",
    ]
    told = {"verified": holds, "tensors": found, "notes": notes, "not_looked_at": others}
    return Answer(int(not holds), lines, told)


def _verdict(found: Sequence[Finding]) -> str:
    looked_at = [each for each in found if each.entries]
    entries = counted(sum(each.entries for each in found), "entry", "entries")
    parameters = counted(len(looked_at), "parameter", "parameters")
    broken, strange = [each.broken for each in found if each.broken], sum(bool(each.fact) for each in found)
    of = f"of {entries}, in {len(broken):,} of {parameters},"
    no = [counted(sum(broken), f"{of} does not hold", f"{of} do not hold")] if broken else []
    no += [counted(strange, "tensor", "tensors") + " added, removed, or changed in shape or dtype"] if strange else []
    return f"NOT verified: {'; '.join(no)}" if no else f"verified {entries} of {parameters}"
