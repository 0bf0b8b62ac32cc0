"""From rules, and perhaps a saved state, to the frozen parts of a model; nothing of the model is changed here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, TypeAlias

from torch import Tensor, nn

from .._errors import FreezeError, StateMismatchError, error_context
from .._ranks.agreement import check_same_on_ranks
from .._ranks.sharding import whole
from .._rules.rule import Rule, Tied
from .fixed import Piece
from .names import Site, Targets, check_supported, check_wrappers, unwrapped
from .parameter import FrozenPart
from .tied import Tie

Model: TypeAlias = "nn.Module | Mapping[str, Tensor]"

Asked: TypeAlias = "Mapping[str, tuple[Tensor, Sequence[Rule]]]"
"""What is to be frozen: for each parameter's name the parameter and the rules that speak of it."""

_FORMAT: Final = 1


def resolve(model: Model, rules: Iterable[Rule], state: Any = None) -> list[tuple[FrozenPart, list[Site]]]:
    """Work out what the rules freeze of a model: a part for each parameter, with every place that holds it.

    Args:
        model: A module, or a mapping from name to leaf tensor.
        rules: The rules.
        state: What `state_of` wrote down under the same rules, or None to choose regions and kept values now.

    Raises:
        FreezeError: A rule, or the state, that does not fit the model.
    """
    check_wrappers(model)
    targets = Targets(model)
    asked = _asked(targets, rules)
    check_same_on_ranks(model, asked)
    pieces = _chosen_pieces(asked) if state is None else saved_pieces(asked, state)
    parts = [_part(targets.names_of(name), asked[name][0], members) for name, members in pieces]
    return [(part, [targets.sites[name] for name in part.names]) for part in parts]


def _part(names: list[str], parameter: Tensor, members: Sequence[Piece | Tie]) -> FrozenPart:
    part = FrozenPart(names, parameter, members)
    part.follow(parameter)
    return part


def _asked(targets: Targets, rules: Iterable[Rule]) -> Asked:
    asked: dict[str, tuple[Tensor, list[Rule]]] = {}
    for rule in dict.fromkeys(rules):
        with error_context(f"rule `{rule}`"):
            names = targets.find(rule.target)
        for name in names:
            parameter = targets.sites[name].tensor()
            with error_context(f"rule `{rule}`", f"parameter `{name}`"):
                check_supported(parameter)
            asked.setdefault(name, (parameter, []))[1].append(rule)
    return asked


Chosen: TypeAlias = "Iterator[tuple[str, list[Piece | Tie]]]"
"""One parameter after another: what is frozen of the whole of it, before it is cut to what lies on this rank."""


def _chosen_pieces(asked: Asked) -> Chosen:
    for name, (parameter, rules) in asked.items():
        full = whole(parameter)
        yield name, [_piece(rule, name, full) for rule in rules]


def _piece(rule: Rule, name: str, parameter: Tensor) -> Piece | Tie:
    with error_context(f"rule `{rule}`", f"parameter `{name}` of shape {tuple(parameter.shape)}"):
        if isinstance(rule.value, Tied):
            return Tie.resolve(rule, rule.value, parameter)
        return Piece.resolve(rule, parameter)


# --------------------------------------------------------------------------------------------------------------------
# Saved states


def state_of(parts: Iterable[FrozenPart]) -> dict[str, Any]:
    """Return rules, regions and values as plain tensors and builtins."""
    parts = list(parts)
    rules = dict.fromkeys(str(rule) for part in parts for rule in part.rules)
    return {"format": _FORMAT, "rules": list(rules), "parameters": {part.name: part.state() for part in parts}}


def saved_pieces(asked: Asked, state: Any) -> Chosen:
    """Yield the pieces that a state wrote down.

    Raises:
        StateMismatchError: The state was made under other rules or for another model, or cannot be read.
    """
    with _readable():
        if state["format"] != _FORMAT:
            raise StateMismatchError(
                f"the state has format {state['format']!r}, expected {_FORMAT}",
                "load it with the version of freezehooks that saved it",
            )
        parameters = _under_present_names(state["parameters"], asked)
        _check_same_rules(asked, parameters)
        for name, (parameter, rules) in asked.items():
            full = whole(parameter)
            saved = zip(rules, parameters[name]["pieces"], strict=True)
            yield name, [_saved_piece(rule, name, full, item) for rule, item in saved]


def _under_present_names(saved: dict[str, Any], asked: Asked) -> dict[str, Any]:
    """Return what was saved under the names that the parameters have now: a wrapper may have come or gone since."""
    present = {unwrapped(name): name for name in asked}
    return {name if name in asked else present.get(unwrapped(name), name): item for name, item in saved.items()}


def _saved_piece(rule: Rule, name: str, parameter: Tensor, item: dict[str, Any]) -> Piece | Tie:
    if isinstance(rule.value, Tied):
        return _piece(rule, name, parameter)
    with error_context(f"rule `{rule}`", f"parameter `{name}`"):
        return Piece.from_state(rule, item, parameter)


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except FreezeError:
        raise
    except (KeyError, TypeError, IndexError, AttributeError, RuntimeError, ValueError) as error:
        raise StateMismatchError(
            f"the state cannot be read ({type(error).__name__}: {error})",
            "pass what FrozenEntries.state_dict() returned",
        ) from error


def _check_same_rules(asked: Asked, saved: dict[str, Any]) -> None:
    now = {
        name: (list(parameter.shape), [unwrapped(str(rule)) for rule in rules])
        for name, (parameter, rules) in asked.items()
    }
    then = {
        name: (item["shape"], [unwrapped(piece["rule"]) for piece in item["pieces"]]) for name, item in saved.items()
    }
    for name in dict.fromkeys([*then, *now]):
        if now.get(name) != then.get(name):
            raise StateMismatchError(
                f"the state was saved under other rules: for `{name}` it says {_said(then.get(name))}, "
                f"the present rules say {_said(now.get(name))}",
                "use the rules of the saved run, or start from its weights alone",
            )


def _said(item: tuple[list[int], list[str]] | None) -> str:
    return f"{', '.join(f'`{rule}`' for rule in item[1])} on shape {tuple(item[0])}" if item else "nothing"
