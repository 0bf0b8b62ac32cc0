"""Checks that only some entries were trained: everything else is the same in two checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .._counted import counted
from .._entries.select import select
from .._errors import SpecError, TargetError, error_context, shortened
from .._rules.rule import Rule, keep
from .base import check_region, overlap
from .claims import Claim, Finding
from .pairs import Pairing, first_names
from .selection import Names


def trained_alone(
    rules: Sequence[Rule], tensors: Mapping[str, Tensor], others: Mapping[str, Tensor], limit: int
) -> Iterator[Finding]:
    """Yield a finding for each tensor: whether the entries that no rule names equal those of the base.

    Args:
        rules: What was trained.
        tensors: The tensors of the checkpoint.
        others: The tensors of the base.
        limit: How many entries of each tensor are listed.

    Raises:
        FreezeError: A rule has a value, names no tensor of either file, or does not fit one.
    """
    pairing, firsts = Pairing.of(tensors, others), first_names(tensors)
    trained: dict[str, list[Rule]] = {}
    for rule, name in _named(rules, Names(tensors), Names(others)):
        trained.setdefault(firsts[name], []).append(rule)  # by the first name, for all names of a shared tensor
    for name, other in pairing.pairs.items():
        yield _compared(name, tensors[name], others[other], trained.get(firsts[name], ()), limit)
    yield from (Finding(name, fact="only in the checkpoint") for name in pairing.alone)
    yield from (Finding(name, fact="only in the base") for name in pairing.missing)


def _named(rules: Sequence[Rule], names: Names, base_names: Names) -> Iterator[tuple[Rule, str]]:
    for rule in dict.fromkeys(rules):
        if rule.value is not keep:
            raise SpecError(f"rule `{shortened(rule)}`: what is trained has no value", "leave the value out")
        try:
            yield from ((rule, name) for name in names.matching(rule))
        except TargetError:
            base_names.matching(rule)  # a tensor that only the base has is a finding, not an error


def _compared(name: str, now: Tensor, before: Tensor, rules: Sequence[Rule], limit: int) -> Finding:
    kept = ~_free(name, now, before, rules)
    if not bool(kept.any()):
        return Finding(name)
    if now.dtype != before.dtype or now.ndim != before.ndim:
        return Finding(name, fact=f"{_kind(now)}, and {_kind(before)} in the base")
    fact = ""
    if now.shape != before.shape:
        box, shared, held = overlap(now, before), torch.zeros_like(kept), now.clone()
        shared[box], held[box] = kept[box], before[box]
        added, lost = int(kept.sum()) - int(shared.sum()), before.numel() - before[box].numel()
        told = [counted(count, f"entry {verb}", f"entries {verb}") for count, verb in ((added, "came"), (lost, "went"))]
        if added or lost:
            fact = f"{_kind(now)}, and {_kind(before)} in the base: {', '.join(told)} that no rule names"
        kept, before = shared, held
    texts = [shortened(str(rule).removesuffix(" = keep")) for rule in rules]
    said = f"all but {', '.join(f'`{text}`' for text in texts)}" if texts else "all of it"
    return Finding.of(name, now, [Claim(said, kept, before)], limit, fact)


def _free(name: str, now: Tensor, before: Tensor, rules: Sequence[Rule]) -> Tensor:
    """Return the mask of the entries that rules name; regions that depend on numbers use those of the base."""
    free = torch.zeros(now.shape, dtype=torch.bool)
    for rule in rules:
        with error_context(f"rule `{shortened(rule)}`", f"`{name}` of shape {tuple(now.shape)}"):
            check_region(rule, name, now, before)
            free |= select(rule.region, before if now.shape == before.shape else now)
    return free


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"
