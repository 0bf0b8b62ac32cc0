"""The hooks that keep frozen entries: each a small object that names its moment and its action.

A hook reaches the parameter through the module it is called with, never through a reference of its own: deepcopy and
pickle take hooks along, and a copy must not write into the original.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.hooks import RemovableHandle

from .._held.names import gone, parameter_of
from .._held.parameter import FrozenPart
from .._held.tied import Tie
from .._ranks.agreement import is_distributed
from .._ranks.sharding import is_sharded, local


class ZeroFrozenGradient:
    """After a gradient was accumulated: make it +0.0 at the frozen entries."""

    def __init__(self, part: FrozenPart) -> None:
        self.part = part
        self._seen: tuple[int, StorageWeakRef] | None = None

    def __call__(self, parameter: Tensor) -> None:
        self.part.zero_gradient(parameter)
        if is_distributed():
            clean_after_reducer(self.part, parameter)

    def make_called(self, parameter: Tensor) -> None:
        """Make sure that the lists of the parameter's hooks are called.

        A swapped tensor (torch.utils.swap_tensors) keeps them and loses the nodes that call them; to set a list anew
        makes one. Not at each forward: a backward pass in another thread may be calling the one that this replaces.
        """
        if self._seen is not None and not is_sharded(parameter):
            number, storage = self._seen
            if number == parameter._cdata and storage.cdata == parameter.untyped_storage()._cdata:
                return
        parameter._post_accumulate_grad_hooks = parameter._post_accumulate_grad_hooks  # type: ignore[attr-defined]
        if self.part.tie is not None:
            parameter._backward_hooks = parameter._backward_hooks
        # the storage tells the tensor from a later one in the same place
        self._seen = None if is_sharded(parameter) else (parameter._cdata, StorageWeakRef(parameter.untyped_storage()))


def clean_after_reducer(part: FrozenPart, parameter: Tensor) -> None:
    """Zero the gradient once more before `backward()` returns: some ways to compress it give back what was not there.

    DistributedDataParallel reduces gradients after their hooks, and takes the result over in a callback at the end of
    backward. A callback that was queued by a callback comes after that.
    """
    queue = torch.autograd.Variable._execution_engine.queue_callback  # type: ignore[attr-defined]
    if not is_sharded(parameter):
        queue(lambda: queue(lambda: part.zero_gradient(parameter)))


class SumTiedGradient:
    """Before a gradient is accumulated: sum it over the copies. After would be too late for a second accumulation."""

    __torch_unserializable__ = True  # the model's own hooks put it on again: no warning that it is left behind

    def __init__(self, part: FrozenPart, tie: Tie) -> None:
        self.part = part
        self.tie = tie

    def __call__(self, gradient: Tensor) -> Tensor:
        return self.tie.summed(gradient)


def watch_gradient(parameter: Tensor, part: FrozenPart) -> None:
    """Make sure the parameter's gradient is zeroed, by the first of its hooks, and summed over tied copies.

    A tensor's hooks are lost on deepcopy, pickle, `load_state_dict(assign=True)` and swapped parameters, so this is
    asked again at every forward and every step; but not in a compiled one, which cannot register hooks.
    """
    if not parameter.requires_grad or torch.compiler.is_compiling():
        return
    hook = _zeroing(parameter, part)
    if hook is None:
        hook = ZeroFrozenGradient(part)
        others = dict(parameter._post_accumulate_grad_hooks or {})  # type: ignore[attr-defined]
        parameter.register_post_accumulate_grad_hook(hook)
        # First of all: a hook that logs the gradient, or steps in backward, sees the clean one. Put in again behind
        # it, because the engine goes by the order of insertion and not by OrderedDict.move_to_end.
        for hook_id in others:
            del parameter._post_accumulate_grad_hooks[hook_id]  # type: ignore[attr-defined]
        parameter._post_accumulate_grad_hooks.update(others)  # type: ignore[attr-defined]
    if part.tie is not None and not _is_summed(parameter, part.tie):
        parameter.register_hook(SumTiedGradient(part, part.tie))
    hook.make_called(parameter)


def unwatch_gradient(parameter: Tensor, part: FrozenPart) -> None:
    """Take the hooks of `watch_gradient` off again."""
    for hook_id in _gradient_hook_ids(parameter, part):
        del parameter._post_accumulate_grad_hooks[hook_id]  # type: ignore[attr-defined]
    summing = parameter._backward_hooks or {}
    for hook_id in [n for n, hook in summing.items() if _is_of(hook, part)]:
        del summing[hook_id]


def is_watched(parameter: Tensor, part: FrozenPart) -> bool:
    """Return whether the parameter's gradient is zeroed, and summed over tied copies.

    It changes nothing: another thread may look while a backward pass calls the hooks.
    """
    return _zeroing(parameter, part) is not None and (part.tie is None or _is_summed(parameter, part.tie))


def _zeroing(parameter: Tensor, part: FrozenPart) -> ZeroFrozenGradient | None:
    for hook in (parameter._post_accumulate_grad_hooks or {}).values():  # type: ignore[attr-defined]
        if isinstance(hook, ZeroFrozenGradient) and hook.part is part:
            return hook
    return None


def _is_summed(parameter: Tensor, tie: Tie) -> bool:
    """Return whether some part, of two that were tied to one another later, already sums the gradient."""
    hooks = (parameter._backward_hooks or {}).values()
    return any(isinstance(hook, SumTiedGradient) and hook.tie.dim == tie.dim for hook in hooks)


def _is_of(hook: Any, part: FrozenPart) -> bool:
    return isinstance(hook, ZeroFrozenGradient | SumTiedGradient) and hook.part is part


def parts_watching(parameter: Tensor) -> list[FrozenPart]:
    """Return what every handle freezes of a parameter that requires a gradient."""
    hooks = parameter._post_accumulate_grad_hooks or {}  # type: ignore[attr-defined]
    return [hook.part for hook in hooks.values() if isinstance(hook, ZeroFrozenGradient)]


def _gradient_hook_ids(parameter: Tensor, part: FrozenPart) -> list[int]:
    hooks = parameter._post_accumulate_grad_hooks or {}  # type: ignore[attr-defined]
    return [n for n, hook in hooks.items() if _is_of(hook, part)]


class ModuleHooks:
    """The hooks of one handle on one module, and the parts they hold there.

    Attributes:
        parts: The parts by the module's own attribute names.
        family: All parts of the handle, by qualified name: the same object in all of the handle's module hooks.
    """

    def __init__(self, family: dict[str, FrozenPart]) -> None:
        self.parts: dict[str, FrozenPart] = {}
        self.family = family
        self._handles: list[RemovableHandle] = []

    @property
    def installed(self) -> bool:
        """Whether the hooks are on the module."""
        return bool(self._handles)

    def install(self, module: nn.Module, callers: list[tuple[nn.Module, str]]) -> None:
        """Register every hook on the module.

        Args:
            module: The module that owns the parameters.
            callers: Modules that compute with these parameters without calling the owner, each with the owner's name
                below it: their forward is hooked too.
        """
        # first of all forward-pre-hooks: pruning and weight norm compute from the parameter in theirs
        self._handles = [
            module.register_forward_pre_hook(ImposeBeforeForward(self), prepend=True),
            module.register_state_dict_pre_hook(ImposeBeforeSaving(self)),
            module.register_load_state_dict_pre_hook(ImposeBeforeLoading(self)),
            module.register_load_state_dict_post_hook(FollowLoading(self)),
        ]
        for caller, path in callers:
            self._handles.append(caller.register_forward_pre_hook(ImposeBeforeCaller(self, path), prepend=True))

    def lost(self, module: nn.Module, callers: list[tuple[nn.Module, str]]) -> set[str]:
        """Return the moments ("forward", "saving", "loading") whose hooks are no longer on the module or its callers.

        Args:
            module: The module that owns the parameters.
            callers: What `install` took, as it is now.
        """
        lost = {moment for moment, where, kind in _MOMENTS if not self._among(getattr(module, where), kind)}
        for caller, path in callers:
            if all(hook.path != path for hook in self._among(caller._forward_pre_hooks, ImposeBeforeCaller)):
                lost.add("forward")
        return lost

    def _among(self, hooks: dict[int, Any], kind: type[_Hook]) -> list[_Hook]:
        plain = [getattr(hook, "hook", hook) for hook in hooks.values()]  # torch wraps hooks that take the module
        return [hook for hook in plain if isinstance(hook, kind) and hook.hooks is self]

    def remove(self) -> None:
        """Take every hook off again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def drop(self, key: str) -> None:
        """Let one parameter go; with the last one the hooks come off."""
        self.parts.pop(key, None)
        if not self.parts:
            self.remove()

    def hold(self, module: nn.Module) -> None:
        """Impose the module's frozen entries, and renew gradient hooks that were lost."""
        if torch.compiler.is_compiling():
            self._hold_compiled(module)
        elif torch._C._functorch.maybe_current_level() is not None:
            # torch.func forbids writes to what a function captured, and has no public way to look or step outside
            with temporarily_clear_interpreter_stack():
                self._hold(module)
        elif torch._C._get_tracing_state() is not None:
            with _untraced():
                self._hold(module)
        else:
            self._hold(module)

    def _hold(self, module: nn.Module) -> None:
        for part, parameter in self.bound(module):
            watch_gradient(parameter, part)
            part.impose(parameter)

    def _hold_compiled(self, module: nn.Module) -> None:
        """Impose alone: a compiled frame cannot register hooks; the next eager forward or step does."""
        if not _is_exporting():  # an exported program holds the weights as constants: nobody writes into them
            for part, parameter in self.bound(module):
                part.impose(parameter)

    def bound(self, module: nn.Module) -> Iterator[tuple[FrozenPart, Tensor]]:
        """Pair each part with the parameter it holds now.

        `torch.func.functional_call` and `nn.DataParallel` put plain tensors in a parameter's place for one call;
        those belong to the caller and are passed over.
        """
        for key, part in self.parts.items():
            parameter = parameter_of(module, key)
            if parameter is None:
                raise gone(part.name, module)
            if type(parameter) is nn.Parameter or isinstance(parameter, nn.Parameter):  # the first is far quicker
                yield part, part.current(parameter)


@contextmanager
def _untraced() -> Iterator[None]:
    """Keep what happens inside out of the program that torch.jit.trace writes down."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


class _ModuleHook:
    def __init__(self, hooks: ModuleHooks) -> None:
        self.hooks = hooks


_Hook = TypeVar("_Hook", bound=_ModuleHook)


class ImposeBeforeForward(_ModuleHook):
    """Before a module's forward: impose, and renew lost gradient hooks."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.hooks.hold(module)


class ImposeBeforeCaller(_ModuleHook):
    """Before the forward of a module that computes with another's parameters without calling it: impose there."""

    def __init__(self, hooks: ModuleHooks, path: str) -> None:
        super().__init__(hooks)
        self.path = path

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.hooks.hold(module.get_submodule(self.path))


class ImposeBeforeSaving(_ModuleHook):
    """Before `state_dict()`: impose, so that what is saved is exact even after a stray write."""

    def __call__(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        self.hooks.hold(module)


class ImposeBeforeLoading(_ModuleHook):
    """Before `load_state_dict()`: impose, so that `keep` never takes over a stray write where nothing is loaded.

    What was loaded into the parameter itself, as torch.distributed.checkpoint does, is not a stray write.
    """

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key, part in self.hooks.parts.items():
            parameter = parameter_of(module, key)
            if parameter is not None and not _shares_memory(state_dict.get(prefix + key), part.current(parameter)):
                part.impose(part.current(parameter))


def _shares_memory(loaded: Any, parameter: Tensor) -> bool:
    return isinstance(loaded, Tensor) and local(loaded).data_ptr() == local(parameter).data_ptr() != 0


class FollowLoading(_ModuleHook):
    """After `load_state_dict()`: let `keep` follow what was loaded, impose the rest, hook what was assigned."""

    def __call__(self, module: nn.Module, incompatible_keys: Any) -> None:
        for part, parameter in self.hooks.bound(module):
            watch_gradient(parameter, part)
            part.recapture(parameter)


_MOMENTS: Final[tuple[tuple[str, str, type[_ModuleHook]], ...]] = (
    ("forward", "_forward_pre_hooks", ImposeBeforeForward),
    ("saving", "_state_dict_pre_hooks", ImposeBeforeSaving),
    ("loading", "_load_state_dict_pre_hooks", ImposeBeforeLoading),
    ("loading", "_load_state_dict_post_hooks", FollowLoading),
)
"""At which moment a module calls its hooks, where torch keeps them, and which of them is ours."""


def hooks_on(module: nn.Module) -> list[ModuleHooks]:
    """Return the module hooks that handles have installed on a module, or that it brought along as a copy."""
    return [hook.hooks for hook in module._forward_pre_hooks.values() if isinstance(hook, ImposeBeforeForward)]


def silent_callers(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """Map each module that is used without being called to the modules that use it, each with its name below them.

    These are the output projection of nn.MultiheadAttention, and containers of parameters, which have no forward.
    """
    callers: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for caller in model.modules():
        if isinstance(caller, nn.MultiheadAttention):
            callers.setdefault(caller.out_proj, []).append((caller, "out_proj"))
        if _has_forward(caller):
            for path, container in _containers_below(caller):
                callers.setdefault(container, []).append((caller, path))
    return callers


def _containers_below(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if not _has_forward(child):
            yield f"{prefix}{name}", child
            yield from _containers_below(child, f"{prefix}{name}.")


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _is_exporting() -> bool:
    return bool(getattr(torch.compiler, "is_exporting", bool)())  # torch 2.7
