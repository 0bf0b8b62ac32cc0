"""One write a moment: what many parameters hold, planned once and kept until one of them is found elsewhere.

A module around others has written for all of them, for as long as its own call lasts: they ask before they write again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from .._entries.writes import Writes
from .._held.parameter import FrozenParameter
from .._held.parameters import FrozenParameters
from .._held.place import Place
from .._torch import kept_gradient_hooks
from .gradient import ZeroFrozenGradient, gradient_hook, watch_gradient

Places: TypeAlias = "Callable[[], Iterable[Place]]"


@dataclass(slots=True)
class Planned:
    """What is written at one place.

    It refers to no module: the module's hooks hold it, and a circle would keep both alive.

    Attributes:
        frozen: What the handle froze.
        name: The parameter's name there.
        held: What stood there under the name.
        holder: The mapping in which the parameter was found.
        key: The key under which.
        found: The parameter.
        hook: What zeroes its gradient, where it requires one.
        is_again: Whether the same parameter was planned already, under another of its names.
    """

    frozen: FrozenParameters
    name: str
    held: FrozenParameter
    holder: Mapping[str, Any]
    key: str
    found: Tensor
    hook: ZeroFrozenGradient | None
    is_again: bool


@dataclass(slots=True)
class Plan:
    """Everything that a batch writes.

    Attributes:
        planned: The plain parameters, whose writes were collected.
        seen: Of each: the mapping in which the parameter was found, the key, the parameter, the parameter as it lay in
            memory, and whether it required a gradient.
        sharded: The names of sharded parameters, which are looked at each time.
        writes: The writes into the plain parameters.
        changes: How often each handle's parameters had changed when this was planned.
        is_passing: Whether something stands in a parameter's place for a while alone, so that this serves just once.
    """

    planned: list[Planned] = field(default_factory=list)
    seen: list[tuple[Mapping[str, Any], str, Tensor, Tensor, bool]] = field(default_factory=list)
    sharded: set[str] = field(default_factory=set)
    writes: Writes = field(default_factory=Writes)
    changes: list[tuple[FrozenParameters, int]] = field(default_factory=list)
    is_passing: bool = False

    def is_in_place(self) -> bool:
        """Return whether every parameter is where it was, in the memory that it had."""
        try:
            for holder, key, found, memory, trained in self.seen:
                if holder.get(key) is not found or found.requires_grad is not trained or not found.is_set_to(memory):
                    return False
                if trained and not kept_gradient_hooks(found):  # somebody cleared them
                    return False
        except NotImplementedError:  # on the meta device now
            return False
        return True

    def is_outdated(self) -> bool:
        """Return whether something has changed that concerns all who planned a write."""
        return any(frozen.changes != changes for frozen, changes in self.changes)


class Batch:
    """The frozen parameters of several places, and one write for all of them.

    Every method is given the places, and asks for them where it has to plan; so a batch refers to nobody who holds it.
    """

    def __init__(self) -> None:
        self._plan: Plan | None = None
        self._module: int | None = None

    @property
    def latest(self) -> Plan | None:
        """The plan of the latest write, whether or not something has changed since; None where there is none."""
        return self._plan

    def plan(self, places: Places) -> Plan:
        """Return the plan; a new one where something has changed.

        Raises:
            ParameterChangedError: A parameter is gone, or has another shape.
        """
        plan = self._plan
        if plan is not None and not plan.is_in_place():
            for frozen, _ in plan.changes:
                frozen.changes += 1  # others have planned for the same parameters
        if plan is None or plan.is_outdated():
            with torch.inference_mode(False):  # views that are made inside it cannot be written to outside
                plan = self._planned_anew(list(places()))
            self._plan = None if plan.is_passing else plan
        return plan

    def forget(self) -> None:
        """Plan anew at the next write."""
        self._plan = None

    def _planned_anew(self, places: list[Place]) -> Plan:
        plan = Plan()
        plan.changes = [
            (frozen, frozen.changes) for frozen in {id(place.frozen): place.frozen for place in places}.values()
        ]
        for place in places:
            if place.is_wanted:
                self._add(plan, place)
        return plan

    def _add(self, plan: Plan, place: Place) -> None:
        found = place.own()
        pair = None if found is None else place.adopt(found)
        if found is None or found.is_meta:
            plan.is_passing = True
            return
        if pair is None or pair[0].is_sharded:
            plan.sharded.add(place.name)
        else:
            held = pair[0]
            held.check_shape(found)
            watch_gradient(found, place.frozen, place.name)
            is_again = len(held.names) > 1 and any(each.found is found and each.held is held for each in plan.planned)
            planned, memory = _planned(place, held, found, is_again), found.data
            plan.planned.append(planned)
            plan.seen.append((planned.holder, planned.key, found, memory, found.requires_grad))
            if not is_again:
                held.add_impose(plan.writes, memory)

    def impose(self, places: Places) -> Plan:
        """Write all values, and renew gradient hooks that were lost."""
        plan = self.plan(places)
        plan.writes.run()
        for held, parameter in self._sharded(plan, places):
            held.impose(parameter)
        return plan

    def impose_before(self, module: nn.Module, places: Places) -> Plan:
        """Write all values before a module's forward, or before it is saved."""
        self._meet(module)
        self.forget_gradients()
        return self.impose(places)

    def impose_after(self, module: nn.Module, buffers: list[Place]) -> None:
        """Write all values into buffers after a module's forward, also into those it has put in place of others."""
        self._meet(module)
        for place in buffers:
            place.take_over()
        self.impose(lambda: buffers)

    def _meet(self, module: nn.Module) -> None:
        if self._module != id(module):  # the hooks may be shared with another module
            self._plan, self._module = None, id(module)

    def clean_gradients(self, places: Places, *, trusting: bool = False) -> None:
        """Make every gradient +0.0 at the frozen entries.

        Args:
            places: The places.
            trusting: Whether to pass over gradients that autograd says nobody wrote to since they were cleaned.
        """
        plan, writes = self.plan(places), Writes()
        for planned in plan.planned:
            hook, parameter = planned.hook, planned.found
            if not (planned.is_again or (trusting and hook is not None and hook.is_clean(parameter.grad))):
                planned.held.complete_gradient(planned.found)
                planned.held.add_zero_gradient(writes, planned.found)
        for held, parameter in self._sharded(plan, places):
            held.add_zero_gradient(writes, parameter)
        writes.run()

    def forget_gradients(self) -> None:
        """Let go of the gradients that are known to be clean."""
        for planned in self._plan.planned if self._plan is not None else ():
            if planned.hook is not None:
                planned.hook.cleaned = None

    def pairs(self, places: Places) -> Iterator[tuple[FrozenParameter, Tensor]]:
        """Pair each frozen parameter with the tensor to write to."""
        plan = self.plan(places)
        yield from ((planned.held, planned.found) for planned in plan.planned if not planned.is_again)
        yield from self._sharded(plan, places)

    def _sharded(self, plan: Plan, places: Places) -> Iterator[tuple[FrozenParameter, Tensor]]:
        for place in places() if plan.sharded else ():
            pair = place.pair() if place.is_wanted and place.name in plan.sharded else None
            if pair is not None:
                watch_gradient(pair[1], place.frozen, place.name)
                yield pair

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_plan": None}


def _planned(place: Place, held: FrozenParameter, found: Tensor, is_again: bool) -> Planned:
    holder, key = place.site.holder, place.site.key
    key = key if holder.get(key) is found else f"{key}_orig"  # where it was pruned
    hook = gradient_hook(found, place.frozen, place.name)
    return Planned(place.frozen, place.name, held, holder, key, found, hook, is_again)


# --------------------------------------------------------------------------------------------------------------------
# Running calls


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


def covered_by(plan: Plan, holders: Mapping[Hashable, Sequence[Mapping[str, Any]]]) -> Covered:
    """Return what of a plan each hook set holds.

    Args:
        plan: The plan.
        holders: Of each hook set, where it finds its parameters.
    """
    by_holder: dict[int, list[_Covered]] = {}
    for number, each in enumerate(plan.planned):
        covered = _Covered(each.holder, each.key, each.found, number)
        by_holder.setdefault(id(each.holder), []).append(covered)
    found = {hooks: [each for one in own for each in by_holder.get(id(one), ())] for hooks, own in holders.items()}
    return {hooks: covered for hooks, covered in found.items() if covered}


def begin_call(by: object, covered: Covered, plan: Plan) -> None:
    """Say that all that was planned is written, until `end_call`.

    Args:
        by: Whose call it is.
        covered: What `covered_by` returned.
        plan: What was written.
    """
    end_call(by)  # of a call that was broken off from outside, as by a key
    _calls.running.append(_Call(by, covered, [each.found._version for each in plan.planned]))


def end_call(by: object) -> None:
    """Say that the call is over, and all that began inside it."""
    running = _calls.running
    for n, call in enumerate(running):
        if call.by is by:
            del running[n:]
            return


def end_calls() -> None:
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
