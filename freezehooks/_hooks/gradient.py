"""When a gradient comes: parameters note it, and one write at the end of the backward pass cleans all of them."""

from __future__ import annotations

import weakref
from typing import Any, Final

import torch
from torch import Tensor

from .._entries.entry_set import Masked
from .._entries.writes import Writes
from .._held.parameter import FrozenParameter
from .._held.parameters import FrozenParameters
from .._held.tied import TiedEntries
from .._ranks.agreement import is_distributed
from .._ranks.sharding import is_sharded
from .._torch import (
    TensorIdentity,
    at_end_of_backward,
    gradient_hooks,
    graph_task_id,
    reconnect_hooks,
    tensor_hooks,
)

_WORTH_A_LOOK: Final = 1 << 15
"""From so many entries on, to see that a gradient is clean still is quicker than to clean it again."""


class _BackwardPass:
    """The parameters whose gradients came in one backward pass; called at its end, it cleans all of them at once.

    The pass alone holds it. A pass that fails lets go of what it noted.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.noted: list[tuple[ZeroFrozenGradient, Tensor]] = []

    def __call__(self) -> None:
        noted, self.noted = self.noted, []
        writes = Writes()
        for hook, parameter in noted:
            hook.add_to(writes, parameter)
        writes.run()
        for hook, parameter in noted:
            hook.remember(parameter)


class _Passes:
    """Finds the backward pass that is running."""

    def __init__(self) -> None:
        self._latest: weakref.ref[_BackwardPass] | None = None

    def running(self) -> _BackwardPass | None:
        """Return the pass at whose end gradients may be cleaned, or None where each has to be cleaned at once."""
        number = graph_task_id()
        found = None if self._latest is None else self._latest()
        if found is not None and found.number == number:
            return found
        # several ranks reduce gradients before the pass ends, and some ways to do it mix entries
        if number < 0 or torch.compiler.is_compiling() or is_distributed():
            return None
        found = _BackwardPass(number)
        self._latest = weakref.ref(found)  # a pass of another thread has its own, or asks for another call
        at_end_of_backward(found)
        return found


_passes: Final = _Passes()


class ZeroFrozenGradient:
    """After a gradient was accumulated: make it +0.0 at the frozen entries, at the end of the backward pass.

    Attributes:
        frozen: What the handle froze.
        name: The parameter's name there.
    """

    def __init__(self, frozen: FrozenParameters, name: str) -> None:
        self.frozen = frozen
        self.name = name
        self._connected: TensorIdentity | None = None
        self._cleaned: tuple[TensorIdentity, int] | None = None

    def __call__(self, parameter: Tensor) -> None:
        # a hook behind this one looks at the gradient, or steps and drops it, before the pass ends
        running = _passes.running() if len(gradient_hooks(parameter)) == 1 else None
        if running is not None:
            running.noted.append((self, parameter))
            return
        self.clean(parameter)
        if is_distributed() and not is_sharded(parameter):
            _clean_after_reducer(self, parameter)

    def clean(self, parameter: Tensor) -> None:
        """Make the gradient clean now."""
        writes = Writes()
        self.add_to(writes, parameter)
        writes.run()
        self.remember(parameter)

    def add_to(self, writes: Writes, parameter: Tensor) -> None:
        """Add to `writes` what makes the gradient clean."""
        self._cleaned = None
        frozen = self.frozen.get(self.name)  # None where it was thawed meanwhile
        if frozen is not None:
            frozen.add_zero_gradient(writes, parameter)

    def remember(self, parameter: Tensor) -> None:
        """Note by what to know a large gradient that was just cleaned, where cleaning is a pass over all of it."""
        gradient, frozen = parameter.grad, self.frozen.get(self.name)
        if gradient is None or frozen is None or gradient.numel() < _WORTH_A_LOOK or torch.compiler.is_compiling():
            return
        if _is_one_mask(frozen) and not gradient.is_inference() and not is_sharded(gradient):
            self._cleaned = TensorIdentity(gradient), gradient._version

    def is_clean(self, parameter: Tensor) -> bool:
        """Return whether the gradient is one that nobody wrote to since it was cleaned, as far as autograd counts.

        Writes through `.data` and those of a reducer are not counted.
        """
        if self._cleaned is None or parameter.grad is None:
            return False
        identity, version = self._cleaned
        return identity.is_of(parameter.grad) and parameter.grad._version == version

    def connect(self, parameter: Tensor) -> None:
        """Make sure that autograd calls the parameter's hooks, also where the tensor was swapped.

        Not at each forward: a backward pass in another thread may be calling the lists that this sets anew.
        """
        if self._connected is None or is_sharded(parameter) or not self._connected.is_of(parameter):
            reconnect_hooks(parameter)
            self._connected = None if is_sharded(parameter) else TensorIdentity(parameter)


def _is_one_mask(frozen: FrozenParameter) -> bool:
    return all(isinstance(constraint.entries, Masked) for constraint in frozen.constraints)


def _clean_after_reducer(hook: ZeroFrozenGradient, parameter: Tensor) -> None:
    """Clean once more before `backward()` returns: some ways to compress gradients give back what was not there.

    DistributedDataParallel reduces gradients after their hooks, and takes the result over in a callback at the end of
    backward. A callback that was queued by a callback comes after that.
    """
    if graph_task_id() >= 0:
        at_end_of_backward(lambda: at_end_of_backward(lambda: hook.clean(parameter)))


class SumTiedGradient:
    """Before a gradient is accumulated: sum it over the copies. After would be too late for a second accumulation."""

    __torch_unserializable__ = True  # the model's own hooks put it on again: no warning that it is left behind

    def __init__(self, frozen: FrozenParameters, name: str, tie: TiedEntries) -> None:
        self.frozen = frozen
        self.name = name
        self.tie = tie

    def __call__(self, gradient: Tensor) -> Tensor:
        return self.tie.summed(gradient)


# --------------------------------------------------------------------------------------------------------------------
# On a parameter


def watch_gradient(parameter: Tensor, frozen: FrozenParameters, name: str) -> None:
    """Make sure the parameter's gradient is zeroed, by the first of its hooks, and summed over tied copies.

    A tensor's hooks are lost on deepcopy, pickle, `load_state_dict(assign=True)` and swapped parameters, so this is
    asked again wherever the parameter is not where it was; but not in a compiled frame, which cannot register hooks.
    """
    if not parameter.requires_grad or torch.compiler.is_compiling():
        return
    hook = gradient_hook(parameter, frozen, name)
    if hook is None:
        hook = ZeroFrozenGradient(frozen, name)
        others = dict(gradient_hooks(parameter))
        parameter.register_post_accumulate_grad_hook(hook)
        # First of all: a hook that logs the gradient, or steps in backward, sees the clean one. Put in again behind
        # it, because the engine goes by the order of insertion and not by OrderedDict.move_to_end.
        for hook_id in others:
            del gradient_hooks(parameter)[hook_id]
        gradient_hooks(parameter).update(others)
    for tie in frozen[name].ties:
        if not _is_summed(parameter, tie):
            parameter.register_hook(SumTiedGradient(frozen, name, tie))
    hook.connect(parameter)


def unwatch_gradient(parameter: Tensor, frozen: FrozenParameters, name: str) -> None:
    """Take the hooks of `watch_gradient` off again."""
    for hooks in (gradient_hooks(parameter), tensor_hooks(parameter)):
        for hook_id in [n for n, hook in hooks.items() if _is_of(hook, frozen, name)]:
            del hooks[hook_id]


def is_watched(parameter: Tensor, frozen: FrozenParameters, name: str) -> bool:
    """Return whether the parameter's gradient is zeroed, and summed over tied copies.

    It changes nothing: another thread may look while a backward pass calls the hooks.
    """
    is_zeroed = gradient_hook(parameter, frozen, name) is not None
    return is_zeroed and all(_is_summed(parameter, tie) for tie in frozen[name].ties)


def gradient_hook(parameter: Tensor, frozen: FrozenParameters, name: str) -> ZeroFrozenGradient | None:
    """Return the hook that zeroes the parameter's gradient, or None where there is none."""
    for hook in gradient_hooks(parameter).values():
        if isinstance(hook, ZeroFrozenGradient) and _is_of(hook, frozen, name):
            return hook
    return None


def watching(parameter: Tensor) -> list[FrozenParameter]:
    """Return what every handle freezes of a parameter that requires a gradient."""
    hooks = [hook for hook in gradient_hooks(parameter).values() if isinstance(hook, ZeroFrozenGradient)]
    return [hook.frozen[hook.name] for hook in hooks if hook.name in hook.frozen]


def _is_summed(parameter: Tensor, tie: TiedEntries) -> bool:
    """Return whether some handle, of two that tie the parameter, already sums the gradient."""
    hooks = tensor_hooks(parameter).values()
    return any(isinstance(hook, SumTiedGradient) and hook.tie.dim == tie.dim for hook in hooks)


def _is_of(hook: Any, frozen: FrozenParameters, name: str) -> bool:
    if not isinstance(hook, ZeroFrozenGradient | SumTiedGradient):
        return False
    return hook.frozen is frozen and hook.name == name
