"""What a handle's state lets go that was frozen still while weights and moments were loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from .._counted import counted
from .._held.parameter import FrozenParameter


def freed_too_late(before: Mapping[str, FrozenParameter], loaded: Mapping[str, FrozenParameter]) -> Iterator[str]:
    """Say of each parameter how many of its entries are free by a state that comes after the optimizer's.

    Args:
        before: What was frozen until now, by the parameters' names.
        loaded: What the state says is frozen.
    """
    for name, part in loaded.items():
        count = int((before[name].frozen & ~part.frozen).sum())
        if count:
            yield (
                f"the state lets go {counted(count, 'entry', 'entries')} of `{name}` that were frozen while the "
                "optimizer's state was loaded: their saved moments, and weights where a rule holds a number, are lost; "
                "load the handle's state first, or give it to freeze_entries(..., state=...)"
            )
