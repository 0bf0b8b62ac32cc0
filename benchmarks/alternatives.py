"""Alternatives: the ways in which people freeze entries without this library.

Each is written as its users write it, with as much as possible prepared beforehand: for instance, masks in the weight's
dtype, as a bool one would be converted in every step.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from ._memory import tensor_bytes
from .subjects import Held, Plain


class Alternative(Plain):
    """Freezes entries without this library."""

    freezes = True

    def prepare(self) -> None:
        for held in self.task.held:
            self.hold(held)

    def hold(self, held: Held) -> None:
        """Freeze the entries, before there is an optimizer."""

    def masks(self, held: Held) -> tuple[Tensor, Tensor | None]:
        """Return a mask with 1 at the free entries, and a tensor of the values (None if all are 0)."""
        parameter = self.model.get_parameter(held.name)
        frozen = held.frozen(parameter)
        value = torch.as_tensor(held.value, dtype=parameter.dtype, device=parameter.device)
        fixed = torch.where(frozen, value, 0.0) if bool(value.any()) else None
        return (~frozen).to(parameter.dtype), fixed

    def extra_bytes(self) -> int:
        known = {name for name, _ in self.task.model.named_buffers()}
        own = [buffer for name, buffer in self.model.named_buffers() if name in known]
        return tensor_bytes(self.model, beyond=[*self.model.parameters(), *own])


class Prune(Alternative):
    """`torch.nn.utils.prune.custom_from_mask`, which can only hold zeros."""

    name = "torch prune"

    def hold(self, held: Held) -> None:
        free, _ = self.masks(held)
        prune.custom_from_mask(*self.owner(held), mask=free)  # type: ignore[no-untyped-call]

    def parameter(self, held: Held) -> Tensor:
        return self.model.get_parameter(f"{held.name}_orig")

    def computed(self, held: Held) -> Tensor:
        return self.parameter(held) * self.model.get_buffer(f"{held.name}_mask")  # what `weight` is in the next forward


class FixedEntries(nn.Module):
    """The parametrization ``weight * free + fixed``."""

    free: Tensor
    fixed: Tensor | None

    def __init__(self, free: Tensor, fixed: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("free", free)
        self.register_buffer("fixed", fixed)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with the fixed entries."""
        return weight * self.free if self.fixed is None else torch.addcmul(self.fixed, weight, self.free)


class Parametrize(Alternative):
    """A mask by `torch.nn.utils.parametrize`."""

    name = "parametrize"

    def hold(self, held: Held) -> None:
        module, key = self.owner(held)
        parametrize.register_parametrization(module, key, FixedEntries(*self.masks(held)), unsafe=True)

    def parameter(self, held: Held) -> Tensor:
        module, key = self.owner(held)
        found: Any = module.parametrizations
        original: Tensor = found[key].original
        return original

    def computed(self, held: Held) -> Tensor:
        module, key = self.owner(held)
        weight: Tensor = getattr(module, key)
        return weight


class MaskAroundStep(Alternative):
    """The scheme of NVIDIA apex's ASP: mask the gradient before the step and the weight after it."""

    name = "mask around step"

    def prepare(self) -> None:
        found = ((self.parameter(held), *self.masks(held)) for held in self.task.held)
        self.held = [(parameter, free, fixed) for parameter, free, fixed in found]
        self.mask_weights()

    def mask_weights(self) -> None:
        """Write the values into every weight."""
        with torch.no_grad():
            for parameter, free, fixed in self.held:
                parameter.mul_(free)
                if fixed is not None:
                    parameter.add_(fixed)

    def step_optimizer(self) -> None:
        for parameter, free, _ in self.held:
            if parameter.grad is not None:
                parameter.grad.mul_(free)
        self.optimizer.step()
        self.mask_weights()

    def extra_bytes(self) -> int:
        return tensor_bytes([masks for _, *masks in self.held])


class ZeroInClone:
    """A tensor hook that returns a clone of the gradient with zeros at an index."""

    def __init__(self, index: Any) -> None:
        self.index = index

    def __call__(self, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[self.index] = 0
        return gradient


class HookAndRewrite(Alternative):
    """What most answers on the web suggest: a tensor hook, and writes through `.data` before forward and after step."""

    name = "hook and rewrite"

    def prepare(self) -> None:
        self.held = [(self.parameter(held), held.index, held.values()) for held in self.task.held]
        for parameter, index, _ in self.held:
            parameter.register_hook(ZeroInClone(index))  # type: ignore[no-untyped-call]

    def before_forward(self) -> None:
        for parameter, index, values in self.held:
            parameter.data[index] = values

    def step_optimizer(self) -> None:
        self.optimizer.step()
        self.before_forward()

    def extra_bytes(self) -> int:
        return tensor_bytes([written for _, *written in self.held])


class TrainableTokens(Alternative):
    """PEFT's trainable tokens: a matrix of the new rows, written into a copy of the embedding in each forward."""

    name = "PEFT tokens"
    adapter = "default"

    @classmethod
    def missing(cls) -> str | None:
        return None if importlib.util.find_spec("peft") else "PEFT is not installed: pip install peft"

    def hold(self, held: Held) -> None:
        import peft  # takes seconds, and most scenarios do without

        module, _ = self.owner(held)
        learned = (~held.frozen(self.model.get_parameter(held.name))).any(dim=1).nonzero().flatten().tolist()
        names = [name for name, found in self.model.named_modules() if found is module]
        config = peft.TrainableTokensConfig(token_indices=learned, target_modules=names)
        peft.inject_adapter_in_model(config, self.model, self.adapter)

    def parameter(self, held: Held) -> Tensor:
        layer, _ = self.owner(held)
        base: Any = layer.base_layer
        weight: Tensor = base.weight
        return weight

    def computed(self, held: Held) -> Tensor:
        layer: Any = self.owner(held)[0]
        weight: Tensor = layer.get_merged_weights([self.adapter])
        return weight


AT_VALUES: tuple[type[Plain], ...] = (Parametrize, MaskAroundStep, HookAndRewrite)
AT_ZERO: tuple[type[Plain], ...] = (Prune, *AT_VALUES)
