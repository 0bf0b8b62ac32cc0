"""Which parameters of a checkpoint the rules speak of, and what they freeze of one of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from .._errors import UnsupportedParameterError, error_context
from .._held.constraint import Constraint
from .._held.fixed import FixedEntries
from .._held.names import Targets
from .._held.parameter import FrozenParameter
from .._held.supported import check_supported
from .._held.tied import TiedEntries
from .._rules.patterns.pattern import Pattern
from .._rules.region import Region
from .._rules.rule import Rule
from .._rules.ties import Tie
from .checkpoints import is_freezable


def rules_by_name(tensors: Mapping[str, Tensor], rules: Iterable[Rule]) -> dict[str, list[Rule]]:
    """Return for each parameter that a rule speaks of, in the order of the file, the rules that do.

    Raises:
        TargetError: A rule speaks of no parameter.
        UnsupportedParameterError: A rule names integers alone, or what no mechanism here can hold.
    """
    found: dict[str, list[Rule]] = {}
    for rule in dict.fromkeys(rules):
        for name in names_of(rule, tensors):
            with error_context(f"rule `{rule}`", f"parameter `{name}`"):
                check_supported(tensors[name])
            found.setdefault(name, []).append(rule)
    return {name: found[name] for name in tensors if name in found}


def names_of(rule: Rule, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the parameters that a rule speaks of, without integers such as the counters of batch norms.

    Raises:
        TargetError: It speaks of no tensor.
        UnsupportedParameterError: It speaks of integers alone.
    """
    with error_context(f"rule `{rule}`"):
        names = Targets(tensors).find(rule.target)
        numbers = [name for name in names if is_freezable(tensors[name])]
        if not numbers:
            raise UnsupportedParameterError(
                f"`{names[0]}` holds {tensors[names[0]].dtype}, which no optimizer trains",
                "name floating-point parameters alone",
            )
    return numbers


def frozen_by(rules: Iterable[Rule], name: str, tensor: Tensor) -> FrozenParameter:
    """Return what rules freeze of one parameter, and keep what it holds.

    Copies that are to be one may differ here: it is for the caller to find out.

    Raises:
        FreezeError: A rule does not fit the parameter, or two disagree.
    """
    constraints: list[Constraint] = []
    for rule in rules:
        with error_context(f"rule `{rule}`", f"parameter `{name}` of shape {tuple(tensor.shape)}"):
            if isinstance(rule.value, Tie):
                constraints.append(TiedEntries.resolve(rule, rule.value.starting_from("first"), tensor))
            else:
                constraints.append(FixedEntries.resolve(rule, tensor))
    return FrozenParameter([name], tensor, constraints)


def chosen_by_numbers(region: Region) -> list[str]:
    """Return the names of the patterns in a region that look at a parameter's numbers, not at its shape alone."""
    return sorted({leaf.name for leaf in region.leaves() if isinstance(leaf, Pattern) and leaf.depends_on_numbers})
