"""Turns the saved state of a handle into claims, including regions and values that have no text form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from .._errors import CheckpointError, RuleSyntaxError, error_context, shortened
from .._held.fixed import FixedEntries
from .._held.saved import check_format, readable
from .._held.supported import check_supported
from .._rules.region import Described
from .._rules.rule import Rule, keep
from .._rules.spec import rules_of
from .._rules.ties import tied
from .checkpoints import load_file
from .claims import Claim
from .pairs import counterparts
from .selection import tie_of


def saved_claims(path: str, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, list[Claim]]]:
    """Yield the claims of the handles' states in a file about a checkpoint's tensors, tensor by tensor.

    Args:
        path: A file with what `FrozenEntries.state_dict` returned, possibly among other things, such as a Lightning
            checkpoint with the callback's state in it.
        tensors: The tensors of the checkpoint.

    Raises:
        CheckpointError: The file cannot be read, has no such state, or is of another model than the checkpoint.
        StateMismatchError: A state has another format, or cannot be read.
    """
    states = list(_states_in(load_file(path)))
    if not states:
        raise CheckpointError(
            f"`{path}` holds no state of frozen entries", "save one: torch.save(frozen.state_dict(), path)"
        )
    claims: dict[str, list[Claim]] = {}
    for state in states:
        with error_context(f"`{path}`"), readable("the state", "save it again: torch.save(frozen.state_dict(), path)"):
            check_format("the state", state)
            for name, item in _named(state["parameters"], tensors):
                claims.setdefault(name, []).extend(_claims(item, name, tensors[name]))
    yield from ((name, tensors[name], claims[name]) for name in tensors if claims.get(name))


def _states_in(loaded: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the states of handles in nested dicts, which may contain themselves."""
    seen: set[int] = set()
    left = [loaded]
    while left:
        each = left.pop()
        if not isinstance(each, Mapping) or id(each) in seen:
            continue
        seen.add(id(each))
        if "format" in each and isinstance(each.get("parameters"), Mapping):
            yield each
        else:
            left += [*each.values()][::-1]


def _named(saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Any]]:
    """Yield what was saved for each parameter, by its name in the checkpoint."""
    names = counterparts(saved, tensors)
    for name, item in saved.items():
        if name not in names:
            raise CheckpointError(
                f"the checkpoint has no `{name}`, of which entries were frozen",
                "give the state that was saved with this checkpoint",
            )
        yield names[name], item


def _claims(item: Mapping[str, Any], name: str, tensor: Tensor) -> Iterator[Claim]:
    if list(tensor.shape) != list(item["shape"]):
        raise CheckpointError(
            f"`{name}` had shape {tuple(item['shape'])} when it was frozen, and has {tuple(tensor.shape)} in the "
            "checkpoint",
            "give the state that was saved with this checkpoint",
        )
    with error_context(f"parameter `{name}`"):
        check_supported(tensor)
    for saved in item["constraints"]:
        text = shortened(saved["rule"])
        with error_context(f"rule `{text}`", f"parameter `{name}`"):
            rule = _rule(saved, name)
            constraint = tie_of(rule, tensor) or FixedEntries.from_state(rule, saved, tensor)
        yield Claim.by(constraint, tensor, text)


def _rule(saved: Mapping[str, Any], name: str) -> Rule:
    """Return the rule that was saved; if its text cannot be parsed, build one from the rest of the state."""
    try:
        (rule,) = rules_of(saved["rule"])
    except RuleSyntaxError:  # a mask, a function, a tensor as the value, or labels
        if "labels" in saved:
            return Rule(name, value=tied(saved["labels"]))
        value = saved["value"]
        return Rule(name, Described(saved["rule"]), value if isinstance(value, float) else keep)
    return rule
