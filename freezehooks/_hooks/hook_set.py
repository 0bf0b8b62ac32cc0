"""The hooks of one handle on one module that owns frozen parameters."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .._errors import UnsupportedParameterError
from .._held.max_norm import rescale_free_entries
from .._held.parameter import FrozenParameter
from .._held.parameters import FrozenParameters
from .._held.place import Place
from .._held.site import Site, gone, tensor_of
from .._ranks.sharding import local
from .._torch import (
    call_first,
    is_exporting,
    is_replica,
    is_scripted,
    is_tracing,
    not_compiled,
    outside_tracing,
    outside_transforms,
    traced_as_constant,
)
from .batch import Batch, is_covered
from .gradient import watch_gradient
from .moment import Moment


class HookSet:
    """The hooks that a module calls before its forward, after it if buffers are frozen, and around saving and loading.

    The hooks are methods. They reach a parameter through the module that they are called with: deepcopy and pickle copy
    the hooks along with the module, and a copy must not write into the original.

    Attributes:
        frozen: The frozen parameters of the handle, the same object in all of its hook sets.
        names: The names in `frozen`, by the module's own attribute names.
        buffers: Which of these attributes are buffers, which are also held after the forward, as it may write to them.
        known: The tensor last seen under each attribute; see `Site`.
    """

    def __init__(self, frozen: FrozenParameters, known: dict[str, Tensor]) -> None:
        self.frozen = frozen
        self.names: dict[str, str] = {}
        self.buffers: set[str] = set()
        self.known = known
        self._handles: list[RemovableHandle] = []
        self._handles_after: list[RemovableHandle] = []
        self._batch = Batch()
        self._after = Batch()

    def install(self, module: nn.Module, callers: list[tuple[nn.Module, str]]) -> None:
        """Register every hook on the module.

        Args:
            module: The module that owns the parameters.
            callers: Modules that compute with these parameters without calling the owner, each with the owner's path
                inside it: their forward is hooked too.
        """
        self._handles = [moment.put_on(module, self) for moment in MOMENTS]
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and "weight" in self.names:
            self._handles.append(module.register_forward_pre_hook(RescaleBeforeLookup(self), with_kwargs=True))
        for caller, path in callers:
            self._handles.append(first_before_forward(caller, ImposeBeforeCaller(self, path)))
        self.buffers = {key for key in self.names if key in module._buffers}
        if self.buffers:
            self._handles_after = [AFTER_FORWARD.put_on(module, self)]
            hooks = [(caller, ImposeAfterCaller(self, path)) for caller, path in callers]
            self._handles_after += [_first_after_forward(*each) for each in hooks]

    def call_after_forward(self, module: nn.Module, hook: Any) -> None:
        """Register another forward hook, to run before all others; `remove` removes it too."""
        handle = module.register_forward_hook(hook, with_kwargs=True)
        call_first(module._forward_hooks, handle.id)
        self._handles.append(handle)

    def lost(self, module: nn.Module, callers: list[tuple[nn.Module, str]]) -> set[str]:
        """Return the moments ("forward", "saving", "loading") whose hooks are no longer on the module or its callers.

        Args:
            module: The module that owns the parameters.
            callers: The callers as `install` takes them.
        """
        moments = (*MOMENTS, AFTER_FORWARD) if self.buffers else MOMENTS
        lost = {moment.name for moment in moments if not moment.is_called(module, self)}
        wanted = {ImposeBeforeCaller, ImposeAfterCaller} if self.buffers else {ImposeBeforeCaller}
        for caller, path in callers:
            hooks = chain(caller._forward_pre_hooks.values(), caller._forward_hooks.values())
            if wanted - {type(hook) for hook in hooks if isinstance(hook, AroundCaller) and hook.is_for(self, path)}:
                lost.add("forward")
        return lost

    def remove(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._remove_after()

    def _remove_after(self) -> None:
        for handle in self._handles_after:
            handle.remove()
        self._handles_after = []

    def drop(self, key: str) -> None:
        """Stop holding one parameter or buffer, and remove the hooks after the last one."""
        self.names.pop(key, None)
        self.known.pop(key, None)
        self.buffers.discard(key)
        self._batch.forget()
        self._after.forget()
        if not self.buffers:
            self._remove_after()
        if not self.names:
            self.remove()

    def places(self, module: nn.Module) -> Iterator[Place]:
        """Yield the places of the module's frozen parameters."""
        for key, name in self._held():
            yield Place(self.frozen, name, Site(module, key, self.known))

    def _held(self) -> list[tuple[str, str]]:
        return [(key, name) for key, name in self.names.items() if self.frozen.is_held(name)]

    # The hooks

    def impose_before_forward(self, module: nn.Module, args: Any) -> None:
        """Impose and reinstall lost gradient hooks, unless a module around this one has done so for its own forward."""
        if not is_covered(self):
            self.impose(module)

    def impose_after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        """Impose on the module's buffers, which its forward may have written to, as BatchNorm does, or replaced."""
        if is_exporting():
            self._check_exported(module.training)
        elif torch.compiler.is_compiling() or is_replica(module):
            self._impose_on_buffers(module)
        else:
            self._check_exported(is_tracing() and module.training)
            with outside_transforms():
                self._after.impose_after(module, [each for each in self.places(module) if each.site.is_buffer])

    @traced_as_constant
    def _check_exported(self, would_move: bool) -> None:
        if would_move:
            held = ", ".join(f"`{name}`" for key, name in self._held() if key in self.buffers)
            raise UnsupportedParameterError(
                f"nothing would hold {held} in a program that is exported or traced in training mode",
                "export the model in evaluation mode, model.eval(), or call remove() first",
            )

    def _impose_on_buffers(self, module: nn.Module) -> None:
        """Impose on the buffers without a batch: in compiled code, or in a replica that shares memory."""
        for key, name in self._held():
            if key in self.buffers:
                buffer = module._buffers[key]
                if buffer is None:
                    raise gone(name, module)
                self.frozen.by_name[name].for_tensor(buffer).impose(buffer)

    def impose_before_saving(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        """Impose before `state_dict()`, so that what is saved is exact even after a stray write."""
        if not is_covered(self):
            self.impose(module)

    def impose_before_loading(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Impose before `load_state_dict()`, so that `keep` never adopts a stray write where nothing is loaded.

        torch.distributed.checkpoint loads into the parameter itself beforehand, which is not a stray write. A parameter
        that has just been replaced and is loaded now is left alone.
        """
        for place in self.places(module):
            found, loaded = place.site.find(), state_dict.get(prefix + place.site.key)
            if found is None or (loaded is not None and place.is_new(found)):
                continue
            pair = place.pair()
            if pair is not None and not _shares_memory(loaded, pair[1]):
                pair[0].impose(pair[1])

    def follow_loading(self, module: nn.Module, incompatible_keys: Any) -> None:
        """Update `keep` to what was loaded, impose the other values, and hook the gradients of assigned parameters."""
        for place in self.places(module):
            found = place.own()
            pair = None if found is None else self._loaded(place, found)
            if pair is not None:
                watch_gradient(pair[1], self.frozen, place.name)
                pair[0].capture_kept(pair[1])
        self.frozen.changes += 1
        self._batch.forget()

    def _loaded(self, place: Place, found: Tensor) -> tuple[FrozenParameter, Tensor] | None:
        place.remember(found)
        return self.frozen.adopt(place.name, found)

    def impose(self, module: nn.Module) -> None:
        """Impose the module's frozen entries."""
        if torch.compiler.is_compiling():
            self._impose_compiled(module)
        elif not is_replica(module):
            with outside_transforms():
                self._batch.impose_before(module, lambda: self.places(module))

    def _impose_compiled(self, module: nn.Module) -> None:
        """Impose only: compiled code cannot register hooks; the next eager forward or step does."""
        if is_exporting():
            self.impose_stored()
            return
        with torch.no_grad():  # otherwise the compiler writes into a copy, and copies it back at the end
            for name, parameter in self._own(module):
                pair = self.frozen.adopt(name, parameter)
                if pair is not None:
                    pair[0].impose(pair[1])

    @traced_as_constant
    def impose_stored(self) -> None:
        """Impose on the stored parameters while a program is exported, which saves them as they are at that moment.

        During the export the module itself has tensors without data, and the write must not become part of the program.
        """
        with outside_tracing():
            for key, name in self._held():
                pair = self.frozen.adopt(name, self.known[key]) if key in self.known else None
                if pair is not None:
                    pair[0].impose(pair[1])

    def _own(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Yield the module's own parameters, leaving out those that are swapped out for the duration of a call.

        It is for compiled code, which leaves a replaced parameter to the next eager forward or step.
        """
        for key, name in self._held():
            parameter = tensor_of(module, key)
            if parameter is None:
                raise gone(name, module)
            is_own = isinstance(parameter, nn.Parameter) or key in module._buffers
            if is_own and self.known.get(key, parameter) is parameter:
                yield name, parameter


class AroundCaller:
    """The base class of hooks on a module that computes with another's parameters without calling it."""

    def __init__(self, hooks: HookSet, path: str) -> None:
        self.hooks = hooks
        self.path = path

    def is_for(self, hooks: HookSet, path: str) -> bool:
        """Return whether it imposes for a hook set, on the module at a path."""
        return self.hooks is hooks and self.path == path


class ImposeBeforeCaller(AroundCaller):
    """Before the caller's forward: impose on the parameters of the module at the path."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.hooks.impose_before_forward(module.get_submodule(self.path), args)


class ImposeAfterCaller(AroundCaller):
    """After the caller's forward: impose on the buffers of the module at the path."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.hooks.impose_after_forward(module.get_submodule(self.path), args, output)


class RescaleBeforeLookup:
    """Before the forward of an embedding with `max_norm`: rescale free entries, lest it rescale frozen ones."""

    def __init__(self, hooks: HookSet) -> None:
        self.hooks = hooks

    def __call__(self, module: nn.Embedding | nn.EmbeddingBag, args: Any, kwargs: dict[str, Any]) -> None:
        if module.max_norm is not None:
            self._rescale(module, args[0] if args else kwargs["input"])

    @not_compiled
    def _rescale(self, module: nn.Embedding | nn.EmbeddingBag, indices: Tensor) -> None:
        held = held_on(module, "weight")
        own = [place.own() for place in self.hooks.places(module) if place.site.key == "weight"]
        for parameter in own:
            if parameter is not None and held:
                rescale_free_entries(module, parameter, indices, held)


def _shares_memory(loaded: Any, parameter: Tensor) -> bool:
    return isinstance(loaded, Tensor) and local(loaded).data_ptr() == local(parameter).data_ptr() != 0


def first_before_forward(module: nn.Module, hook: Any) -> RemovableHandle:
    """Register a forward pre-hook before all others: those of pruning and weight norm compute from the parameter."""
    handle = module.register_forward_pre_hook(hook)
    call_first(module._forward_pre_hooks, handle.id)
    return handle


def _first_after_forward(module: nn.Module, hook: Any) -> RemovableHandle:
    # always_call: checkpointing stops its second forward early by an exception, when BatchNorm has already written
    handle = module.register_forward_hook(hook, always_call=True)
    call_first(module._forward_hooks, handle.id)
    return handle


MOMENTS: Final = (
    Moment("impose_before_forward", first_before_forward, "_forward_pre_hooks", "forward"),
    Moment("impose_before_saving", nn.Module.register_state_dict_pre_hook, "_state_dict_pre_hooks", "saving"),
    Moment(
        "impose_before_loading",
        nn.Module.register_load_state_dict_pre_hook,
        "_load_state_dict_pre_hooks",
        "loading",
    ),
    Moment("follow_loading", nn.Module.register_load_state_dict_post_hook, "_load_state_dict_post_hooks", "loading"),
)

AFTER_FORWARD: Final = Moment("impose_after_forward", _first_after_forward, "_forward_hooks", "forward")
"""The moment that only modules with frozen buffers have."""


def hook_sets_on(module: nn.Module) -> list[HookSet]:
    """Return the hook sets on a module: those that handles have installed, and those copied with it."""
    owners = [getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values()]
    return [owner for owner in owners if isinstance(owner, HookSet)]


def hook_set_of(frozen: FrozenParameters, module: nn.Module) -> HookSet | None:
    """Return the hook set of one handle on a module, even if some of its hooks were stripped, or None."""
    kept = (hook for moment in MOMENTS for hook in getattr(module, moment.kept).values())
    owners = (getattr(getattr(hook, "hook", hook), "__self__", None) for hook in kept)  # torch wraps some
    return next((owner for owner in owners if isinstance(owner, HookSet) and owner.frozen is frozen), None)


def held_on(module: nn.Module, key: str) -> list[FrozenParameter]:
    """Return what every handle freezes in a module's parameter of a given name."""
    names = [(hooks.frozen, hooks.names[key]) for hooks in hook_sets_on(module) if key in hooks.names]
    return [frozen.by_name[name] for frozen, name in names if frozen.is_held(name)]


def uncalled_owners(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """Map each module that is used without being called to the modules that use it, each with the path from there.

    They are the output projection of nn.MultiheadAttention, and containers of parameters, which have no forward.
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
    return is_scripted(module) or type(module).forward is not nn.Module.forward
