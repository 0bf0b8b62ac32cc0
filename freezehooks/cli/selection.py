"""Finds the parameters of a checkpoint that rules name, and what the rules freeze in each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from .._errors import UnsupportedParameterError, error_context, shortened
from .._held.constraint import Constraint
from .._held.fixed import FixedEntries
from .._held.names import Targets
from .._held.parameter import FrozenParameter
from .._held.supported import check_supported
from .._held.tied import TiedEntries
from .._rules.patterns.pattern import patterns_in
from .._rules.region import Region
from .._rules.rule import Rule
from .._rules.ties import Tie
from .checkpoints import is_freezable


class Names:
    """The tensors of a file, to be found by the targets of rules.

    Args:
        tensors: The tensors, by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._targets = Targets(tensors)

    def matching(self, rule: Rule) -> list[str]:
        """Return the names of the tensors that a rule matches.

        Raises:
            TargetError: It matches none.
        """
        target = rule.target
        for name in () if {"*", "?"} & set(target) else (target, f"{target}.weight"):
            if name in self._tensors:  # a shortcut: most rules have a plain name, and some files thousands of tensors
                return [name]
        with error_context(f"rule `{shortened(rule)}`"):
            return self._targets.find(target)

    def freezable(self, rule: Rule) -> list[str]:
        """Return the names that a rule matches, without integer tensors such as the counters of batch norms.

        Raises:
            TargetError: It matches no tensor.
            UnsupportedParameterError: It matches only integer tensors.
        """
        names = self.matching(rule)
        numbers = [name for name in names if is_freezable(self._tensors[name])]
        if not numbers:
            raise UnsupportedParameterError(
                f"rule `{shortened(rule)}`: `{names[0]}` holds {self._tensors[names[0]].dtype}, "
                "which no optimizer trains",
                "name floating-point parameters only",
            )
        return numbers


def rules_by_name(tensors: Mapping[str, Tensor], rules: Iterable[Rule]) -> dict[str, list[Rule]]:
    """Return the rules for each parameter that a rule matches, in the order of the file.

    Raises:
        TargetError: A rule matches no parameter.
        UnsupportedParameterError: A rule matches only integer tensors, or an unsupported parameter.
    """
    found: dict[str, list[Rule]] = {}
    names = Names(tensors)
    for rule in dict.fromkeys(rules):
        for name in names.freezable(rule):
            with error_context(f"rule `{shortened(rule)}`", f"parameter `{name}`"):
                check_supported(tensors[name])
            found.setdefault(name, []).append(rule)
    return {name: found[name] for name in tensors if name in found}


def constraints_by(rules: Iterable[Rule], name: str, tensor: Tensor) -> list[Constraint]:
    """Return the constraints of rules on one parameter, with `keep` taken from that tensor.

    Tied entries may differ here: the caller is to check that.

    Raises:
        FreezeError: A rule does not fit the parameter, or two disagree.
    """
    constraints: list[Constraint] = []
    for rule in rules:
        with error_context(f"rule `{shortened(rule)}`", f"parameter `{name}` of shape {tuple(tensor.shape)}"):
            constraints.append(tie_of(rule, tensor) or FixedEntries.resolve(rule, tensor))
    if len(constraints) > 1:
        FrozenParameter([name], tensor, constraints)  # raises for rules that disagree
    return constraints


def tie_of(rule: Rule, tensor: Tensor) -> Constraint | None:
    """Return the constraint of a rule that ties, even if the copies differ; None for any other rule."""
    tie = rule.value
    return TiedEntries.resolve(rule, tie.starting_from("first"), tensor) if isinstance(tie, Tie) else None


def frozen_by(rules: Iterable[Rule], name: str, tensor: Tensor) -> FrozenParameter:
    """Return what rules freeze in one parameter; see `constraints_by`."""
    return FrozenParameter([name], tensor, constraints_by(rules, name, tensor))


def chosen_by_numbers(region: Region) -> list[str]:
    """Return the names of the patterns in a region that depend on what a parameter contains."""
    return sorted({pattern.name for pattern in patterns_in(region) if pattern.depends_on_numbers})
