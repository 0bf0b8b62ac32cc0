"""Reads a spec, what `freeze_entries` takes, into rules. Does not import torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, TypeAlias

from .._errors import SpecError, shown
from .parser import parse_region, parse_rule, parse_value
from .region import WHOLE, entries
from .rule import Rule, keep
from .ties import Tie

Spec: TypeAlias = "str | Rule | Mapping[str, Any] | Iterable[Any]"
"""Text, a rule, {target: region} or {target: (region, value)}, or an iterable of those."""


def rules_of(spec: Spec) -> tuple[Rule, ...]:
    """Return the rules of a spec, in order.

    Args:
        spec: Text (one rule a line; ``#`` begins a comment), a `Rule`, a mapping ``{target: region}`` or
            ``{target: (region, value)}``, or an iterable of those.

    Raises:
        RuleSyntaxError: Some text is not a rule.
        SpecError: Anything else in it cannot be read as a rule.
    """
    try:
        return tuple(_iterate_rules(spec))
    except RecursionError:
        raise SpecError("`spec` is nested too deeply, or contains itself", "give a flat list of rules") from None


def _iterate_rules(spec: Any) -> Iterator[Rule]:
    if isinstance(spec, Rule):
        yield spec
    elif isinstance(spec, str):
        lines = (line.split("#", 1)[0].strip() for line in spec.splitlines())
        yield from map(parse_rule, filter(None, lines))
    elif isinstance(spec, Mapping):
        yield from (_rule_of_item(target, what) for target, what in spec.items())
    elif isinstance(spec, Iterable) and not hasattr(type(spec), "shape") and not isinstance(spec, bytes | bytearray):
        for part in spec:
            yield from _iterate_rules(part)
    else:
        raise SpecError(
            f"`spec` must be text, a Rule, a mapping or an iterable of those, found {type(spec).__name__}",
            'write "conv.weight[center] = 0" or {"conv.weight": (center, 0)}',
        )


def _rule_of_item(target: Any, what: Any) -> Rule:
    region: Any = what
    value: Any = keep
    if isinstance(what, Tie):
        region, value = WHOLE, what
    elif isinstance(what, list | range) and all(map(_is_integer, what)):
        region = entries[list(what)]
    elif isinstance(what, list) and all(isinstance(item, bool) for item in what):
        raise _a_list_for_a_mask(what)
    elif isinstance(what, tuple | list):  # YAML has lists but no tuples
        if len(what) > 2 and all(isinstance(item, list) for item in what):
            raise _a_list_for_a_mask(what)
        if len(what) != 2:
            raise SpecError(
                f"a mapping's item is a region or (region, value), found {len(what)} items for {shown(target)}",
                "write {target: (region, value)}; for several rules on one target, give a list of rules",
            )
        region, value = what
    return Rule(target, _region(region), parse_value(value) if isinstance(value, str) else value)


def _is_integer(item: Any) -> bool:
    """Return whether an item is an integer of Python, of NumPy or in a tensor without dimensions, and not a bool."""
    is_number = isinstance(item, Integral) or getattr(item, "shape", None) == ()
    return is_number and not isinstance(item, bool) and "int" in str(getattr(item, "dtype", "int"))


def _a_list_for_a_mask(found: Sequence[Any]) -> SpecError:
    return SpecError(
        f"a mask must be a bool tensor, found the list {shown(found)}", "give torch.tensor(mask, dtype=torch.bool)"
    )


def _region(region: Any) -> Any:
    if isinstance(region, str):
        return parse_region(region)
    if isinstance(region, list) and region and all(isinstance(item, bool) for item in region):
        raise _a_list_for_a_mask(region)
    return entries[region] if isinstance(region, list) else region
