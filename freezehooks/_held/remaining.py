"""What is still held of a parameter once a region of it was let go."""

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
    """Return what is held of a parameter without a region: the same object where nothing is frozen in the region.

    Of a parameter that is spread over ranks, every rank must take part.

    Args:
        frozen: What is held of it.
        parameter: It.
        region: What is let go.

    Returns:
        It, under rules that say what is still held; None where nothing is.

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
    """Yield what a rule still holds, if anything."""
    held = constraint.entries.mask(full.device)
    still = held & ~gone
    if not isinstance(constraint, FixedEntries) or bool(still.equal(held)):
        yield constraint
    elif bool(still.any()):
        yield constraint.cut_to(still, full, _difference(constraint.rule.region, region, still))


def _difference(held: Any, gone: Any, still: Tensor) -> Any:
    """Return the region of what is in one region and not in another: as text where both are text."""
    if isinstance(held, Region) and isinstance(gone, Region):
        return complement(gone) if is_whole(held) else held & complement(gone)
    if isinstance(held, Tensor):
        return still
    return Chosen(f"{text_of(held)} & ~({text_of(gone)})", still)
