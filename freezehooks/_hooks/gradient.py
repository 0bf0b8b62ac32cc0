"""Gradient hooks: they record parameters, whose gradients one write at the end of the backward pass zeroes.

A gradient is called clean once it is +0.0 at the frozen entries.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._entries.writes import Writes
from .._held.parameter import FrozenParameter
from .._held.parameters import FrozenParameters
from .._held.tied import TiedEntries
from .._ranks.agreement import has_process_group
from .._ranks.sharding import is_sharded
from .._torch import (
    MemoryIdentity,
    TensorIdentity,
    at_end_of_backward,
    gradient_hooks,
    graph_task_id,
    reconnect_hooks,
    tensor_hooks,
)
from .samples import clean_samples, has_samples


class _BackwardPass:
    """The parameters whose gradients came in one backward pass; called at its end, it cleans all of them at once.

    Only the engine refers to it, so that a backward pass that fails frees what was recorded.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.hooks: list[ZeroFrozenGradient] = []
        self.parameters: list[Tensor] = []

    def __call__(self) -> None:
        writes = Writes()
        for hook, parameter in zip(self.hooks, self.parameters, strict=True):
            frozen = hook.frozen.by_name.get(hook.name)  # None if it was thawed meanwhile
            if hook.coming is not None and hook.came_clean(parameter):
                hook.cleaned = parameter.grad
            else:
                hook.cleaned = None if frozen is None else frozen.add_zero_accumulated(writes, parameter)
        writes.run()
        for hook in self.hooks:
            if hook.cleaned is not None:
                hook.version = hook.cleaned._version
        self._look_around()

    def _look_around(self) -> None:
        """Clean per-sample gradients, and check the optimizers that are guarded for these parameters.

        Only the first and the last parameter are examined, which represent one model, or two: examining every
        parameter would take noticeable time.
        """
        ends = (self.hooks[0], self.hooks[-1])
        if any(map(has_samples, (self.parameters[0], self.parameters[-1]))):
            for hook, parameter in zip(self.hooks, self.parameters, strict=True):
                hook.clean_samples(parameter)
        for frozen in {id(hook.frozen): hook.frozen for hook in ends}.values():
            frozen.check_guards()


def _no_pass() -> None:
    return None


_latest: weakref.ref[_BackwardPass] | Callable[[], None] = _no_pass
"""The backward pass that began last. If several threads run one each, a pass may be registered more than once."""


def _running_pass() -> _BackwardPass | None:
    """Return the pass at whose end gradients can be cleaned, or None if each must be cleaned immediately."""
    global _latest
    number, found = graph_task_id(), _latest()
    if found is not None and found.number == number:
        return found
    # DistributedDataParallel, even in one process, copies gradients into its buckets as they come, and back after us
    if number < 0 or torch.compiler.is_compiling() or has_process_group():
        return None
    found = _BackwardPass(number)
    _latest = weakref.ref(found)
    at_end_of_backward(found)
    return found


class ZeroFrozenGradient:
    """After a gradient was accumulated: make it +0.0 at the frozen entries, at the end of the backward pass.

    Attributes:
        frozen: The frozen parameters of the handle.
        name: The parameter's name in `frozen`.
        cleaned: The gradient that was cleaned at the end of the latest backward pass. The next step and the next
            forward forget it, so that it does not keep a dropped gradient in memory.
        version: The version counter of `cleaned` at that time.
        coming: A gradient that the backward of a layer made clean, if nothing was added to it: its memory and version.
    """

    def __init__(self, frozen: FrozenParameters, name: str) -> None:
        self.frozen = frozen
        self.name = name
        self._connected: TensorIdentity | None = None
        self.cleaned: Tensor | None = None
        self.version = 0
        self.coming: tuple[MemoryIdentity, int] | None = None

    def __call__(self, parameter: Tensor) -> None:
        # a later hook may look at the gradient, or step and drop it, before the pass ends
        running = _running_pass() if len(gradient_hooks(parameter)) == 1 else None
        if running is not None:
            running.hooks.append(self)
            running.parameters.append(parameter)
            return
        self.clean(parameter)
        # per-sample gradients are not complete yet; compiled code has none
        if not torch.compiler.is_compiling() and has_samples(parameter) and graph_task_id() >= 0:
            at_end_of_backward(lambda: self.clean_samples(parameter))
        if has_process_group() and not is_sharded(parameter):
            _clean_after_reducer(self, parameter)

    def clean(self, parameter: Tensor) -> None:
        """Clean the gradient now."""
        frozen = self.frozen.by_name.get(self.name)
        if frozen is not None:
            frozen.zero_gradient(parameter)

    def clean_samples(self, parameter: Tensor) -> None:
        """Clean the per-sample gradients of the parameter, if it has any.

        Raises:
            UnsupportedParameterError: Only their norms are there.
        """
        frozen = self.frozen.by_name.get(self.name)
        if frozen is not None:
            clean_samples(parameter, frozen)

    def is_clean(self, gradient: Tensor | None) -> bool:
        """Return whether a gradient is the one that was cleaned, and was not written to since.

        Writes are seen by autograd's version counter, which misses those through `.data` and those of a reducer.
        """
        return gradient is not None and gradient is self.cleaned and gradient._version == self.version

    def came_clean(self, parameter: Tensor) -> bool:
        """Return whether the gradient is the one in `coming`, with nothing added to it, and reset `coming`."""
        coming, self.coming = self.coming, None
        gradient = parameter.grad
        if coming is None or gradient is None or gradient.layout is not torch.strided:
            return False
        return coming[0].is_of(gradient) and coming[1] == gradient._version

    def connect(self, parameter: Tensor) -> None:
        """Make sure that autograd calls the parameter's hooks, even if the tensor was swapped.

        It is not done at every forward: another thread's backward pass may be using the dicts that this reassigns.
        """
        if self._connected is None or is_sharded(parameter) or not self._connected.is_of(parameter):
            reconnect_hooks(parameter)
            self._connected = None if is_sharded(parameter) else TensorIdentity(parameter)


def _clean_after_reducer(hook: ZeroFrozenGradient, parameter: Tensor) -> None:
    """Clean once more before `backward()` returns: lossy gradient compression may turn zeros into other numbers.

    DistributedDataParallel reduces gradients after their hooks, and copies the result back in a callback at the end of
    backward. A callback that is queued by a callback runs after that.
    """
    if graph_task_id() >= 0:
        at_end_of_backward(lambda: at_end_of_backward(lambda: hook.clean(parameter)))


class SumTiedGradient:
    """Before a gradient is accumulated: sum it over the copies. Summing the total would count earlier sums twice."""

    __torch_unserializable__ = True  # no warning when it is not pickled: the model's own hooks reinstall it

    def __init__(self, frozen: FrozenParameters, name: str, tie: TiedEntries) -> None:
        self.frozen = frozen
        self.name = name
        self.tie = tie

    def __call__(self, gradient: Tensor) -> Tensor:
        return self.tie.summed(gradient)


# --------------------------------------------------------------------------------------------------------------------
# On a parameter


def watch_gradient(parameter: Tensor, frozen: FrozenParameters, name: str) -> None:
    """Make sure that the parameter's gradient is zeroed, by the first of its hooks, and summed over tied copies.

    A tensor's hooks are lost on deepcopy, pickle, `load_state_dict(assign=True)` and swapped parameters, so this is
    called again whenever the parameter was replaced or moved; but not in compiled code, which cannot register hooks.
    """
    if not parameter.requires_grad or torch.compiler.is_compiling():
        return
    hook = gradient_hook(parameter, frozen, name)
    if hook is None:
        hook = ZeroFrozenGradient(frozen, name)
        others = dict(gradient_hooks(parameter))
        parameter.register_post_accumulate_grad_hook(hook)
        # It goes first, so that a hook that logs the gradient, or steps in backward, sees the clean one. The others
        # are inserted again after it, because the engine goes by insertion order and not by OrderedDict.move_to_end.
        for hook_id in others:
            del gradient_hooks(parameter)[hook_id]
        gradient_hooks(parameter).update(others)
    for tie in frozen.by_name[name].ties:
        if not _is_summed(parameter, tie):
            parameter.register_hook(SumTiedGradient(frozen, name, tie))
    hook.connect(parameter)


def unwatch_gradient(parameter: Tensor, frozen: FrozenParameters, name: str) -> None:
    """Remove the hooks of `watch_gradient`."""
    for hooks in (gradient_hooks(parameter), tensor_hooks(parameter)):
        for hook_id in [n for n, hook in hooks.items() if _is_of(hook, frozen, name)]:
            del hooks[hook_id]


def is_watched(parameter: Tensor, frozen: FrozenParameters, name: str) -> bool:
    """Return whether the parameter has the hooks of `watch_gradient`.

    It changes nothing, so that it may run while another thread's backward pass calls the hooks.
    """
    is_zeroed = gradient_hook(parameter, frozen, name) is not None
    return is_zeroed and all(_is_summed(parameter, tie) for tie in frozen.by_name[name].ties)


def gradient_hook(parameter: Tensor, frozen: FrozenParameters, name: str) -> ZeroFrozenGradient | None:
    """Return the hook that zeroes the parameter's gradient for a handle, or None."""
    for hook in gradient_hooks(parameter).values():
        if isinstance(hook, ZeroFrozenGradient) and _is_of(hook, frozen, name):
            return hook
    return None


def watching(parameter: Tensor) -> list[FrozenParameter]:
    """Return what every handle freezes in a parameter that requires a gradient."""
    hooks = [hook for hook in gradient_hooks(parameter).values() if isinstance(hook, ZeroFrozenGradient)]
    return [hook.frozen.by_name[hook.name] for hook in hooks if hook.name in hook.frozen.by_name]


def mark_clean(parameter: Tensor, gradient: Tensor) -> None:
    """Record that a gradient about to be accumulated is +0.0 at all frozen entries.

    Args:
        parameter: The parameter.
        gradient: The gradient. Its version counter distinguishes it from a sum in the same memory.
    """
    for hook in gradient_hooks(parameter).values():
        if isinstance(hook, ZeroFrozenGradient):
            hook.coming = MemoryIdentity(gradient), gradient._version


def _is_summed(parameter: Tensor, tie: TiedEntries) -> bool:
    """Return whether a hook already sums the gradient, perhaps that of another handle with the same tie."""
    hooks = tensor_hooks(parameter).values()
    return any(isinstance(hook, SumTiedGradient) and hook.tie.tie == tie.tie for hook in hooks)


def _is_of(hook: Any, frozen: FrozenParameters, name: str) -> bool:
    if not isinstance(hook, ZeroFrozenGradient | SumTiedGradient):
        return False
    return hook.frozen is frozen and hook.name == name
