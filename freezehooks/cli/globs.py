"""Names of parameters -> the fewest targets that speak of these and no others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from .._held.names import matching, matching_unwrapped
from .._rules.rule import TARGET

_LONGEST: Final = 12
"""Up to how many parts of a name every way to leave some out in the middle is tried."""


def targets_for(
    names: Sequence[str], others: Sequence[str], absent: Sequence[str] = ()
) -> tuple[dict[str, list[str]], list[str]]:
    """Return targets, each with the names that it speaks of, and the names that no target can say alone.

    Args:
        names: What the targets are to speak of.
        others: Every other name of the file, which none of them may speak of.
        absent: Names of another file, with other wrappers perhaps, which none of them may speak of either.
    """
    every = [*names, *others]
    found: dict[str, list[str]] = {}
    unsayable: list[str] = []
    left = dict.fromkeys(names)
    while left:
        name = next(iter(left))
        exact = _exact_targets(name, set(names), every, list(absent))
        if not exact:
            unsayable.append(name)
            del left[name]
            continue
        target = min(exact, key=lambda target: _rank(target, exact[target], left))
        found[target] = exact[target]
        left = {name: None for name in left if name not in exact[target]}
    return found, unsayable


def _exact_targets(name: str, wanted: set[str], every: list[str], absent: list[str]) -> dict[str, list[str]]:
    """Return the targets that speak of a name and of no other than those wanted, each with what it speaks of."""
    spoken = {target: matching(target, every) for target in dict.fromkeys(_candidates(name)) if target}
    exact = {target: said for target, said in spoken.items() if name in said and wanted.issuperset(said)}
    return {target: said for target, said in exact.items() if not _speaks_of_any(target, absent)}


def _speaks_of_any(target: str, absent: list[str]) -> bool:
    return bool(matching(target, absent) or matching_unwrapped(target, absent))


def _rank(target: str, said: list[str], left: Mapping[str, None]) -> tuple[int, int, int]:
    """Return by what the best target is the least: it says most that is new, with fewest wildcards, in fewest signs."""
    return -sum(name in left for name in said), target.count("*") + target.count("?"), len(target)


def _candidates(name: str) -> Iterator[str]:
    """Yield targets that speak of a name: itself first, then with parts of it left out."""
    sayable = "".join(sign if TARGET.fullmatch(sign) and sign.isprintable() else "?" for sign in name)
    yield sayable
    parts = sayable.split(".")
    numbered = ["*" if part.isdecimal() else part for part in parts]
    for way in (parts, numbered) if numbered != parts else (parts,):
        yield ".".join(way)
        yield from _shortened(way)
    yield "*"


def _shortened(parts: list[str]) -> Iterator[str]:
    count = min(len(parts), _LONGEST)
    for before in range(count):
        for behind in range(count - before):
            if before + behind:
                yield ".".join([*parts[:before], "*", *parts[len(parts) - behind :]])
