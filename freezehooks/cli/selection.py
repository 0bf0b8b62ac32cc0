"""Which parameters of a checkpoint the rules speak of, and what they freeze of one of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from .._errors import FreezeError, TargetError, UnsupportedParameterError, error_context
from .._held.names import Targets, check_supported
from .._held.parameter import FrozenParameter
from .._held.resolve import resolve
from .._rules.rule import Rule, Tied
from .checkpoints import freezable


def rules_by_name(tensors: Mapping[str, Tensor], rules: Iterable[Rule]) -> dict[str, list[Rule]]:
    """Return for each parameter that a rule speaks of, in the order of the file, the rules that do.

    A wildcard passes over integers, such as the counters of batch norms.

    Raises:
        TargetError: A rule speaks of no parameter.
        UnsupportedParameterError: A rule names integers alone, or what no mechanism here can hold.
    """
    targets = Targets(freezable(tensors))
    found: dict[str, list[Rule]] = {}
    for rule in dict.fromkeys(rules):
        for name in _names(rule, targets, tensors):
            with error_context(f"rule `{rule}`", f"parameter `{name}`"):
                check_supported(tensors[name])
            found.setdefault(name, []).append(rule)
    return {name: found[name] for name in tensors if name in found}


def _names(rule: Rule, targets: Targets, tensors: Mapping[str, Tensor]) -> list[str]:
    try:
        return targets.find(rule.target)
    except TargetError as error:
        _refuse_integers(rule, tensors)
        raise error.within(f"rule `{rule}`") from None


def _refuse_integers(rule: Rule, tensors: Mapping[str, Tensor]) -> None:
    try:
        name = Targets(tensors).find(rule.target)[0]
    except TargetError:
        return
    raise UnsupportedParameterError(
        f"rule `{rule}`: `{name}` holds {tensors[name].dtype}, which no optimizer trains",
        "name floating-point parameters alone",
    )


def part_of(name: str, tensor: Tensor, rules: Sequence[Rule]) -> FrozenParameter:
    """Return what rules freeze of one parameter, and keep what it holds.

    Copies that are to be one may differ here: it is for the caller to find out.

    Raises:
        FreezeError: A rule does not fit the parameter, or two disagree.
    """
    eased = {_from_the_first(rule): rule for rule in rules}
    try:
        ((part, _),) = resolve({name: tensor}, eased)
    except FreezeError as error:
        raise _as_written(error, eased) from None
    return part


def _as_written(error: FreezeError, eased: Mapping[Rule, Rule]) -> FreezeError:
    """Return an error that speaks of rules as they were written."""
    fact = error.fact
    for rule, written in eased.items():
        fact = fact.replace(f"`{rule}`", f"`{written}`")
    return type(error)(fact, error.advice)


def _from_the_first(rule: Rule) -> Rule:
    value = rule.value
    return Rule(rule.target, rule.region, Tied(value.dim, "first")) if isinstance(value, Tied) else rule


def tying(rules: Iterable[Rule]) -> Rule | None:
    """Return the rule that makes copies one, or None."""
    return next((rule for rule in rules if isinstance(rule.value, Tied)), None)
