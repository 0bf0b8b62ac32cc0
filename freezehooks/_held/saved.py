"""The saved state of handles, which compact optimizers and callbacks use as well.

It is a dict of builtins and plain tensors, with the number `FORMAT` under "format". Under "parameters", each frozen
parameter has ``{"shape": [...], "constraints": [{"rule": ..., "entries": ..., "value": ...}]}`` under its name. A
handle of `train_only` adds the names of the parameters that do not train under "untrained".
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from .._entries.entry_set import EntrySet
from .._errors import FreezeError, StateMismatchError, error_context, shortened, shown
from .._ranks.sharding import whole
from .._rules.rule import Rule
from .._rules.ties import Tie
from .constraint import Constraint
from .fixed import FixedEntries
from .names import unwrapped
from .parameter import FrozenParameter
from .tied import TiedEntries

FORMAT: Final = 2

_GIVE_A_STATE: Final = "pass what FrozenEntries.state_dict() returned"

Requested: TypeAlias = "Mapping[str, tuple[Tensor, Sequence[Rule]]]"
"""What is to be frozen: the parameter and its rules, by the parameter's name."""

Chosen: TypeAlias = "Iterator[tuple[str, list[Constraint]]]"
"""Pairs of a parameter's name and its constraints, which are for the whole parameter and not for this rank's shard."""


def save(frozen: Iterable[FrozenParameter], untrained: Sequence[str] = ()) -> dict[str, Any]:
    """Return rules, regions and values as plain tensors and builtins.

    Args:
        frozen: The frozen parameters.
        untrained: The names of the parameters that `train_only` keeps from training.
    """
    state = {"format": FORMAT, "parameters": {parameter.name: parameter.state() for parameter in frozen}}
    return {**state, "untrained": list(untrained)} if untrained else state


def load(requested: Requested, state: Any) -> Chosen:
    """Yield the constraints that a saved state contains.

    Raises:
        StateMismatchError: The state was made under other rules or for another model, or cannot be read.
    """
    with readable("the state", _GIVE_A_STATE):
        check_format("the state", state)
        parameters = _under_present_names(state["parameters"], requested)
        _check_same_rules(requested, parameters)
        for name, (parameter, rules) in requested.items():
            full = whole(parameter)
            saved = zip(rules, parameters[name]["constraints"], strict=True)
            yield name, [_constraint(rule, name, full, item) for rule, item in saved]


def rules_in(state: Any, requested: Collection[str]) -> dict[str, list[str]]:
    """Return the rules in a saved state as text, by the names that the parameters have now.

    Raises:
        StateMismatchError: The state cannot be read.
    """
    with readable("the state", _GIVE_A_STATE):
        check_format("the state", state)
        parameters = _under_present_names(state["parameters"], requested)
        return {name: [unwrapped(item["rule"]) for item in held["constraints"]] for name, held in parameters.items()}


def untrained_in(state: Any) -> set[str]:
    """Return the untrained parameters in a state saved by `train_only`, without the names of wrappers.

    Raises:
        StateMismatchError: The state cannot be read.
    """
    with readable("the state", _GIVE_A_STATE):
        check_format("the state", state)
        return set(map(unwrapped, state.get("untrained", ())))


def check_format(what: str, state: Any) -> None:
    """Reject a state of another format.

    Raises:
        StateMismatchError: The format differs; the message begins with `what`.
    """
    if state["format"] != FORMAT:
        raise StateMismatchError(
            f"{what} has format {shown(state['format'])}, expected {FORMAT}",
            "load it with the version of freezehooks that saved it",
        )


@contextmanager
def readable(what: str, advice: str) -> Iterator[None]:
    """Turn errors inside the block that come from a malformed state into a StateMismatchError."""
    try:
        yield
    except FreezeError:
        raise
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise StateMismatchError(f"{what} cannot be read ({type(error).__name__}: {error})", advice) from error


def _under_present_names(saved: dict[str, Any], requested: Collection[str]) -> dict[str, Any]:
    """Rename what was saved to the names that the parameters have now, with wrappers added or removed since."""
    present = {unwrapped(name): name for name in requested}
    return {name if name in requested else present.get(unwrapped(name), name): item for name, item in saved.items()}


def _constraint(rule: Rule, name: str, parameter: Tensor, item: dict[str, Any]) -> Constraint:
    with error_context(f"rule `{shortened(rule)}`", f"parameter `{name}`"):
        if isinstance(rule.value, Tie):
            return TiedEntries.from_state(rule, rule.value, item, parameter)
        return FixedEntries.from_state(rule, item, parameter)


def chosen(rule: Rule, name: str, parameter: Tensor) -> Constraint:
    """Return the constraint of a rule for what a parameter contains now.

    Raises:
        FreezeError: The rule does not fit the parameter.
    """
    with error_context(f"rule `{shortened(rule)}`", f"parameter `{name}` of shape {tuple(parameter.shape)}"):
        if isinstance(rule.value, Tie):
            return TiedEntries.resolve(rule, rule.value, parameter)
        return FixedEntries.resolve(rule, parameter)


def _check_same_rules(requested: Requested, saved: dict[str, Any]) -> None:
    now = {
        name: (list(parameter.shape), [unwrapped(str(rule)) for rule in rules])
        for name, (parameter, rules) in requested.items()
    }
    then = {
        name: (item["shape"], [unwrapped(constraint["rule"]) for constraint in item["constraints"]])
        for name, item in saved.items()
    }
    for name in dict.fromkeys([*then, *now]):
        if now.get(name) != then.get(name):
            raise StateMismatchError(
                f"the state was saved under other rules: for `{name}` it says {_said(then.get(name))}, "
                f"the present rules say {_said(now.get(name))}",
                "use the rules of the saved run, or start from its weights alone",
            )


def _said(item: tuple[list[int], list[str]] | None) -> str:
    return f"{', '.join(f'`{shortened(rule)}`' for rule in item[1])} on shape {tuple(item[0])}" if item else "nothing"


def save_entries(sets: Iterable[EntrySet], shape: Sequence[int]) -> dict[str, Any]:
    """Return the union of some entry sets as plain tensors and builtins, for `load_entries`."""
    return {"shape": list(shape), "entries": [entries.state() for entries in sets]}


def load_entries(item: dict[str, Any], parameter: Tensor) -> Tensor:
    """Return the bool tensor of the entries that `save_entries` saved."""
    mask = torch.zeros(parameter.shape, dtype=torch.bool, device=parameter.device)
    for state in item["entries"]:
        mask |= EntrySet.from_state(state, parameter).mask(parameter.device)
    return mask
