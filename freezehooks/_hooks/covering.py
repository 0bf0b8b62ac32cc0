"""What a module around others has done for all of them, for as long as its own call lasts."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import Any

from .batch import Plan, Planned


class _Calls(threading.local):
    """The calls that this thread is in, the outermost first."""

    def __init__(self) -> None:
        self.running: list[_Call] = []


class _Call:
    """A call of a module that has written the values for everything below it."""

    __slots__ = ("by", "covered", "versions")

    def __init__(self, by: object, covered: dict[Hashable, list[tuple[int, Planned]]], plan: Plan) -> None:
        self.by = by
        self.covered = covered
        self.versions = [planned.found._version for planned in plan.planned]

    def covers(self, hooks: Hashable) -> bool | None:
        """Return whether nothing was written since to what a hook set holds; None where it is not below."""
        places = self.covered.get(hooks)
        if places is None:
            return None
        for n, planned in places:
            found = planned.found
            if planned.holder.get(planned.key) is not found or found._version != self.versions[n]:
                return False
        return True


_calls = _Calls()


def begin(by: object, covered: dict[Any, list[tuple[int, Planned]]], plan: Plan) -> None:
    """Say that all that was planned is written, until `end`.

    Args:
        by: Whose call it is.
        covered: Each hook set below, with the numbers in the plan of what it holds.
        plan: What was written.
    """
    end(by)  # of a call that was broken off from outside, as by a key
    _calls.running.append(_Call(by, covered, plan))


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


def is_covered(hooks: Hashable) -> bool:
    """Return whether a running call has written what a hook set holds, and nobody has written to it since.

    As far as autograd counts: a write through `.data` inside a running forward waits for the next outermost one.
    """
    for call in _calls.running:
        found = call.covers(hooks)
        if found is not None:
            return found
    return False
