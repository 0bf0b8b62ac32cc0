"""The hooks that keep frozen entries: each a small object that names its moment and its action.

A hook reaches the parameter through the module it is called with, never through a reference of its own: deepcopy and
pickle take hooks along, and a copy must not write into the original.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ._errors import ParameterChangedError
from ._frozen import FrozenPart
from ._targets import parameter_of


class ZeroFrozenGradient:
    """After a gradient was accumulated: make it +0.0 at the frozen entries."""

    def __init__(self, part: FrozenPart) -> None:
        self.part = part

    def __call__(self, parameter: Tensor) -> None:
        self.part.zero_gradient(parameter)


def watch_gradient(parameter: Tensor, part: FrozenPart) -> None:
    """Make sure the parameter's gradient is zeroed, by the first of its hooks; do nothing where it already is.

    A tensor's hooks are lost on deepcopy, pickle, `load_state_dict(assign=True)` and swapped parameters, so this is
    asked again at every forward and every step.
    """
    if not parameter.requires_grad or _gradient_hook_ids(parameter, part):
        return
    handle = parameter.register_post_accumulate_grad_hook(ZeroFrozenGradient(part))
    hooks: OrderedDict[int, Any] = parameter._post_accumulate_grad_hooks  # type: ignore[assignment]  # undeclared
    hooks.move_to_end(handle.id, last=False)


def unwatch_gradient(parameter: Tensor, part: FrozenPart) -> None:
    """Take the hook of `watch_gradient` off again."""
    for hook_id in _gradient_hook_ids(parameter, part):
        del parameter._post_accumulate_grad_hooks[hook_id]  # type: ignore[attr-defined]  # undeclared


def _gradient_hook_ids(parameter: Tensor, part: FrozenPart) -> list[int]:
    hooks = parameter._post_accumulate_grad_hooks or {}  # type: ignore[attr-defined]  # undeclared
    return [n for n, hook in hooks.items() if isinstance(hook, ZeroFrozenGradient) and hook.part is part]


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

    def install(self, module: nn.Module, attention: nn.MultiheadAttention | None = None) -> None:
        """Register every hook on the module; `attention` computes with the module's parameters without calling it."""
        self._handles = [
            module.register_forward_pre_hook(ImposeBeforeForward(self)),
            module.register_state_dict_pre_hook(ImposeBeforeSaving(self)),
            module.register_load_state_dict_pre_hook(ImposeBeforeLoading(self)),
            module.register_load_state_dict_post_hook(FollowLoading(self)),
        ]
        if attention is not None:
            self._handles.append(attention.register_forward_pre_hook(ImposeOnOutProjection(self)))

    def remove(self) -> None:
        """Take every hook off again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def hold(self, module: nn.Module) -> None:
        """Impose the module's frozen entries, and renew gradient hooks that were lost."""
        for part, parameter in self.bound(module):
            if not torch.compiler.is_compiling():
                watch_gradient(parameter, part)
            part.impose(parameter)

    def bound(self, module: nn.Module) -> Iterator[tuple[FrozenPart, nn.Parameter]]:
        """Pair each part with the parameter it holds now.

        `torch.func.functional_call` and `nn.DataParallel` put plain tensors in a parameter's place for one call;
        those belong to the caller and are passed over.
        """
        for key, part in self.parts.items():
            parameter = parameter_of(module, key)
            if parameter is None:
                raise ParameterChangedError(
                    f"the frozen parameter `{part.name}` is gone from {type(module).__name__}",
                    "remove the frozen entries before the parameter is deleted, renamed or parametrized",
                )
            if isinstance(parameter, nn.Parameter):
                yield part, parameter


class _ModuleHook:
    def __init__(self, hooks: ModuleHooks) -> None:
        self.hooks = hooks


class ImposeBeforeForward(_ModuleHook):
    """Before a module's forward: impose, and renew lost gradient hooks."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.hooks.hold(module)


class ImposeOnOutProjection(_ModuleHook):
    """Before the forward of nn.MultiheadAttention, which uses `out_proj` without calling it: impose there."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.hooks.hold(module.get_submodule("out_proj"))


class ImposeBeforeSaving(_ModuleHook):
    """Before `state_dict()`: impose, so that what is saved is exact even after a stray write."""

    def __call__(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        self.hooks.hold(module)


class ImposeBeforeLoading(_ModuleHook):
    """Before `load_state_dict()`: impose, so that `keep` never takes over a stray write where nothing is loaded."""

    def __call__(self, module: nn.Module, *args: Any) -> None:
        self.hooks.hold(module)


class FollowLoading(_ModuleHook):
    """After `load_state_dict()`: let `keep` follow what was loaded, impose the rest, hook what was assigned."""

    def __call__(self, module: nn.Module, incompatible_keys: Any) -> None:
        for part, parameter in self.hooks.bound(module):
            watch_gradient(parameter, part)
            part.recapture(parameter)


def hooks_on(module: nn.Module) -> list[ModuleHooks]:
    """Return the module hooks that handles have installed on a module, or that it brought along as a copy."""
    return [hook.hooks for hook in module._forward_pre_hooks.values() if isinstance(hook, ImposeBeforeForward)]
