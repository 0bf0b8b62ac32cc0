"""What remains frozen when some entries are thawed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from .._entries.select import select
from .._errors import SpecError, TargetError, error_context, shortened, shown
from .._ranks.sharding import whole
from .._rules.parser import parse_rule
from .._rules.region import WHOLE, Region
from .._rules.rule import Rule, keep
from .constraint import Constraint
from .fixed import FixedEntries
from .held import HeldParameters
from .names import matching, matching_unwrapped
from .parameter import FrozenParameter
from .trained import Chosen, complement, is_whole, text_of


def remaining_by_name(
    held: HeldParameters, target: str | Rule, untrained: list[str]
) -> dict[str, FrozenParameter | None]:
    """Work out what remains frozen in each parameter with frozen entries that `target` names.

    For sharded parameters, every rank must take part.

    Args:
        held: The frozen parameters of a model; nothing is changed in them.
        target: As `FrozenEntries.thaw` takes it.
        untrained: The names of parameters that `train_only` did not name, for the message if `target` names one.

    Returns:
        The frozen parameters with rules for what is still frozen, by their names in `held.frozen`; None if nothing is.

    Raises:
        FreezeError: As `FrozenEntries.thaw` says.
    """
    name, region = _parsed(target, held.every_name())
    names = _named_by(name, held)
    if not names:
        raise _not_frozen(name, held, untrained)
    if is_whole(region):
        return dict.fromkeys(names)
    left: dict[str, FrozenParameter | None] = {}
    for frozen, parameter in held:
        if frozen.name in names:
            where = f"parameter `{frozen.name}` of shape {tuple(frozen.shape)}"
            with error_context(f"cannot thaw `{shortened(target)}`", where):
                rest = remaining(frozen, parameter, region)
            left |= {} if rest is frozen else {frozen.name: rest}
    if not left:
        rules = dict.fromkeys(f"`{shortened(rule)}`" for frozen in held.parameters for rule in frozen.rules)
        raise TargetError(f"nothing in `{shortened(target)}` is frozen", f"the rules in force are {', '.join(rules)}")
    return left


def _parsed(target: str | Rule, names: list[str]) -> tuple[str, Any]:
    """Return the name and the region in a target."""
    if isinstance(target, str) and target in names:
        return target, WHOLE
    rule = parse_rule(target) if isinstance(target, str) else target
    if not isinstance(rule, Rule):
        raise SpecError(f"a target is a parameter's name, found {shown(target)}", "give one of frozen.keys()")
    if rule.value is not keep:
        raise SpecError(f"`{shortened(rule)}` gives a value, but thawed entries have none", "leave the value out")
    return rule.target, rule.region


def _named_by(target: str, held: HeldParameters) -> set[str]:
    """Return the names in `held.frozen` of the parameters that a target names, perhaps with wildcards."""
    known = held.every_name()
    return {held.find(name).name for name in matching(target, known) or matching_unwrapped(target, known)}


def _not_frozen(target: str, held: HeldParameters, untrained: list[str]) -> TargetError:
    excluded = matching(target, untrained) or matching_unwrapped(target, untrained)
    if excluded:
        return TargetError(
            f"no entry of `{excluded[0]}` is frozen: train_only did not name it, so it requires no gradient",
            "remove() the handle and call train_only again with all that trains now",
        )
    return held.frozen.not_frozen(target, [held.as_shown(each).name for each in held.parameters])


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
