"""Which parameters of a checkpoint the rules speak of, and what they freeze of one of them."""

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
    """The tensors of a file, by what rules call them.

    Args:
        tensors: The tensors, by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._targets = Targets(tensors)

    def matching(self, rule: Rule) -> list[str]:
        """Return the tensors that a rule speaks of.

        Raises:
            TargetError: It speaks of none.
        """
        target = rule.target
        for name in () if {"*", "?"} & set(target) else (target, f"{target}.weight"):
            if name in self._tensors:  # most rules say a name, and some files hold thousands
                return [name]
        with error_context(f"rule `{shortened(rule)}`"):
            return self._targets.find(target)

    def freezable(self, rule: Rule) -> list[str]:
        """Return the parameters that a rule speaks of, without integers such as the counters of batch norms.

        Raises:
            TargetError: It speaks of no tensor.
            UnsupportedParameterError: It speaks of integers alone.
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
    """Return for each parameter that a rule speaks of, in the order of the file, the rules that do.

    Raises:
        TargetError: A rule speaks of no parameter.
        UnsupportedParameterError: A rule names integers alone, or what no mechanism here can hold.
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
    """Return what rules hold of one parameter, and keep what it holds.

    Copies that are to be one may differ here: it is for the caller to find out.

    Raises:
        FreezeError: A rule does not fit the parameter, or two disagree.
    """
    constraints: list[Constraint] = []
    for rule in rules:
        with error_context(f"rule `{shortened(rule)}`", f"parameter `{name}` of shape {tuple(tensor.shape)}"):
            constraints.append(tie_of(rule, tensor) or FixedEntries.resolve(rule, tensor))
    if len(constraints) > 1:
        FrozenParameter([name], tensor, constraints)  # refuses rules that disagree
    return constraints


def tie_of(rule: Rule, tensor: Tensor) -> Constraint | None:
    """Return what a rule ties of a tensor, whose copies may differ; None where it ties nothing."""
    tie = rule.value
    return TiedEntries.resolve(rule, tie.starting_from("first"), tensor) if isinstance(tie, Tie) else None


def frozen_by(rules: Iterable[Rule], name: str, tensor: Tensor) -> FrozenParameter:
    """Return what rules freeze of one parameter, as `constraints_by` does."""
    return FrozenParameter([name], tensor, constraints_by(rules, name, tensor))


def chosen_by_numbers(region: Region) -> list[str]:
    """Return the names of the patterns in a region that look at a parameter's numbers, not at its shape alone."""
    return sorted({pattern.name for pattern in patterns_in(region) if pattern.depends_on_numbers})
