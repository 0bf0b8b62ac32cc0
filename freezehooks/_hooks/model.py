"""Before the forward of a whole model that several processes train: what its modules see too late by themselves."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._held.parameter import FrozenPart
from .._held.resolve import Model
from .._ranks.agreement import check_same_parts, is_distributed
from .module import ModuleHooks, hooks_on


class ImposeBeforeModel:
    """Before the forward of the whole model: impose on what FSDP2 gathers before the owner's own hook.

    Args:
        family: The parts that the handle holds.
    """

    def __init__(self, family: dict[str, FrozenPart]) -> None:
        self.family = family
        self._compared = False

    def __call__(self, model: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or not is_distributed():
            return
        spread = _has_fsdp2(model)
        self._compare_ranks(spread)
        if spread:
            self._come_first(model)
            self._meet_shards(model)
            for module in model.modules():
                for hooks in self._own(module):
                    hooks.hold(module)

    def _own(self, module: nn.Module) -> list[ModuleHooks]:
        return [hooks for hooks in hooks_on(module) if hooks.family is self.family]

    def _compare_ranks(self, spread: bool) -> None:
        """Compare once the rules of a model that was frozen before FSDP2 or DistributedDataParallel took it."""
        if not self._compared and (spread or nn.parallel.DistributedDataParallel._get_active_ddp_module() is not None):
            self._compared = True
            check_same_parts(self.family.values())

    def _come_first(self, model: nn.Module) -> None:
        """Be the first of the hooks from the next forward on: `fully_shard` has put its own before."""
        found = next(key for key, hook in model._forward_pre_hooks.items() if hook is self)
        if next(iter(model._forward_pre_hooks)) != found:
            model._forward_pre_hooks.move_to_end(found, last=False)  # type: ignore[attr-defined]

    def _meet_shards(self, model: nn.Module) -> None:
        """Show the parts their shards, where FSDP2 has put whole parameters in their place already."""
        if all(part.is_spread for part in self.family.values()):
            return
        for owner, key, shard in _shards_of(model):
            for hooks in self._own(owner):
                if key in hooks.parts:
                    hooks.parts[key].follow(shard)


def is_before_model(model: Model, family: dict[str, FrozenPart]) -> bool:
    """Return whether the hook of a family of parts is on the model."""
    return isinstance(model, nn.Module) and any(True for _ in _found_before_model(model, family))


def remove_before_model(model: nn.Module, family: dict[str, FrozenPart]) -> None:
    """Take the hook of a family of parts off the model again."""
    for module, key in list(_found_before_model(model, family)):
        del module._forward_pre_hooks[key]


def _found_before_model(model: nn.Module, family: dict[str, FrozenPart]) -> Iterator[tuple[nn.Module, int]]:
    for module in model.modules():
        for key, hook in module._forward_pre_hooks.items():
            if isinstance(hook, ImposeBeforeModel) and hook.family is family:
                yield module, key


def _has_fsdp2(model: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # without which there is none
    return fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules())


def _shards_of(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yield the parameters that FSDP2 steps, each with its owner and its name there; torch has no public way to ask."""
    kind = sys.modules["torch.distributed.fsdp"].FSDPModule
    for module in model.modules():
        if isinstance(module, kind):
            state: Any = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # torch 2.6: one group
            for parameter in (each for group in groups if group is not None for each in group.fsdp_params):
                where = parameter._module_info
                yield where.module, where.param_name, parameter.sharded_param
