"""Hooks on modules that contain owners of frozen parameters: one batched write before their forward."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .._errors import ParameterChangedError, SpecError
from .._held.held import Model
from .._held.parameters import FrozenParameters
from .._held.place import Place
from .._ranks.agreement import check_same_parameters, has_process_group, is_distributed
from .._torch import (
    call_first,
    fsdp2_parameters,
    has_fsdp2,
    is_exporting,
    is_inside_ddp_training,
    is_replica,
    outside_transforms,
)
from . import batch
from .batch import Batch, Plan
from .hook_set import HookSet, first_before_forward, hook_sets_on


class OuterHooks:
    """The hooks of one handle on a module that contains owners of frozen parameters.

    Before the module's forward, and before it is saved, all values inside it are written at once. While the call runs,
    the hooks of the owners see that this was done; they still impose when an owner is called by itself.

    Attributes:
        frozen: The frozen parameters of the handle.
        is_root: Whether the module is the whole model, where ranks are compared and FSDP2 is handled.
    """

    def __init__(self, frozen: FrozenParameters, below: list[HookSet], *, is_root: bool) -> None:
        self.frozen = frozen
        self.is_root = is_root
        self._below = below
        self._with_buffers = [hooks for hooks in below if hooks.buffers]
        self._handles: list[RemovableHandle] = []
        self._batch = Batch()
        self._after = Batch()
        self._covered: tuple[Plan, batch.Covered] | None = None
        self._is_compared = False

    def install(self, module: nn.Module) -> None:
        """Register the hooks."""
        self._handles = [
            first_before_forward(module, self.impose_before_forward),
            module.register_forward_hook(EndForward(self), always_call=True),
            module.register_state_dict_pre_hook(self.impose_before_saving),
            module.register_state_dict_post_hook(EndSaving(self)),
        ]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # The hooks

    def impose_before_forward(self, module: nn.Module, args: Any) -> None:
        """Write all values inside the module before its forward."""
        if torch.compiler.is_compiling() or is_replica(module):
            if is_exporting():
                self._impose_stored()
            return  # each owner's own hook does it
        if not self.is_root and batch.is_around(self._below):
            return  # the running call of the model has written all
        if self.is_root and has_process_group():
            self.frozen.check_guards()  # elsewhere the backward pass does
            if is_distributed():
                self._handle_ranks(module)
        self._begin(module)

    def _impose_stored(self) -> None:
        for hooks in self._below:
            hooks.impose_stored()

    def impose_before_saving(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        """Write all values inside the module before its `state_dict()`."""
        if self.is_root or not batch.is_around(self._below):
            self._begin(module)

    def _begin(self, module: nn.Module) -> None:
        with outside_transforms():
            plan = self._batch.impose_before(module, lambda: self._places_below(module))
        if self._covered is None or self._covered[0] is not plan:
            self._covered = plan, batch.covered_by(plan, self._holders_below(module, plan))
        batch.begin_call(self, self._covered[1], plan)

    def end_forward(self, module: nn.Module) -> None:
        """End the call, so that the owners' hooks impose again; after the whole model, impose on its buffers."""
        batch.end_call(self)
        if self.is_root and any(hooks.buffers for hooks in self._with_buffers) and not is_replica(module):
            with outside_transforms(), suppress(ParameterChangedError):  # which the owner's hook or next forward raises
                self._after.impose_after(module, [each for each in self._places_below(module) if each.site.is_buffer])

    def _holders_below(self, module: nn.Module, plan: Plan) -> dict[Hashable, Sequence[Mapping[str, Any]]]:
        """Return the mappings in which each hook set finds its parameters, leaving out those with sharded ones."""
        return {
            hooks: (below._parameters, below._buffers)
            for below in module.modules()
            for hooks in self._own(below)
            if plan.sharded.isdisjoint(hooks.names.values()) and not plan.is_passing
        }

    def _places_below(self, module: nn.Module) -> Iterator[Place]:
        for below in module.modules():
            for hooks in self._own(below):
                yield from hooks.places(below)

    def _own(self, module: nn.Module) -> list[HookSet]:
        return [hooks for hooks in hook_sets_on(module) if hooks.frozen is self.frozen]

    # Several ranks

    def _handle_ranks(self, model: nn.Module) -> None:
        """Compare the ranks once, and adopt shards, of a model that was frozen before FSDP2 or DDP wrapped it."""
        is_sharded = has_fsdp2(model)
        if not self._is_compared and (is_sharded or is_inside_ddp_training()):
            self._is_compared = True
            check_same_parameters(self.frozen.by_name.values())
        if is_sharded:
            self._move_to_front(model)
            self._adopt_shards(model)

    def _move_to_front(self, model: nn.Module) -> None:
        """Move this hook to the front again, from the next forward on: `fully_shard` has put its own before it."""
        hooks = model._forward_pre_hooks
        own = next(key for key, hook in hooks.items() if hook == self.impose_before_forward)
        if next(iter(hooks)) != own:
            call_first(hooks, own)

    def _adopt_shards(self, model: nn.Module) -> None:
        """Adopt FSDP2's shards even while the model has the gathered parameters in their place."""
        if all(parameter.is_sharded for parameter in self.frozen.by_name.values()):
            return
        for owner, key, shard in fsdp2_parameters(model):
            for hooks in self._own(owner):
                if key in hooks.names:
                    self.frozen.adopt(hooks.names[key], shard)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_covered": None}


class EndForward:
    """After the forward, even one that failed: ends the call of the outer hooks and imposes on buffers.

    torch.jit.script reads the name and the globals of each hook, of forward hooks first; reading the globals raises.
    """

    __name__ = "end_forward"

    def __init__(self, outer: OuterHooks) -> None:
        self.outer = outer

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self.outer.end_forward(module)

    @property
    def __globals__(self) -> dict[str, Any]:
        raise SpecError(
            "torch.jit.script cannot compile a model whose entries are frozen: what holds them is Python",
            "call remove() first (of a copy: `for frozen in FrozenEntries.of(copy): frozen.remove()`), or use "
            "torch.export",
        )


class EndSaving:
    """After `state_dict()`: ends the call of the outer hooks. It is an object since torch sets an attribute on it."""

    def __init__(self, outer: OuterHooks) -> None:
        self.outer = outer

    def __call__(self, module: nn.Module, state_dict: Any, prefix: str, local_metadata: Any) -> None:
        batch.end_call(self.outer)


def install_outer(model: Model, frozen: FrozenParameters) -> None:
    """Install outer hooks on a model, and on those of its children with several owners of frozen parameters."""
    if isinstance(model, nn.Module):
        for module in (model, *model.children()):
            below = [hooks for each in module.modules() for hooks in hook_sets_on(each) if hooks.frozen is frozen]
            if module is model or len(below) > 1:
                OuterHooks(frozen, below, is_root=module is model).install(module)


def remove_outer(model: Model, frozen: FrozenParameters) -> None:
    """Remove the outer hooks of a handle."""
    for hooks in _outer_hooks(model, frozen):
        hooks.remove()


def has_root_hooks(model: Model, frozen: FrozenParameters) -> bool:
    """Return whether the model itself still has its outer hooks."""
    return any(hooks.is_root for hooks in _outer_hooks(model, frozen))


def _outer_hooks(model: Model, frozen: FrozenParameters) -> list[OuterHooks]:
    modules = model.modules() if isinstance(model, nn.Module) else ()
    owners = [getattr(hook, "__self__", None) for module in modules for hook in module._forward_pre_hooks.values()]
    return [owner for owner in owners if isinstance(owner, OuterHooks) and owner.frozen is frozen]
