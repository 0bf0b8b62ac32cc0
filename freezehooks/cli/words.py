"""A rule in words: what it holds, and what follows. Plain Python, no tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from .._rules.patterns.pattern import Pattern
from .._rules.region import And, Index, Not, Or, Region
from .._rules.rule import Keep, Rule, Tied
from .index_words import EVERYWHERE, NOWHERE, dimension_in_words, index_in_words, joined

_ENDS: Final = {
    None: "Slices that differ when the model is frozen are refused.",
    "first": "They start as copies of the first.",
    "mean": "They start as copies of their mean.",
}


def in_words(rule: Rule) -> str:
    """Return a rule as sentences that need no other explanation.

    Example:
        >>> from freezehooks import parse_rule
        >>> in_words(parse_rule("conv.weight[center] = 0"))[:85]
        'Every entry of `conv.weight` in the middle of the kernel is held at 0. The others tra'
    """
    if isinstance(rule.value, Tied):
        return " ".join([*_tied_sentences(rule.target, rule.value), *_target_sentences(rule.target)])
    return " ".join([*_region_sentences(rule), *_target_sentences(rule.target)])


def leaves(region: Any) -> Iterator[Any]:
    """Yield the indices and patterns that a region is made of, and what else Python code may have put there."""
    if isinstance(region, Not):
        yield from leaves(region.operand)
    elif isinstance(region, And | Or):
        yield from leaves(region.left)
        yield from leaves(region.right)
    else:
        yield region


def has_pattern(region: Any, kind: type[Region]) -> bool:
    """Return whether a pattern of the given kind is a part of a region."""
    return any(isinstance(leaf, kind) for leaf in leaves(region))


def chosen_by_numbers(region: Any) -> set[str]:
    """Return the patterns in a region that look at a parameter's numbers, not at its shape alone."""
    return {leaf.name for leaf in leaves(region) if isinstance(leaf, Pattern) and leaf.depends_on_numbers}


# --------------------------------------------------------------------------------------------------------------------
# Sentences


def _region_sentences(rule: Rule) -> Iterator[str]:
    region = _inward(rule.region)
    compound = isinstance(region, And | Or)
    which = _condition(region) if compound else _which(region)
    if which == NOWHERE:
        yield _about(rule.target, "no entry", "is meant: a rule that selects nothing is refused")
        return
    held = f"is held at {_value(rule.value)}"
    if which == EVERYWHERE:
        yield _about(rule.target, "every entry", f"{held}; none of them trains, the gradient is 0 everywhere")
    else:
        entry, what = ("an entry", f"{held}, if {which}") if compound else ("every entry", f"{which} {held}")
        yield _about(rule.target, entry, what)
        yield "The others train. Where an entry is held, its gradient is 0."
    if chosen_by_numbers(rule.region):
        yield "Which entries these are is decided once, by what the parameter contains when the model is frozen."
    if rule.value is Keep.KEEP:
        yield "A checkpoint that is loaded later brings new numbers to hold."


def _tied_sentences(target: str, tied: Tied) -> Iterator[str]:
    yield _about(target, "all slices", f"along {dimension_in_words(tied.dim)} are one: they hold the same numbers")
    yield "They train as one: the gradient at each is the sum over all of them."
    yield _ENDS[tied.start]


def _about(target: str, entries: str, what: str) -> str:
    """Return a sentence about a parameter; a target with wildcards speaks of several."""
    several = f"in each parameter that `{target}` matches, {entries} {what}."
    sentence = several if _is_pattern(target) else f"{entries} of `{target}` {what}."
    return sentence[0].upper() + sentence[1:]


def _target_sentences(target: str) -> Iterator[str]:
    wildcards = [f"`{sign}` stands for {what}" for sign, what in _WILDCARDS.items() if sign in target]
    if wildcards:
        yield f"In the name, {' and '.join(wildcards)}."
    if target.split(".")[-1] not in ("weight", "bias"):
        several = "Where it matches modules and no parameter, their weights are meant."
        yield several if _is_pattern(target) else f"If `{target}` is a module, its weight is meant."


_WILDCARDS: Final = {"*": "any characters (dots too)", "?": "any one character"}


def _is_pattern(target: str) -> bool:
    return any(sign in target for sign in _WILDCARDS)


def _value(value: Any) -> str:
    if value is Keep.KEEP:
        return "what it contains when the model is frozen"
    return repr(value).removesuffix(".0") if isinstance(value, float) else "the number that the given tensor has for it"


# --------------------------------------------------------------------------------------------------------------------
# Regions


def _inward(region: Any, outside: bool = False) -> Any:
    """Return the same region, or its outside, with every ``~`` moved in as far as it goes: to an index or a pattern."""
    if isinstance(region, Not):
        return _inward(region.operand, not outside)
    if isinstance(region, And | Or):
        kind = And if isinstance(region, And) != outside else Or
        return kind(_inward(region.left, outside), _inward(region.right, outside))
    return Not(region) if outside else region


def _which(part: Any) -> str:
    """Return what follows "every entry" for an index or a pattern, or for the outside of one."""
    outside = isinstance(part, Not)
    leaf = part.operand if outside else part
    if isinstance(leaf, Index):
        return _where(index_in_words(leaf), outside)
    if isinstance(leaf, Pattern):
        return leaf.in_words(outside)
    return f"{'outside' if outside else 'among'} those that the given mask or function selects"


def _where(words: str, outside: bool) -> str:
    if not outside:
        return words
    opposite = {EVERYWHERE: NOWHERE, NOWHERE: EVERYWHERE}
    return opposite.get(words, f"except those {words}")


def _condition(pair: And | Or) -> str:
    """Return a clause that is true of the entries of several regions, joined by ``&`` or ``|``."""
    parts = _chain(pair, type(pair))
    clauses = [f"({_condition(part)})" if isinstance(part, And | Or) else _clause(_which(part)) for part in parts]
    return joined(clauses, "and" if isinstance(pair, And) else "or")


def _chain(region: Any, kind: type[And | Or]) -> list[Any]:
    """Return the operands of operators of one kind, which need no parentheses between them."""
    return [*_chain(region.left, kind), *_chain(region.right, kind)] if isinstance(region, kind) else [region]


def _clause(which: str) -> str:
    """Return what follows "every entry" as a clause of its own."""
    for words, clause in _CLAUSES.items():
        if which.startswith(words):
            text = clause + which.removeprefix(words)
            return f"({text})" if " and " in text else text
    return f"it lies {which}"


_CLAUSES: Final = {"whose position ": "its position ", "except those ": "it is none of those ", "that is ": "it is "}
