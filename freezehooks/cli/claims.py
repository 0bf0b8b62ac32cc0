"""Claims about a checkpoint's tensors, and findings on whether they hold."""

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
    """A claim about what entries of one tensor hold.

    Attributes:
        said: The source of the claim, such as a rule.
        where: The mask of the entries.
        expected: A tensor with what they should hold; its other entries do not matter.
    """

    said: str
    where: Tensor
    expected: Tensor

    @staticmethod
    def by(constraint: Constraint, tensor: Tensor, rule: str = "") -> Claim:
        """Return the claim of a constraint; `rule` is a text to show instead of that of the constraint's own rule."""
        held = tensor.clone()
        constraint.impose_(held)
        return Claim(f"`{rule or constraint.rule}`", constraint.decided(tensor.device), held)


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found in one tensor.

    Attributes:
        name: The tensor's name.
        entries: How many of its entries were looked at.
        broken: How many of them do not hold.
        claims: The comparison for each claim, by the source of the claim.
        fact: Why some of it cannot be compared entry by entry, which counts as a no; empty otherwise.
    """

    name: str
    entries: int = 0
    broken: int = 0
    claims: dict[str, Comparison] = field(default_factory=dict)
    fact: str = ""

    @staticmethod
    def of(name: str, tensor: Tensor, claims: Sequence[Claim], limit: int, fact: str = "") -> Finding:
        """Check claims about a tensor, and list at most `limit` entries for each."""
        found = {claim.said: compare(tensor, claim.expected, limit, claim.where) for claim in claims}
        seen = int(reduce(torch.logical_or, (claim.where for claim in claims)).sum())
        broken = reduce(torch.logical_or, (differ(tensor, claim.expected) & claim.where for claim in claims))
        return Finding(name, seen, int(broken.sum()), found, fact)

    def lines(self) -> Iterator[str]:
        """Yield the lines to print."""
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
