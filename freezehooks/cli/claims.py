"""What is claimed of a checkpoint's tensors, and what of it is found to hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Final

import torch
from torch import Tensor

from .._counted import counted, share_of
from .._entries.bits import differ
from .._held.constraint import Constraint
from .comparison import Comparison, compare
from .output import shown

_TOLD: Final = "{}: found {}, expected {}"


@dataclass(frozen=True, slots=True)
class Claim:
    """What is claimed of one tensor.

    Attributes:
        said: By what, such as a rule.
        where: Of which entries.
        expected: What they are to hold; at other entries it may hold anything.
    """

    said: str
    where: Tensor
    expected: Tensor

    @staticmethod
    def by(constraint: Constraint, tensor: Tensor, rule: str = "") -> Claim:
        """Return what a constraint claims of a tensor; `rule` is the text of its rule, where it knows a better one."""
        held = tensor.clone()
        constraint.impose_(held)
        return Claim(f"`{rule or constraint.rule}`", constraint.decided(tensor.device), held)


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found of one tensor.

    Attributes:
        name: Its name.
        entries: How many of its entries were looked at.
        broken: How many of them do not hold.
        claims: By what something was claimed, each with what it looked at.
        fact: Why it, or part of it, cannot be compared entry by entry, which is a no; empty where it can.
    """

    name: str
    entries: int = 0
    broken: int = 0
    claims: dict[str, Comparison] = field(default_factory=dict)
    fact: str = ""

    @staticmethod
    def of(name: str, tensor: Tensor, claims: Sequence[Claim], limit: int, fact: str = "") -> Finding:
        """Compare a tensor with what is claimed of it; `limit`: how many entries of each claim are listed."""
        found = {claim.said: compare(tensor, claim.expected, limit, claim.where) for claim in claims}
        seen = int(reduce(torch.logical_or, (claim.where for claim in claims)).sum())
        broken = reduce(torch.logical_or, (differ(tensor, claim.expected) & claim.where for claim in claims))
        return Finding(name, seen, int(broken.sum()), found, fact)

    def lines(self) -> Iterator[str]:
        """Yield what is said of it."""
        if self.fact:
            yield f"NO  {shown(self.name)}: {self.fact}"
        if self.entries and not self.broken:
            said = ", ".join(self.claims)
            yield f"ok  {shown(self.name)}: {said}: {counted(self.entries, 'entry holds', 'entries hold')}"
        for said, found in self.claims.items():
            if found.count:
                share = share_of(found.count, found.compared, "does not hold", "do not hold")
                yield f"NO  {shown(self.name)}: {said}: {share}"
                yield from found.listed(self.name, _TOLD)
            if found.worst is not None and found.count > 1:
                yield f"    worst, off by {found.gap:g}: {found.worst.told(self.name, _TOLD)}"
