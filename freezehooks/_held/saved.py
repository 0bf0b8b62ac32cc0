"""The saved form of what is frozen: of a handle, of a compact optimizer's state, and of the callbacks.

All are dicts of builtins and plain tensors with one number, `FORMAT`, under "format". What is frozen of a parameter
stands under its name as ``{"shape": [...], "constraints": [{"rule": ..., "entries": ..., "value": ...}]}``. A handle
of `train_only` writes the names of the parameters that do not train under "untrained".
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

Asked: TypeAlias = "Mapping[str, tuple[Tensor, Sequence[Rule]]]"
"""What is to be frozen: for each parameter's name the parameter and the rules that name it."""

Chosen: TypeAlias = "Iterator[tuple[str, list[Constraint]]]"
"""One parameter after another: what is held of the whole of it, before it is cut to what lies on this rank."""


def save(frozen: Iterable[FrozenParameter], untrained: Sequence[str] = ()) -> dict[str, Any]:
    """Return rules, regions and values as plain tensors and builtins.

    Args:
        frozen: What is frozen.
        untrained: The names of the parameters that `train_only` keeps from training.
    """
    state = {"format": FORMAT, "parameters": {parameter.name: parameter.state() for parameter in frozen}}
    return {**state, "untrained": list(untrained)} if untrained else state


def load(asked: Asked, state: Any) -> Chosen:
    """Yield the constraints that a state wrote down.

    Raises:
        StateMismatchError: The state was made under other rules or for another model, or cannot be read.
    """
    with readable("the state", _GIVE_A_STATE):
        check_format("the state", state)
        parameters = _under_present_names(state["parameters"], asked)
        _check_same_rules(asked, parameters)
        for name, (parameter, rules) in asked.items():
            full = whole(parameter)
            saved = zip(rules, parameters[name]["constraints"], strict=True)
            yield name, [_constraint(rule, name, full, item) for rule, item in saved]


def rules_in(state: Any, asked: Collection[str]) -> dict[str, list[str]]:
    """Return the rules that a state holds, as text, by the names that parameters have now.

    Raises:
        StateMismatchError: The state cannot be read.
    """
    with readable("the state", _GIVE_A_STATE):
        check_format("the state", state)
        parameters = _under_present_names(state["parameters"], asked)
        return {name: [unwrapped(item["rule"]) for item in held["constraints"]] for name, held in parameters.items()}


def untrained_in(state: Any) -> set[str]:
    """Return the parameters that `train_only` kept from training when a state was saved, without names of wrappers.

    Raises:
        StateMismatchError: The state cannot be read.
    """
    with readable("the state", _GIVE_A_STATE):
        check_format("the state", state)
        return set(map(unwrapped, state.get("untrained", ())))


def check_format(what: str, state: Any) -> None:
    """Refuse a state of another format.

    Raises:
        StateMismatchError: It is; the message begins with `what`.
    """
    if state["format"] != FORMAT:
        raise StateMismatchError(
            f"{what} has format {shown(state['format'])}, expected {FORMAT}",
            "load it with the version of freezehooks that saved it",
        )


@contextmanager
def readable(what: str, advice: str) -> Iterator[None]:
    """Say in the words of this library that a state cannot be read, where reading it inside the block fails."""
    try:
        yield
    except FreezeError:
        raise
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise StateMismatchError(f"{what} cannot be read ({type(error).__name__}: {error})", advice) from error


def _under_present_names(saved: dict[str, Any], asked: Collection[str]) -> dict[str, Any]:
    """Return what was saved under the names that the parameters have now: a wrapper may have come or gone since."""
    present = {unwrapped(name): name for name in asked}
    return {name if name in asked else present.get(unwrapped(name), name): item for name, item in saved.items()}


def _constraint(rule: Rule, name: str, parameter: Tensor, item: dict[str, Any]) -> Constraint:
    with error_context(f"rule `{shortened(rule)}`", f"parameter `{name}`"):
        if isinstance(rule.value, Tie):
            return TiedEntries.from_state(rule, rule.value, item, parameter)
        return FixedEntries.from_state(rule, item, parameter)


def chosen(rule: Rule, name: str, parameter: Tensor) -> Constraint:
    """Return what a rule holds of a parameter, chosen by the numbers that the parameter has now.

    Raises:
        FreezeError: The rule does not fit the parameter.
    """
    with error_context(f"rule `{shortened(rule)}`", f"parameter `{name}` of shape {tuple(parameter.shape)}"):
        if isinstance(rule.value, Tie):
            return TiedEntries.resolve(rule, rule.value, parameter)
        return FixedEntries.resolve(rule, parameter)


def _check_same_rules(asked: Asked, saved: dict[str, Any]) -> None:
    now = {
        name: (list(parameter.shape), [unwrapped(str(rule)) for rule in rules])
        for name, (parameter, rules) in asked.items()
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
    """Return which entries of a tensor are in any of some sets, as plain tensors and builtins."""
    return {"shape": list(shape), "entries": [entries.state() for entries in sets]}


def load_entries(item: dict[str, Any], parameter: Tensor) -> Tensor:
    """Return the bool tensor of what `save_entries` wrote down."""
    mask = torch.zeros(parameter.shape, dtype=torch.bool, device=parameter.device)
    for state in item["entries"]:
        mask |= EntrySet.from_state(state, parameter).mask(parameter.device)
    return mask
