"""From what is to train of a model to the rules that hold the other entries of the same parameters."""

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
from .resolve import asked_of, may_select_nothing, without_empty
from .saved import Asked, rules_in, untrained_in


class Trained(NamedTuple):
    """What is to train of a model.

    Attributes:
        parameters: The parameters of which at least some entries are.
        rules: The rules that hold the other entries of these.
    """

    parameters: list[Tensor]
    rules: tuple[Rule, ...]


def trained_alone(model: Model, rules: Sequence[Rule], state: Any = None) -> Trained:
    """Turn rules that name what is to train into rules that hold the rest of the same parameters.

    Args:
        model: A module, or a mapping from name to leaf tensor.
        rules: What is to train; several rules of one parameter unite.
        state: What was saved of the resulting rules, which then says what regions chose by numbers.

    Raises:
        SpecError: There is no rule, one gives a value, or what it names requires no gradient.
        FreezeError: A rule does not fit the model.
    """
    _check_are_regions(rules)
    targets = Targets(model)
    asked = asked_of(targets, map(_with_mask, rules))
    asked = without_empty(asked)[0] if state is None else _without_untrained(asked, untrained_in(state))
    for name, (parameter, its_rules) in asked.items():
        _check_trains(name, parameter, its_rules, is_buffer=targets.sites[name].is_buffer)
    check_same_on_ranks(model, asked)
    check_may_stop_training(model, {id(parameter) for parameter, _ in asked.values()})
    saved = None if state is None else rules_in(state, asked)
    held = [
        Rule(name, region)
        for name, (parameter, its_rules) in asked.items()
        for region in _rest(name, parameter, its_rules, saved)
    ]
    return Trained([parameter for parameter, _ in asked.values()], tuple(held))


def _with_mask(rule: Rule) -> Rule:
    """Return a rule whose region is an array with a tensor instead."""
    return replace(rule, region=as_tensor(rule.region))


def _check_are_regions(rules: Sequence[Rule]) -> None:
    if not rules:
        raise SpecError(
            "`spec` names nothing that is to train", 'name a region, as in train_only(model, "wte[50257:]")'
        )
    for rule in rules:
        if rule.value is not Keep.KEEP:
            raise SpecError(
                f"rule `{shortened(rule)}` gives a value, and what `train_only` names is to train",
                "leave the value out, or hold entries at values with freeze_entries",
            )


def _check_trains(name: str, parameter: Tensor, rules: Sequence[Rule], *, is_buffer: bool) -> None:
    if is_buffer:
        raise SpecError(
            f"rule `{shortened(rules[0])}`: `{name}` is a buffer, which no optimizer trains",
            "leave it out: buffers go on as they did",
        )
    if not parameter.requires_grad:
        raise SpecError(
            f"rule `{shortened(rules[0])}`: `{name}` requires no gradient, so nothing of it would train",
            "name parameters that train, call `requires_grad_()` on it first, or remove() the earlier handle of "
            "train_only that did not name it",
        )


def _without_untrained(asked: Asked, untrained: Collection[str]) -> Asked:
    """Leave out the parameters of which a rule with wildcards, by their numbers, selected nothing in the saved run.

    Raises:
        StateMismatchError: Another rule names a parameter that did not train in that run.
    """
    for name, (_, rules) in asked.items():
        for rule in rules if unwrapped(name) in untrained else ():
            if not may_select_nothing(rule):
                raise StateMismatchError(
                    f"the state was saved under other rules: `{name}` did not train, and `{shortened(rule)}` names it",
                    "use the rules of the saved run, or start from its weights alone",
                )
    return {name: item for name, item in asked.items() if unwrapped(name) not in untrained}


def _rest(name: str, parameter: Tensor, rules: Sequence[Rule], saved: Collection[str] | None) -> Iterator[Any]:
    """Yield the region of all that no rule names; none where the rules name the parameter whole."""
    regions = [rule.region for rule in rules]
    if any(map(is_whole, regions)):
        return
    if saved is not None and any(map(_is_chosen_by_numbers, regions)):  # which are others now than when it was chosen
        if name in saved:
            yield _outside(regions, None)
        return
    union = _union(name, whole(parameter), rules)
    if not bool(union.all()):
        yield _outside(regions, ~union)


def _is_chosen_by_numbers(region: Any) -> bool:
    return depends_on_numbers(region) if isinstance(region, Region) else not isinstance(region, Tensor)


def _union(name: str, parameter: Tensor, rules: Sequence[Rule]) -> Tensor:
    """Return the bool tensor that is True at what any of the rules names.

    Raises:
        FreezeError: A rule does not fit the parameter, or names nothing of it.
    """
    found = []
    for rule in rules:
        with error_context(f"rule `{shortened(rule)}`", f"parameter `{name}` of shape {tuple(parameter.shape)}"):
            found.append(select(rule.region, parameter))
    return reduce(torch.logical_or, found)


def _outside(regions: Sequence[Any], others: Tensor | None) -> Any:
    """Return the region of what is in none of some regions: as text where all are text, else as a mask.

    Args:
        regions: The regions.
        others: What is in none of them, or None where a saved state says it.
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
    """Return the region of all other entries, without two signs that undo one another."""
    return region.operand if isinstance(region, Not) else ~region


def text_of(region: Any) -> str:
    """Return a region's text, or what a function or a mask is called."""
    return str(region) if isinstance(region, Region) else getattr(region, "__name__", type(region).__name__)


class Chosen:
    """A region that functions, or numbers beside a mask, have chosen once: it stands in a rule as a function does.

    Attributes:
        mask: What was chosen; None where a saved state says it.
    """

    def __init__(self, text: str, mask: Tensor | None) -> None:
        self.__name__ = text
        self.mask = mask

    def __call__(self, parameter: Tensor) -> Tensor | None:
        return self.mask
