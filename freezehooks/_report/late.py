"""Finds entries that a handle's state frees too late: they were frozen while weights and moments were loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from .._counted import counted
from .._held.parameter import FrozenParameter


def freed_too_late(before: Mapping[str, FrozenParameter], loaded: Mapping[str, FrozenParameter]) -> Iterator[str]:
    """Yield a note for each parameter in which a state, loaded after the optimizer's, frees entries.

    Args:
        before: What was frozen until now, by the parameters' names.
        loaded: What is frozen according to the state.
    """
    for name, frozen in loaded.items():
        count = int((before[name].frozen & ~frozen.frozen).sum())
        if count:
            yield (
                f"the state frees {counted(count, 'entry', 'entries')} of `{name}` that were frozen while the "
                "optimizer's state was loaded: their saved moments, and weights where a rule holds a number, are lost; "
                "load the handle's state first, or give it to freeze_entries(..., state=...)"
            )
