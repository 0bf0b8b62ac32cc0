"""Resolves rules, or a saved state, to the frozen parameters of a model, without changing the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from .._entries.select import select_perhaps_nothing
from .._errors import RegionError, error_context, shortened
from .._ranks.agreement import check_same_on_ranks
from .._ranks.sharding import whole
from .._rules.patterns.pattern import depends_on_numbers
from .._rules.rule import Rule
from . import saved
from .constraint import Constraint
from .held import HeldParameters, Model
from .max_norm import check_rows
from .names import Targets, is_wild, typed, unwrapped
from .parameter import FrozenParameter
from .parameters import FrozenParameters
from .saved import Chosen, Requested
from .supported import check_supported, check_wrappers


def resolve(model: Model, rules: Iterable[Rule], state: Any = None) -> HeldParameters:
    """Resolve rules to the frozen parameters of a model.

    Args:
        model: A module, or a mapping from name to leaf tensor.
        rules: The rules.
        state: What `saved.save` returned under the same rules, or None to choose regions and kept values now.

    Returns:
        The frozen parameters, with all the sites that hold them.

    Raises:
        FreezeError: A rule or the state does not fit the model.
    """
    check_wrappers(model)
    targets = Targets(model)
    requested = requested_by(targets, rules)
    check_same_on_ranks(model, requested)
    frozen = FrozenParameters()
    requested, frozen.skipped = without_empty(requested, state)
    for name, constraints in _chosen(requested, targets) if state is None else saved.load(requested, state):
        frozen.by_name[name] = FrozenParameter(targets.names_of(name), requested[name][0], constraints)
        _check_embeddings(frozen.by_name[name], targets)
        frozen.adopt(name, requested[name][0])
    frozen.release(frozen.by_name)  # until the handle is attached
    places = [(name, targets.sites[alias]) for name, each in frozen.by_name.items() for alias in each.names]
    return HeldParameters(model, frozen, places)


def _check_embeddings(frozen: FrozenParameter, targets: Targets) -> None:
    for owner, key in ((targets.sites[alias].owner, targets.sites[alias].key) for alias in frozen.names):
        if isinstance(owner, nn.Embedding | nn.EmbeddingBag) and owner.max_norm is not None and key == "weight":
            check_rows(frozen, owner)


def requested_by(targets: Targets, rules: Iterable[Rule]) -> Requested:
    """Return the parameters that the rules name, each under its first name and with its rules.

    In these rules, targets that were parameters or modules are replaced by their names.

    Raises:
        FreezeError: A rule names no parameter, or one that is not supported.
    """
    requested: dict[str, tuple[Tensor, list[Rule]]] = {}
    for rule in dict.fromkeys(map(targets.named, rules)):
        with error_context(f"rule `{shortened(rule)}`"):
            names = targets.find(rule.target)
        for name in names:
            parameter = targets.sites[name].tensor()
            with error_context(f"rule `{shortened(rule)}`", f"parameter `{name}`"):
                check_supported(parameter)
            requested.setdefault(name, (parameter, []))[1].append(rule)
    return requested


def without_empty(requested: Requested, state: Any = None) -> tuple[Requested, dict[str, int]]:
    """Skip the parameters in which a rule with wildcards selects nothing, if its region depends on what they contain.

    A rule that selects nothing in any of them is left for an error.

    Returns:
        The other parameters with their rules, and how many each rule skipped, by the rule's text.
    """
    matches: dict[Rule, list[str]] = {}
    for name, (_, rules) in requested.items():
        for rule in rules:
            if may_select_nothing(rule):
                matches.setdefault(rule, []).append(name)
    written = saved.rules_in(state, requested) if matches and state is not None else None
    empty = {
        rule: [name for name in names if _selects_nothing(rule, name, requested[name][0], written)]
        for rule, names in matches.items()
    }
    skipped = {rule: names for rule, names in empty.items() if 0 < len(names) < len(matches[rule])}
    kept = {
        name: (parameter, [rule for rule in rules if name not in skipped.get(rule, ())])
        for name, (parameter, rules) in requested.items()
    }
    counts = {str(rule): len(names) for rule, names in skipped.items()}
    return {name: item for name, item in kept.items() if item[1]}, counts


def may_select_nothing(rule: Rule) -> bool:
    """Return whether a rule may skip parameters: it has wildcards, and its region depends on what they contain."""
    return is_wild(rule.target) and depends_on_numbers(rule.region)


def _selects_nothing(rule: Rule, name: str, parameter: Tensor, written: Mapping[str, list[str]] | None) -> bool:
    if written is not None:  # the saved state lists what was chosen
        return unwrapped(str(rule)) not in written.get(name, [])
    try:
        return not bool(select_perhaps_nothing(rule.region, whole(parameter)).any())
    except RegionError:  # it does not fit, which raises later, with context
        return False


def _chosen(requested: Requested, targets: Targets) -> Chosen:
    for name, (parameter, rules) in requested.items():
        full = whole(parameter)
        yield name, [_chosen_by(rule, name, full, targets) for rule in rules]


def _chosen_by(rule: Rule, name: str, parameter: Tensor, targets: Targets) -> Constraint:
    try:
        return saved.chosen(rule, name, parameter)
    except RegionError as error:
        classes = targets.classes_that_fit(rule)
        if not classes:
            raise
        raise RegionError(error.fact, f"name classes of modules: `{typed(rule, classes)}`") from None


def read(held: HeldParameters, state: Any) -> dict[str, FrozenParameter]:
    """Read the regions and kept values of a saved state, by the parameters' names, without changing anything.

    Raises:
        StateMismatchError: It was made under other rules or for another model.
    """
    requested = {frozen.name: (parameter, frozen.rules) for frozen, parameter in held}
    found: dict[str, FrozenParameter] = {}
    for name, constraints in list(saved.load(requested, state)):
        parameter, names = requested[name][0], held.frozen.by_name[name].names
        found[name] = FrozenParameter(names, parameter, constraints).for_tensor(parameter)
    return found
