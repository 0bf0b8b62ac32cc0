"""Thaws a region of a parameter: works out what remains frozen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from .._entries.select import select
from .._ranks.sharding import whole
from .._rules.region import Region
from .constraint import Constraint
from .fixed import FixedEntries
from .parameter import FrozenParameter
from .trained import Chosen, complement, is_whole, text_of


def remaining(frozen: FrozenParameter, parameter: Tensor, region: Any) -> FrozenParameter | None:
    """Return a frozen parameter without the entries of a region, or the same object if none of them is frozen.

    For a sharded parameter, every rank must take part.

    Args:
        frozen: The frozen parameter.
        parameter: The parameter itself.
        region: The region to thaw.

    Returns:
        The frozen parameter, with rules for what is still frozen; None if nothing is.

    Raises:
        RegionError: The region does not fit the parameter, or selects nothing.
        RuleConflictError: The parameter is tied, and one slice would be free where another is frozen.
    """
    full = whole(parameter).detach()
    gone, constraints = select(region, full), frozen.whole_constraints()
    if not any(bool((each.entries.mask(full.device) & gone).any()) for each in constraints):
        return frozen
    left = [part for each in constraints for part in _without(each, region, gone, full)]
    return FrozenParameter(frozen.names, parameter, left).for_tensor(parameter) if left else None


def _without(constraint: Constraint, region: Any, gone: Tensor, full: Tensor) -> Iterator[Constraint]:
    """Yield the constraint without the thawed entries, if any are left."""
    held = constraint.entries.mask(full.device)
    still = held & ~gone
    if not isinstance(constraint, FixedEntries) or bool(still.equal(held)):
        yield constraint
    elif bool(still.any()):
        yield constraint.cut_to(still, full, _difference(constraint.rule.region, region, still))


def _difference(held: Any, gone: Any, still: Tensor) -> Any:
    """Return the region of the entries in one region and not in the other, as an expression if both are."""
    if isinstance(held, Region) and isinstance(gone, Region):
        return complement(gone) if is_whole(held) else held & complement(gone)
    if isinstance(held, Tensor):
        return still
    return Chosen(f"{text_of(held)} & ~({text_of(gone)})", still)
