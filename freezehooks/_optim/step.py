"""The hooks on an optimizer: clean gradients before each step, imposed values after it, and state to match."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .._errors import ParameterChangedError
from .._held.held import HeldParameters
from .._held.parameter import FrozenParameter
from .._held.place import Place
from .._hooks.batch import Batch, Places, Plan, end_calls
from .._hooks.moment import Moment
from .._ranks.agreement import has_process_group
from .._torch import call_first
from .calls import calls_hooks, check_step, current_step
from .compact import Compact, check_spread
from .elementwise import is_elementwise
from .flat_parameter import constraints_of
from .state import impose_on_weights, may_keep_weights, reset_frozen_state, reset_frozen_state_, reset_history
from .state_dict import check_in_plain_shapes, read_state_dict
from .thawed import ThawedEntries, corrects_bias


class StepHooks:
    """The hooks on one optimizer, which hold the entries of every handle that guards it.

    They are registered on the optimizer, and refer to it weakly.

    Attributes:
        members: The parameters of each handle that guards the optimizer.
        compact: The compact mode of the optimizer, or None if it steps whole parameters.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.members: list[HeldParameters] = []
        self.compact: Compact | None = None
        self._handles: list[RemovableHandle] = []
        self._batch = Batch()
        self._whole = Batch()
        self._converted: Plan | None = None
        self._looked: Plan | None = None
        self._held: dict[Tensor, list[FrozenParameter]] = {}
        self._thawed: list[ThawedEntries] = []
        self._params: list[list[Tensor]] = []
        self._stepped: set[int] = set()
        self._is_behind = False
        self._was_loaded = False
        self._checked_step = 0
        self._is_elementwise = is_elementwise(optimizer)
        self._keeps_weights = may_keep_weights(optimizer)
        self._corrects_bias = corrects_bias(optimizer)

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer, or None if it is gone."""
        return self._optimizer()

    @property
    def nbytes(self) -> int:
        """The memory that compact mode takes between steps, in bytes, beside the optimizer's state."""
        return 0 if self.compact is None else self.compact.nbytes

    @property
    def is_just_loaded(self) -> bool:
        """Whether the optimizer's state was loaded, with no step since."""
        optimizer = self.optimizer
        return self._was_loaded and optimizer is not None and bool(optimizer.state)

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to guard: the optimizer is gone with its hooks.

        The hooks of a wrapper may be registered on the optimizer inside it, and outlive the wrapper.
        """
        return self.optimizer is None and all(handle.hooks_dict_ref() is None for handle in self._handles)

    @property
    def is_alive(self) -> bool:
        """Whether the optimizer still exists, has all of the hooks, and has a step that calls them."""
        optimizer = self.optimizer
        if optimizer is None or not self._handles:
            return False
        return calls_hooks(current_step(optimizer)) and all(moment.is_called(optimizer, self) for moment in MOMENTS)

    def check(self) -> None:
        """Raise if the step was replaced by one that calls no hooks since the optimizer was guarded.

        Raises:
            UnguardedError: It was replaced.
        """
        optimizer = self.optimizer
        if optimizer is not None and self._handles and self.members:
            step = current_step(optimizer)
            if id(step) != self._checked_step:
                check_step(optimizer, step)
                self._checked_step = id(step)  # only the id: a bound method would keep the optimizer alive

    # Members

    def join(self, held: HeldParameters, *, compact: bool = False) -> None:
        """Hold the entries of a handle through every step from now on.

        Raises:
            StateMismatchError: The optimizer's state does not have the shapes of its parameters; nothing is changed.
        """
        optimizer = self.optimizer
        if optimizer is None:
            return
        is_new = not any(member.frozen is held.frozen for member in self.members)
        before = self.compact
        if is_new:
            self.members.append(held)
            self._forget()
        if compact and self.compact is None:
            self.compact = Compact()
        if is_new or self.compact is not before:
            try:
                self.reset(optimizer)
            except Exception:
                self.compact = before
                if is_new:
                    self.members.remove(held)
                self._forget()
                raise
        self._install(optimizer)
        guards = held.frozen.guards
        guards[:] = [each for each in guards if each() not in (None, self)]
        guards.append(weakref.ref(self))

    def leave(self, held: HeldParameters) -> None:
        """Stop holding the entries of a handle, and remove the hooks after the last one.

        After a thaw the hooks stay a little longer, to correct second moments. Entries that the handle goes on to hold
        without this optimizer are not thawed.
        """
        optimizer = self.optimizer
        self._look_for_thawed(optimizer)
        self.members = [member for member in self.members if member.frozen is not held.frozen]
        self._forget()
        self._held = self._frozen_parameters(optimizer)
        if self.compact is not None and optimizer is not None:
            self.compact.interrupt()
            if self.members:
                self.reset(optimizer)
            else:
                self.compact.remove(optimizer)
        if not self.members:
            self.compact = None
            if not self._thawed:
                self._uninstall()

    def uninstall_if_unused(self) -> None:
        """Remove the hooks, and stop correcting the moments of thawed entries, if no handle guards the optimizer."""
        if not self.members:
            self._thawed = []
            self._uninstall()

    def leave_released(self) -> None:
        """Drop every handle that holds nothing now."""
        for member in list(self.members):
            if not any(map(member.frozen.is_held, member.frozen.by_name)):
                self.leave(member)

    def _install(self, optimizer: Optimizer) -> None:
        if not all(moment.is_called(optimizer, self) for moment in MOMENTS):  # some may have been stripped
            self._uninstall()
            self._handles = [moment.put_on(optimizer, self) for moment in MOMENTS]
            self._checked_step = id(current_step(optimizer))

    def _uninstall(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _forget(self) -> None:
        self._batch.forget()
        self._whole.forget()
        self._converted = None

    # Parameters

    def _places(self) -> Iterator[Place]:
        """Yield the places of all frozen parameters; the wanted ones are those that the optimizer steps."""
        return self._places_of(self._is_stepped)

    def _whole_places(self) -> Iterator[Place]:
        """Yield the same places; the wanted ones are those that the optimizer steps whole."""
        return self._places_of(self._is_stepped_whole)

    def _places_of(self, is_wanted: Callable[[Tensor], bool]) -> Iterator[Place]:
        for member in self.members:
            for name, site in member.known_sites():
                pair = Place(member.frozen, name, site).pair() if member.frozen.is_held(name) else None
                yield Place(member.frozen, name, site, is_wanted=pair is not None and is_wanted(pair[1]))

    def _is_stepped(self, parameter: Tensor) -> bool:
        return id(parameter) in self._stepped

    def _is_stepped_whole(self, parameter: Tensor) -> bool:
        return self._is_stepped(parameter) and not (self.compact is not None and self.compact.steps(parameter))

    def _look_at_groups(self, optimizer: Optimizer) -> None:
        """Update the set of parameters that the optimizer steps if its groups have changed."""
        params, seen = [group["params"] for group in optimizer.param_groups], self._params
        if len(params) != len(seen) or not all(map(_are_same, params, seen)):
            self._params = [list(each) for each in params]
            self._stepped = {id(parameter) for each in params for parameter in each}
            self._forget()

    def pairs(self, optimizer: Optimizer) -> list[tuple[FrozenParameter, Tensor]]:
        """Return each frozen parameter that the optimizer steps, with its tensor."""
        self._look_at_groups(optimizer)
        return list(self._batch.pairs(self._places))

    # Steps

    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Clean the gradients once more, since a reducer or the user may have written to them, and wrap the closure.

        In compact mode a proxy steps instead of the optimizer, and reads only the gradients of free entries.

        Raises:
            ParameterChangedError: A module that owned frozen parameters is no longer in its model.
        """
        if not torch.compiler.is_compiling():
            self._was_loaded = False
            end_calls()
            for member in self.members:
                member.check_modules()
        self._look_at_groups(optimizer)
        if self.compact is not None and args[0] is optimizer:
            self._convert(optimizer)
            args = (self.compact.begin_step(optimizer), *args[1:])
            _keep_stepping(optimizer, args[0])
        self._clean_gradients(optimizer)
        if self._batch.latest is not self._looked:
            self._look_for_thawed(optimizer)
        if len(args) > 1 and callable(args[1]):
            return (args[0], self._guarded(args[1], optimizer), *args[2:]), kwargs
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._guarded(kwargs["closure"], optimizer)}
        self._begin_thawed(optimizer)
        return args, kwargs

    def _convert(self, optimizer: Optimizer) -> None:
        """Convert the state to flat tensors if what is frozen has changed, or the state was replaced."""
        plan = self._batch.plan(self._places)
        if self.compact is not None and (plan is not self._converted or not self.compact.is_current(optimizer)):
            self.compact.interrupt()
            held = self.pairs(optimizer)
            check_spread(optimizer, held)
            with torch.inference_mode(False):  # memory made in inference mode cannot be written to outside it
                self.compact.convert(optimizer, held)
            self._whole.forget()
            self._converted = plan

    def _clean_gradients(self, optimizer: Optimizer) -> None:
        if torch.compiler.is_compiling():
            for frozen, parameter in self._compiled_pairs():
                frozen.complete_gradient(parameter)
                frozen.zero_gradient(parameter)
            return
        # In an elementwise optimizer, a write to a gradient that the version counter missed can only spoil the moments
        # of frozen entries, which are imposed after the step in any case.
        trusting = self._is_elementwise and not has_process_group()
        written, places = self._written()
        written.clean_gradients(places, trusting=trusting)

    def _written(self) -> tuple[Batch, Places]:
        """Return the batch to write around a step, and its places; in compact mode only those stepped whole."""
        return (self._batch, self._places) if self.compact is None else (self._whole, self._whole_places)

    def _guarded(self, closure: Callable[[], Any], optimizer: Optimizer) -> Callable[[], Any]:
        """Wrap a closure so that it sees imposed weights (LBFGS moves them in between) and leaves clean gradients."""

        def guarded_closure() -> Any:
            if self.compact is not None:
                self.compact.before_closure()
            self._impose(optimizer)
            loss = closure()
            self._look_at_groups(optimizer)
            self._clean_gradients(optimizer)
            self._begin_thawed(optimizer)
            if self.compact is not None:
                self.compact.after_closure()
            return loss

        return guarded_closure

    def after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Impose the values on the parameters, and on state that contains weights."""
        if self.compact is not None:
            self.compact.end_step()
            if self._is_behind:  # a closure has frozen or thawed entries
                self._is_behind = False
                self.reset(optimizer)
                self.compact.impose()
        self._look_at_groups(optimizer)
        self._impose(optimizer)
        self._batch.forget_gradients()
        if self._keeps_weights:
            for frozen, parameter, _ in self._with_groups(optimizer):
                impose_on_weights(optimizer, frozen, parameter)
        if self._thawed:
            self._end_thawed(optimizer)

    def _impose(self, optimizer: Optimizer) -> None:
        if torch.compiler.is_compiling():
            for frozen, parameter in self._compiled_pairs():
                frozen.impose(parameter)
        else:
            written, places = self._written()
            written.impose(places)

    def impose(self) -> None:
        """Impose on all parameters that the optimizer steps, after a wrapper around it may have written to them."""
        optimizer = self.optimizer
        if optimizer is not None and self.members:
            self._impose(optimizer)
            if self.compact is not None:
                self.compact.impose()

    def _compiled_pairs(self) -> Iterator[tuple[FrozenParameter, Tensor]]:
        """Yield what a batch would write, for compiled code, which writes one after the other."""
        for member in self.members:
            for frozen, parameter in member:
                if member.frozen.is_held(frozen.name) and self._is_stepped_whole(parameter):
                    yield frozen, parameter

    # Thawed entries

    def _look_for_thawed(self, optimizer: Optimizer | None) -> None:
        """Find the entries that were thawed, or frozen again, since the last call, however that was done."""
        if optimizer is None or not self._corrects_bias or torch.compiler.is_compiling():
            return
        before, self._held = self._held, self._frozen_parameters(optimizer)
        self._looked = self._batch.latest
        for thawed in self._thawed:
            thawed.keep_free(self._held.get(thawed.parameter, []))
        for parameter, frozen in before.items():
            now = self._held.get(parameter, [])
            has_moments = self._is_stepped(parameter) and bool(optimizer.state.get(parameter))
            if has_moments and constraints_of(frozen) != constraints_of(now):  # moments loaded later stay as they are
                self._thawed.append(ThawedEntries(parameter, frozen, now))

    def _frozen_parameters(self, optimizer: Optimizer | None) -> dict[Tensor, list[FrozenParameter]]:
        """Return what is frozen in each parameter that the optimizer steps; nothing if moments need no correction."""
        found: dict[Tensor, list[FrozenParameter]] = {}
        for frozen, parameter in self.pairs(optimizer) if optimizer is not None and self._corrects_bias else ():
            found.setdefault(parameter, []).append(frozen)
        return found

    def _begin_thawed(self, optimizer: Optimizer) -> None:
        """Correct the second moments of thawed entries by the gradients of the coming step."""
        if self._thawed and not self._is_behind and not torch.compiler.is_compiling():
            groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
            for thawed in self._thawed:
                if id(thawed.parameter) in groups:
                    order = None if self.compact is None else self.compact.order_of(thawed.parameter)
                    thawed.begin_step(optimizer, groups[id(thawed.parameter)], order)

    def _end_thawed(self, optimizer: Optimizer) -> None:
        self._thawed = [each for each in self._thawed if not each.is_over and self._is_stepped(each.parameter)]
        is_alone = len(optimizer._optimizer_step_post_hooks) == 1  # type: ignore[attr-defined]  # undeclared
        if not self._thawed and not self.members and is_alone:  # torch is walking through these hooks
            self._uninstall()

    # State

    def _with_groups(self, optimizer: Optimizer) -> Iterator[tuple[FrozenParameter, Tensor, dict[str, Any]]]:
        """Yield each frozen parameter that is stepped whole, with its tensor and its group."""
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        for frozen, parameter in self.pairs(optimizer):
            if self._is_stepped_whole(parameter):
                yield frozen, parameter, groups[id(parameter)]

    def reset(self, optimizer: Optimizer | None = None) -> None:
        """Reset the optimizer's state at the frozen entries to what it would be if they had never moved.

        In compact mode, entries that are frozen or thawed by a closure take effect at the end of the running step.
        """
        optimizer = self.optimizer if optimizer is None else optimizer
        if optimizer is None:
            return
        self._look_at_groups(optimizer)
        if self.compact is not None:
            self._is_behind = self.compact.is_stepping
            if not self._is_behind:
                self._converted = None
                self._convert(optimizer)
        held = list(self._with_groups(optimizer))
        for frozen, parameter, group in held:
            reset_frozen_state(optimizer, frozen, parameter, group)
        if self.compact is None:
            reset_history(optimizer, [(frozen, parameter) for frozen, parameter, _ in held])
        self._look_for_thawed(optimizer)  # entries thawed before the next step count as held until then

    def before_loading(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Convert a state dict to whole tensors before it is loaded, or reject it."""
        whole = read_state_dict(optimizer, state_dict)
        if self.compact is not None:
            check_in_plain_shapes(optimizer, whole)
        return whole

    def after_loading(self, optimizer: Optimizer) -> None:
        """Bring a loaded state into line with what is frozen."""
        if self.compact is not None:
            self.compact.interrupt()
        self.reset(optimizer)
        self._was_loaded = True

    def before_saving(self, optimizer: Optimizer) -> None:
        """Reset the state at frozen entries, where coupled weight decay, for instance, leaves something.

        So the saved state is the same whether the run was resumed or not, and it moves no entry when loaded into an
        unfrozen run.
        """
        with suppress(ParameterChangedError):  # a parameter that is gone has no state to reset
            self._look_at_groups(optimizer)
            for frozen, parameter, group in self._with_groups(optimizer):
                reset_frozen_state_(optimizer, frozen, parameter, group)

    def after_saving(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the state dict to save, which is whole unless a compact one was asked for."""
        return state_dict if self.compact is None else self.compact.saved(optimizer, state_dict)


def _are_same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(operator.is_, first, second))


class _LastBeforeStep:
    """Replaces the last step-pre-hook for one step, to make sure that the proxy steps, whatever the hooks return.

    A hook may return the optimizer that it was called with among its arguments.
    """

    def __init__(self, hook: Callable[..., Any], hooks: dict[int, Any], key: int, proxy: Any) -> None:
        self.hook = hook
        self._hooks = hooks
        self._key = key
        self._proxy = proxy

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        self._hooks[self._key] = self.hook  # torch is iterating over the hooks: values may change, keys may not
        result = self.hook(optimizer, args, kwargs)
        is_pair = isinstance(result, tuple) and len(result) == 2
        args, kwargs = result if is_pair else (args, kwargs)
        if (result is None or is_pair) and args and args[0] is optimizer:
            return (self._proxy, *args[1:]), kwargs
        return result


def _keep_stepping(optimizer: Optimizer, proxy: Any) -> None:
    """Make sure that the proxy steps even if a later hook returns the optimizer itself."""
    hooks: dict[int, Any] = optimizer._optimizer_step_pre_hooks  # type: ignore[attr-defined]  # undeclared
    key, last = next(reversed(hooks.items()))
    last = last.hook if isinstance(last, _LastBeforeStep) else last  # left over if a hook failed in the last step
    if not isinstance(getattr(last, "__self__", None), StepHooks):
        hooks[key] = _LastBeforeStep(last, hooks, key, proxy)


def _first_after_step(optimizer: Optimizer, hook: Any) -> RemovableHandle:
    # it goes first, so that all other hooks see the values
    handle = optimizer.register_step_post_hook(hook)
    call_first(optimizer._optimizer_step_post_hooks, handle.id)
    return handle


def _first_after_saving(optimizer: Optimizer, hook: Any) -> RemovableHandle:
    # it goes first, so that all other hooks see a whole state
    return optimizer.register_state_dict_post_hook(hook, prepend=True)


def _first_after_loading(optimizer: Optimizer, hook: Any) -> RemovableHandle:
    return optimizer.register_load_state_dict_post_hook(hook, prepend=True)


MOMENTS: Final = (
    Moment("after_step", _first_after_step, "_optimizer_step_post_hooks"),
    Moment("before_step", Optimizer.register_step_pre_hook, "_optimizer_step_pre_hooks"),
    Moment("before_loading", Optimizer.register_load_state_dict_pre_hook, "_optimizer_load_state_dict_pre_hooks"),
    Moment("after_loading", _first_after_loading, "_optimizer_load_state_dict_post_hooks"),
    Moment("before_saving", Optimizer.register_state_dict_pre_hook, "_optimizer_state_dict_pre_hooks"),
    Moment("after_saving", _first_after_saving, "_optimizer_state_dict_post_hooks"),
)


def step_hooks_on(optimizer: Optimizer) -> StepHooks | None:
    """Return the step hooks on an optimizer, or None if nothing guards it."""
    for moment in MOMENTS:
        for hook in getattr(optimizer, moment.kept, {}).values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, StepHooks) and owner.optimizer is optimizer:  # a wrapper may share the dicts of hooks
                return owner
    return None


def is_compact(optimizer: Optimizer) -> bool:
    """Return whether an optimizer is in compact mode."""
    hooks = step_hooks_on(optimizer)
    return hooks is not None and hooks.compact is not None


def compact_state_dict(optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimizer's state dict, in compact mode with flat tensors of the free entries."""
    hooks = step_hooks_on(optimizer)
    return optimizer.state_dict() if hooks is None or hooks.compact is None else hooks.compact.state_dict(optimizer)
