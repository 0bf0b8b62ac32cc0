"""Turns the rules of `train_only`, which name what trains, into rules that hold the other entries."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._entries.plain import as_tensor
from .._entries.select import select
from .._errors import SpecError, StateMismatchError, error_context, shortened
from .._ranks.agreement import check_same_on_ranks
from .._ranks.reducer import check_may_stop_training
from .._ranks.sharding import whole
from .._rules.patterns.pattern import depends_on_numbers
from .._rules.region import WHOLE, Index, Not, Region
from .._rules.rule import Keep, Rule
from .held import Model
from .names import Targets, unwrapped
from .resolve import may_select_nothing, requested_by, without_empty
from .saved import Requested, rules_in, untrained_in


class Trained(NamedTuple):
    """What trains in a model.

    Attributes:
        parameters: The parameters with at least one entry that trains.
        rules: The rules that hold the other entries of these parameters.
    """

    parameters: list[Tensor]
    rules: tuple[Rule, ...]


def trained_alone(model: Model, rules: Sequence[Rule], state: Any = None) -> Trained:
    """Turn rules that name what trains into rules that hold the rest of the same parameters.

    Args:
        model: A module, or a mapping from name to leaf tensor.
        rules: What trains; several rules on one parameter form a union.
        state: A state saved with the resulting rules, which then provides the regions that depend on what parameters
            contained.

    Raises:
        SpecError: There is no rule, a rule has a value, or what it names requires no gradient.
        FreezeError: A rule does not fit the model.
    """
    _check_are_regions(rules)
    targets = Targets(model)
    requested = requested_by(targets, map(_with_mask, rules))
    requested = without_empty(requested)[0] if state is None else _without_untrained(requested, untrained_in(state))
    for name, (parameter, its_rules) in requested.items():
        _check_trains(name, parameter, its_rules, is_buffer=targets.sites[name].is_buffer)
    check_same_on_ranks(model, requested)
    check_may_stop_training(model, {id(parameter) for parameter, _ in requested.values()})
    saved = None if state is None else rules_in(state, requested)
    held = [
        Rule(name, region)
        for name, (parameter, its_rules) in requested.items()
        for region in _rest(name, parameter, its_rules, saved)
    ]
    return Trained([parameter for parameter, _ in requested.values()], tuple(held))


def _with_mask(rule: Rule) -> Rule:
    """Convert the region of a rule to a tensor if it is an array."""
    return replace(rule, region=as_tensor(rule.region))


def _check_are_regions(rules: Sequence[Rule]) -> None:
    if not rules:
        raise SpecError("`spec` names nothing to train", 'name a region, as in train_only(model, "wte[50257:]")')
    for rule in rules:
        if rule.value is not Keep.KEEP:
            raise SpecError(
                f"rule `{shortened(rule)}` gives a value, and `train_only` takes rules without",
                "leave the value out, or hold entries at values with freeze_entries",
            )


def _check_trains(name: str, parameter: Tensor, rules: Sequence[Rule], *, is_buffer: bool) -> None:
    if is_buffer:
        raise SpecError(
            f"rule `{shortened(rules[0])}`: `{name}` is a buffer, which no optimizer trains",
            "leave it out: train_only does not affect buffers",
        )
    if not parameter.requires_grad:
        raise SpecError(
            f"rule `{shortened(rules[0])}`: `{name}` requires no gradient, so none of it would train",
            "name parameters that train, call `requires_grad_()` on it first, or remove() the earlier handle of "
            "train_only that did not name it",
        )


def _without_untrained(requested: Requested, untrained: Collection[str]) -> Requested:
    """Leave out the parameters that a rule with wildcards skipped in the saved run.

    Raises:
        StateMismatchError: Another kind of rule names a parameter that did not train in that run.
    """
    for name, (_, rules) in requested.items():
        for rule in rules if unwrapped(name) in untrained else ():
            if not may_select_nothing(rule):
                raise StateMismatchError(
                    f"the state was saved under other rules: `{name}` did not train, and `{shortened(rule)}` names it",
                    "use the rules of the saved run, or start from its weights alone",
                )
    return {name: item for name, item in requested.items() if unwrapped(name) not in untrained}


def _rest(name: str, parameter: Tensor, rules: Sequence[Rule], saved: Collection[str] | None) -> Iterator[Any]:
    """Yield the region of the entries that no rule names; nothing if the rules name the whole parameter."""
    regions = [rule.region for rule in rules]
    if any(map(is_whole, regions)):
        return
    if saved is not None and any(map(_is_chosen_by_numbers, regions)):  # the numbers have changed since it was saved
        if name in saved:
            yield _outside(regions, None)
        return
    union = _union(name, whole(parameter), rules)
    if not bool(union.all()):
        yield _outside(regions, ~union)


def _is_chosen_by_numbers(region: Any) -> bool:
    return depends_on_numbers(region) if isinstance(region, Region) else not isinstance(region, Tensor)


def _union(name: str, parameter: Tensor, rules: Sequence[Rule]) -> Tensor:
    """Return the bool tensor that is True at the entries that any of the rules names.

    Raises:
        FreezeError: A rule does not fit the parameter, or selects none of its entries.
    """
    found = []
    for rule in rules:
        with error_context(f"rule `{shortened(rule)}`", f"parameter `{name}` of shape {tuple(parameter.shape)}"):
            found.append(select(rule.region, parameter))
    return reduce(torch.logical_or, found)


def _outside(regions: Sequence[Any], others: Tensor | None) -> Any:
    """Return the region outside all of some regions: as an expression if all are expressions, else as a mask.

    Args:
        regions: The regions.
        others: The mask of the entries in none of them, or None if a saved state provides it.
    """
    if all(isinstance(region, Region) for region in regions):
        return complement(reduce(operator.or_, regions))
    if all(isinstance(region, Tensor | Index) for region in regions):
        return others
    return Chosen(f"~({' | '.join(map(text_of, regions))})", others)


def is_whole(region: Any) -> bool:
    """Return whether a region is written as the whole tensor."""
    return isinstance(region, Region) and region == WHOLE


def complement(region: Region) -> Region:
    """Return the region of all other entries; the complement of ``~region`` is ``region``."""
    return region.operand if isinstance(region, Not) else ~region


def text_of(region: Any) -> str:
    """Return a region's text, or the name of a function or of a mask's type."""
    return str(region) if isinstance(region, Region) else getattr(region, "__name__", type(region).__name__)


class Chosen:
    """A region that was computed once from functions or from numbers; in a rule it acts as a function.

    Attributes:
        mask: The entries that were chosen, or None if a saved state provides them.
    """

    def __init__(self, text: str, mask: Tensor | None) -> None:
        self.__name__ = text
        self.mask = mask

    def __call__(self, parameter: Tensor) -> Tensor | None:
        return self.mask
