"""Batched writes: one for all frozen parameters of a module, planned once and reused until something changes.

A module that contains others writes for all of them before its forward. While that call runs, the hooks of the inner
modules see that the values are in place, and do not write again.
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
    """What is written into one parameter.

    It refers to no module: the module's hooks refer to it, and a reference cycle would keep both alive.

    Attributes:
        frozen: The frozen parameters of the handle.
        name: The parameter's name in `frozen`.
        held: The frozen parameter that had that name when this was planned.
        holder: The mapping that contains the parameter.
        key: The parameter's key in `holder`.
        found: The parameter.
        hook: The hook that zeroes its gradient, or None if it requires none.
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
        seen: For each of them: the mapping that contains it, its key, the parameter, an alias of its memory, and
            whether it required a gradient.
        sharded: The names of sharded parameters, which are looked up each time.
        writes: The writes into the plain parameters.
        changes: The counter of changes of each handle's parameters when this was planned.
        is_passing: Whether a parameter was swapped out temporarily, so that the plan can be used only once.
    """

    planned: list[Planned] = field(default_factory=list)
    seen: list[tuple[Mapping[str, Any], str, Tensor, Tensor, bool]] = field(default_factory=list)
    sharded: set[str] = field(default_factory=set)
    writes: Writes = field(default_factory=Writes)
    changes: list[tuple[FrozenParameters, int]] = field(default_factory=list)
    is_passing: bool = False

    def is_in_place(self) -> bool:
        """Return whether every parameter is still at its site and in the same memory."""
        try:
            for holder, key, found, memory, trained in self.seen:
                if holder.get(key) is not found or found.requires_grad is not trained or not found.is_set_to(memory):
                    return False
                if trained and not kept_gradient_hooks(found):  # someone cleared them
                    return False
        except NotImplementedError:  # the parameter is on the meta device now
            return False
        return True

    def is_outdated(self) -> bool:
        """Return whether any handle's parameters have changed since the plan was made."""
        return any(frozen.changes != changes for frozen, changes in self.changes)


class Batch:
    """One write for the frozen parameters at several places.

    Every method takes a function that returns the places, and calls it only to plan. So a batch needs no reference to
    the module or the optimizer that uses it.
    """

    def __init__(self) -> None:
        self._plan: Plan | None = None
        self._module: int | None = None

    @property
    def latest(self) -> Plan | None:
        """The plan of the latest write, even if something has changed since; None before the first."""
        return self._plan

    def plan(self, places: Places) -> Plan:
        """Return the plan, or make a new one if something has changed.

        Raises:
            ParameterChangedError: A parameter is gone, or has another shape.
        """
        plan = self._plan
        if plan is not None and not plan.is_in_place():
            for frozen, _ in plan.changes:
                frozen.changes += 1  # other batches have plans for the same parameters
        if plan is None or plan.is_outdated():
            with torch.inference_mode(False):  # views made in inference mode cannot be written to outside it
                plan = self._planned_anew(list(places()))
            self._plan = None if plan.is_passing else plan
        return plan

    def forget(self) -> None:
        """Make a new plan at the next write."""
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
        """Write all values, and reinstall gradient hooks that were lost."""
        plan = self.plan(places)
        plan.writes.run()
        for held, parameter in self._sharded(plan, places):
            held.impose(parameter)
        return plan

    def impose_before(self, module: nn.Module, places: Places) -> Plan:
        """Write all values before a module's forward, or before it is saved."""
        self._use_for(module)
        self.forget_gradients()
        return self.impose(places)

    def impose_after(self, module: nn.Module, buffers: list[Place]) -> None:
        """Write all values into buffers after a module's forward, including buffers that the forward assigned."""
        self._use_for(module)
        for place in buffers:
            place.accept_assigned()
        self.impose(lambda: buffers)

    def _use_for(self, module: nn.Module) -> None:
        if self._module != id(module):  # a shallow copy of a module shares its hooks
            self._plan, self._module = None, id(module)

    def clean_gradients(self, places: Places, *, trusting: bool = False) -> None:
        """Make every gradient +0.0 at the frozen entries.

        Args:
            places: The places.
            trusting: Whether to skip gradients whose version counter has not moved since they were cleaned.
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
        """Drop the references to gradients that were cleaned."""
        for planned in self._plan.planned if self._plan is not None else ():
            if planned.hook is not None:
                planned.hook.cleaned = None

    def pairs(self, places: Places) -> Iterator[tuple[FrozenParameter, Tensor]]:
        """Yield each frozen parameter with the tensor to write to."""
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
    key = key if holder.get(key) is found else f"{key}_orig"  # torch.nn.utils.prune has renamed it
    hook = gradient_hook(found, place.frozen, place.name)
    return Planned(place.frozen, place.name, held, holder, key, found, hook, is_again)


# --------------------------------------------------------------------------------------------------------------------
# Running calls


class _Covered(NamedTuple):
    """A parameter that was written: the mapping that contains it, its key there, and its index in the plan."""

    holder: Mapping[str, Any]
    key: str
    found: Tensor
    number: int


Covered: TypeAlias = "dict[Hashable, list[_Covered]]"
"""The parameters of a plan, by the hook set that holds them."""


class _Call(NamedTuple):
    """A running call of a module that has written the values for all modules inside it."""

    by: object
    covered: Covered
    versions: list[int]


class _Calls(threading.local):
    """The calls that are running in this thread, the outermost first."""

    def __init__(self) -> None:
        self.running: list[_Call] = []


_calls = _Calls()


def covered_by(plan: Plan, holders: Mapping[Hashable, Sequence[Mapping[str, Any]]]) -> Covered:
    """Sort the parameters of a plan by the hook set that holds them.

    Args:
        plan: The plan.
        holders: The mappings in which each hook set finds its parameters.
    """
    by_holder: dict[int, list[_Covered]] = {}
    for number, each in enumerate(plan.planned):
        covered = _Covered(each.holder, each.key, each.found, number)
        by_holder.setdefault(id(each.holder), []).append(covered)
    found = {hooks: [each for one in own for each in by_holder.get(id(one), ())] for hooks, own in holders.items()}
    return {hooks: covered for hooks, covered in found.items() if covered}


def begin_call(by: object, covered: Covered, plan: Plan) -> None:
    """Record that everything in a plan is written, until `end_call`.

    Args:
        by: The object whose call begins.
        covered: What `covered_by` returned.
        plan: The plan that was written.
    """
    end_call(by)  # an earlier call may have been interrupted, for instance by Ctrl-C
    _calls.running.append(_Call(by, covered, [each.found._version for each in plan.planned]))


def end_call(by: object) -> None:
    """Record that a call is over, with all calls that began inside it."""
    running = _calls.running
    for n, call in enumerate(running):
        if call.by is by:
            del running[n:]
            return


def end_calls() -> None:
    """Record that no call is running in this thread."""
    _calls.running.clear()


def is_around(hooks: Iterable[Hashable]) -> bool:
    """Return whether a running call has written the values of all of some hook sets."""
    return any(all(each in call.covered for each in hooks) for call in _calls.running)


def is_covered(hooks: Hashable) -> bool:
    """Return whether a running call has written the values of a hook set, with no other write since.

    Writes are seen by autograd's version counter. A write through `.data` inside a running forward goes unnoticed until
    the next outermost one.
    """
    for _, covered, versions in _calls.running:
        parameters = covered.get(hooks)
        if parameters is not None:
            for holder, key, found, number in parameters:
                if holder.get(key) is not found or found._version != versions[number]:
                    return False
            return True
    return False
