"""Frozen entries that do not hold their values."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .._counted import counted


@dataclass(frozen=True, slots=True)
class Violation:
    """Frozen entries of one parameter that do not hold their values.

    Attributes:
        name: The parameter's qualified name.
        count: How many of its frozen entries drifted.
        index: The index of the entry that drifted most.
        found: What that entry holds.
        expected: What it should hold.
    """

    name: str
    count: int
    index: tuple[int, ...]
    found: float | complex
    expected: float | complex

    @property
    def drift(self) -> float:
        """The absolute difference between what that entry holds and what it should hold; infinite for nan."""
        drift = abs(self.found - self.expected)
        return math.inf if math.isnan(drift) else drift

    def __str__(self) -> str:
        index = ", ".join(map(str, self.index))
        drifted = counted(self.count, "entry", "entries")
        return f"`{self.name}[{index}]` holds {self.found!r} instead of {self.expected!r} ({drifted} drifted)"
