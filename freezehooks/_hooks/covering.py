"""What a module around others has done for all of them, for as long as its own call lasts."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from .batch import Plan


class _Covered(NamedTuple):
    """A parameter that was written: where it was found, and its number in the plan."""

    holder: Mapping[str, Any]
    key: str
    found: Tensor
    number: int


Covered: TypeAlias = "dict[Hashable, list[_Covered]]"
"""What of a plan each hook set holds."""


class _Call(NamedTuple):
    """A call of a module that has written the values for everything below it."""

    by: object
    covered: Covered
    versions: list[int]


class _Calls(threading.local):
    """The calls that this thread is in, the outermost first."""

    def __init__(self) -> None:
        self.running: list[_Call] = []


_calls = _Calls()


def covered_by(plan: Plan, holders: Mapping[Hashable, Mapping[str, Any]]) -> Covered:
    """Return what of a plan each hook set holds.

    Args:
        plan: The plan.
        holders: Of each hook set, where it finds its parameters.
    """
    by_holder: dict[int, list[_Covered]] = {}
    for number, each in enumerate(plan.planned):
        covered = _Covered(each.holder, each.key, each.found, number)
        by_holder.setdefault(id(each.holder), []).append(covered)
    return {hooks: by_holder[id(holder)] for hooks, holder in holders.items() if id(holder) in by_holder}


def begin(by: object, covered: Covered, plan: Plan) -> None:
    """Say that all that was planned is written, until `end`.

    Args:
        by: Whose call it is.
        covered: What `covered_by` returned.
        plan: What was written.
    """
    end(by)  # of a call that was broken off from outside, as by a key
    _calls.running.append(_Call(by, covered, [each.found._version for each in plan.planned]))


def end(by: object) -> None:
    """Say that the call is over, and all that began inside it."""
    running = _calls.running
    for n, call in enumerate(running):
        if call.by is by:
            del running[n:]
            return


def end_all() -> None:
    """Say that no call is running in this thread."""
    _calls.running.clear()


def is_around(hooks: Iterable[Hashable]) -> bool:
    """Return whether a running call has written what every one of some hook sets holds."""
    return any(all(each in call.covered for each in hooks) for call in _calls.running)


def is_covered(hooks: Hashable) -> bool:
    """Return whether a running call has written what a hook set holds, and nobody has written to it since.

    As far as autograd counts: a write through `.data` inside a running forward waits for the next outermost one.
    """
    for _, covered, versions in _calls.running:
        places = covered.get(hooks)
        if places is not None:
            for holder, key, found, number in places:
                if holder.get(key) is not found or found._version != versions[number]:
                    return False
            return True
    return False
