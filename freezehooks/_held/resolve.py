"""From rules, and perhaps a saved state, to the frozen parameters of a model; nothing of the model is changed here."""

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
from .saved import Asked, Chosen
from .supported import check_supported, check_wrappers


def resolve(model: Model, rules: Iterable[Rule], state: Any = None) -> HeldParameters:
    """Work out what the rules freeze of a model.

    Args:
        model: A module, or a mapping from name to leaf tensor.
        rules: The rules.
        state: What `saved.save` wrote down under the same rules, or None to choose regions and kept values now.

    Returns:
        The frozen parameters, with every place that holds them.

    Raises:
        FreezeError: A rule, or the state, that does not fit the model.
    """
    check_wrappers(model)
    targets = Targets(model)
    asked = asked_of(targets, rules)
    check_same_on_ranks(model, asked)
    frozen = FrozenParameters()
    asked, frozen.skipped = without_empty(asked, state)
    for name, constraints in _chosen(asked, targets) if state is None else saved.load(asked, state):
        frozen.by_name[name] = FrozenParameter(targets.names_of(name), asked[name][0], constraints)
        _check_embeddings(frozen.by_name[name], targets)
        frozen.adopt(name, asked[name][0])
    frozen.release(frozen.by_name)  # until the handle is attached
    places = [(name, targets.sites[alias]) for name, each in frozen.by_name.items() for alias in each.names]
    return HeldParameters(model, frozen, places)


def _check_embeddings(frozen: FrozenParameter, targets: Targets) -> None:
    for owner, key in ((targets.sites[alias].owner, targets.sites[alias].key) for alias in frozen.names):
        if isinstance(owner, nn.Embedding | nn.EmbeddingBag) and owner.max_norm is not None and key == "weight":
            check_rows(frozen, owner)


def asked_of(targets: Targets, rules: Iterable[Rule]) -> Asked:
    """Return the parameters that rules name, each under its first name and with its rules.

    Parameters and modules that were given as targets have become names in them.

    Raises:
        FreezeError: A rule names none, or one that no mechanism can hold.
    """
    asked: dict[str, tuple[Tensor, list[Rule]]] = {}
    for rule in dict.fromkeys(map(targets.named, rules)):
        with error_context(f"rule `{shortened(rule)}`"):
            names = targets.find(rule.target)
        for name in names:
            parameter = targets.sites[name].tensor()
            with error_context(f"rule `{shortened(rule)}`", f"parameter `{name}`"):
                check_supported(parameter)
            asked.setdefault(name, (parameter, []))[1].append(rule)
    return asked


def without_empty(asked: Asked, state: Any = None) -> tuple[Asked, dict[str, int]]:
    """Leave out parameters of which a rule with wildcards, by their numbers, selects nothing; not where all are so.

    Returns:
        What is asked of the others, and how many were left out, by the rule's text.
    """
    meets: dict[Rule, list[str]] = {}
    for name, (_, rules) in asked.items():
        for rule in rules:
            if may_select_nothing(rule):
                meets.setdefault(rule, []).append(name)
    written = saved.rules_in(state, asked) if meets and state is not None else None
    empty = {
        rule: [name for name in names if _selects_nothing(rule, name, asked[name][0], written)]
        for rule, names in meets.items()
    }
    skipped = {rule: names for rule, names in empty.items() if 0 < len(names) < len(meets[rule])}
    kept = {
        name: (parameter, [rule for rule in rules if name not in skipped.get(rule, ())])
        for name, (parameter, rules) in asked.items()
    }
    counts = {str(rule): len(names) for rule, names in skipped.items()}
    return {name: item for name, item in kept.items() if item[1]}, counts


def may_select_nothing(rule: Rule) -> bool:
    """Return whether a rule skips parameters of which it selects nothing: one with wildcards, by their numbers."""
    return is_wild(rule.target) and depends_on_numbers(rule.region)


def _selects_nothing(rule: Rule, name: str, parameter: Tensor, written: Mapping[str, list[str]] | None) -> bool:
    if written is not None:  # a saved state says what was chosen
        return unwrapped(str(rule)) not in written.get(name, [])
    try:
        return not bool(select_perhaps_nothing(rule.region, whole(parameter)).any())
    except RegionError:  # it does not fit, which is for whoever resolves it to say
        return False


def _chosen(asked: Asked, targets: Targets) -> Chosen:
    for name, (parameter, rules) in asked.items():
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
    """Return what a saved state says of regions and kept values, by the parameters' names; nothing is changed here.

    Raises:
        StateMismatchError: It was made under other rules or for another model.
    """
    asked = {frozen.name: (parameter, frozen.rules) for frozen, parameter in held}
    return {
        name: FrozenParameter(held.frozen.by_name[name].names, asked[name][0], constraints).for_tensor(asked[name][0])
        for name, constraints in list(saved.load(asked, state))
    }
