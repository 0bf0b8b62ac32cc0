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
    """What a module calls before its forward, after it where buffers are frozen, and around saving and loading.

    Its hooks are its methods. They reach a parameter through the module that they are called with: deepcopy and pickle
    take them along, and a copy must not write into the original.

    Attributes:
        frozen: What the handle froze: the same object in all of its hook sets.
        names: The names in it, by the module's own attribute names.
        buffers: Which of these attributes are buffers, held after the module's forward too: it may write to them.
        known: What stood under each of these when somebody last looked, as `Site` says.
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
            callers: Modules that compute with these parameters without calling the owner, each with the owner's name
                below it: their forward is hooked too.
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
        """Register a further hook behind the module's forward, before those of others; `remove` takes it off too."""
        handle = module.register_forward_hook(hook, with_kwargs=True)
        call_first(module._forward_hooks, handle.id)
        self._handles.append(handle)

    def lost(self, module: nn.Module, callers: list[tuple[nn.Module, str]]) -> set[str]:
        """Return the moments ("forward", "saving", "loading") whose hooks are no longer on the module or its callers.

        Args:
            module: The module that owns the parameters.
            callers: What `install` took, as it is now.
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
        """Take every hook off again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._remove_after()

    def _remove_after(self) -> None:
        for handle in self._handles_after:
            handle.remove()
        self._handles_after = []

    def drop(self, key: str) -> None:
        """Let one parameter or buffer go; with the last one the hooks come off."""
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
        """Return where the module's frozen parameters stand."""
        for key, name in self._held():
            yield Place(self.frozen, name, Site(module, key, self.known))

    def _held(self) -> list[tuple[str, str]]:
        return [(key, name) for key, name in self.names.items() if self.frozen.is_held(name)]

    # The hooks

    def impose_before_forward(self, module: nn.Module, args: Any) -> None:
        """Impose, and renew lost gradient hooks, where no module around this one has done so for its own forward."""
        if not is_covered(self):
            self.impose(module)

    def impose_after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        """Impose on the module's buffers, which its forward may have written, as BatchNorm does, or replaced."""
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
        """Impose on them alone: in a compiled frame, or in a copy that shares the memory of the original."""
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
        """Impose before `load_state_dict()`, so that `keep` never takes over a stray write where nothing is loaded.

        What was loaded into the parameter itself, as torch.distributed.checkpoint does, is not a stray write. What a
        parameter holds that was just put in place and is loaded now does not matter.
        """
        for place in self.places(module):
            found, loaded = place.site.find(), state_dict.get(prefix + place.site.key)
            if found is None or (loaded is not None and place.is_new(found)):
                continue
            pair = place.pair()
            if pair is not None and not _shares_memory(loaded, pair[1]):
                pair[0].impose(pair[1])

    def follow_loading(self, module: nn.Module, incompatible_keys: Any) -> None:
        """Let `keep` follow what was loaded, impose the rest, and hook what was assigned."""
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
        """Impose alone: a compiled frame cannot register hooks; the next eager forward or step does."""
        if is_exporting():
            self.impose_stored()
            return
        with torch.no_grad():  # else the compiler writes into a copy of the weight, and copies that back after it all
            for name, parameter in self._own(module):
                pair = self.frozen.adopt(name, parameter)
                if pair is not None:
                    pair[0].impose(pair[1])

    @traced_as_constant
    def impose_stored(self) -> None:
        """Impose on the parameters themselves while a program is exported: it takes their numbers as they are then.

        The module computes with tensors that have none, and nothing of this is to be part of the program.
        """
        with outside_tracing():
            for key, name in self._held():
                pair = self.frozen.adopt(name, self.known[key]) if key in self.known else None
                if pair is not None:
                    pair[0].impose(pair[1])

    def _own(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Return the module's own parameters; not what somebody put in their place for one call.

        Inside a compiled frame one that is new is left to the next eager forward, or step.
        """
        for key, name in self._held():
            parameter = tensor_of(module, key)
            if parameter is None:
                raise gone(name, module)
            is_own = isinstance(parameter, nn.Parameter) or key in module._buffers
            if is_own and self.known.get(key, parameter) is parameter:
                yield name, parameter


class AroundCaller:
    """Around the forward of a module that computes with another's parameters or buffers without calling it."""

    def __init__(self, hooks: HookSet, path: str) -> None:
        self.hooks = hooks
        self.path = path

    def is_for(self, hooks: HookSet, path: str) -> bool:
        """Return whether it imposes what a hook set holds of the module at a path."""
        return self.hooks is hooks and self.path == path


class ImposeBeforeCaller(AroundCaller):
    """Before that forward: impose there."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.hooks.impose_before_forward(module.get_submodule(self.path), args)


class ImposeAfterCaller(AroundCaller):
    """After that forward: impose on the buffers there."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.hooks.impose_after_forward(module.get_submodule(self.path), args, output)


class RescaleBeforeLookup:
    """Before the forward of an embedding with `max_norm`, which would rescale frozen entries: rescale the free ones."""

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
    """Register a hook before all that a module has already: pruning and weight norm compute from the parameter."""
    handle = module.register_forward_pre_hook(hook)
    call_first(module._forward_pre_hooks, handle.id)
    return handle


def _first_after_forward(module: nn.Module, hook: Any) -> RemovableHandle:
    # also after an error: checkpointing breaks off the forward that it runs once more, when BatchNorm has written
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
    """Return the hook sets that handles have installed on a module, or that it brought along as a copy."""
    owners = [getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values()]
    return [owner for owner in owners if isinstance(owner, HookSet)]


def hook_set_of(frozen: FrozenParameters, module: nn.Module) -> HookSet | None:
    """Return the hook set on a module that holds what one handle froze, also where some of its hooks were stripped."""
    kept = (hook for moment in MOMENTS for hook in getattr(module, moment.kept).values())
    owners = (getattr(getattr(hook, "hook", hook), "__self__", None) for hook in kept)  # torch wraps some
    return next((owner for owner in owners if isinstance(owner, HookSet) and owner.frozen is frozen), None)


def held_on(module: nn.Module, key: str) -> list[FrozenParameter]:
    """Return what every handle freezes of the parameter that stands under a name in a module."""
    names = [(hooks.frozen, hooks.names[key]) for hooks in hook_sets_on(module) if key in hooks.names]
    return [frozen.by_name[name] for frozen, name in names if frozen.is_held(name)]


def uncalled_owners(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
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
    return is_scripted(module) or type(module).forward is not nn.Module.forward
