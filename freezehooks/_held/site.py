"""The places that hold a parameter, or a buffer: modules and mappings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import ParameterChangedError


@dataclass(frozen=True, slots=True)
class Site:
    """One place that holds a parameter or a buffer: a module and an attribute of it, or a mapping and a key of it.

    Attributes:
        owner: The module, or the mapping.
        key: The attribute, or the key.
        known: What stood under each of the owner's keys when somebody last looked: all who hold entries there for one
            handle share it. Another parameter under the key is one that was put in its place.
    """

    owner: nn.Module | Mapping[str, Tensor]
    key: str
    known: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def is_whole(self) -> bool:
        """Whether the owner has its parameters: not so a module that is just being copied, and holds its handle."""
        return not isinstance(self.owner, nn.Module) or "_parameters" in vars(self.owner)

    @property
    def is_buffer(self) -> bool:
        """Whether a buffer of a module stands here: no optimizer steps it, and the module's forward may write to it."""
        return isinstance(self.owner, nn.Module) and self.key in self.owner._buffers

    @property
    def holder(self) -> Mapping[str, Any]:
        """The mapping in which the owner keeps what stands here."""
        if not isinstance(self.owner, nn.Module):
            return self.owner
        return self.owner._buffers if self.is_buffer else self.owner._parameters

    def tensor(self) -> Tensor:
        """Return the tensor that stands here now.

        Raises:
            ParameterChangedError: None does.
        """
        found = self.find()
        if found is None:
            raise gone(self.key, self.owner)
        return found

    def find(self) -> Tensor | None:
        """Return the tensor that stands here now, or None."""
        return tensor_of(self.owner, self.key) if isinstance(self.owner, nn.Module) else self.owner.get(self.key)

    def put_normal(self, buffer: Tensor) -> Tensor:
        """Put a normal tensor in place of a buffer that was made under torch.inference_mode, and return it."""
        with torch.inference_mode(False):
            found = buffer.clone()
        if isinstance(self.owner, nn.Module):
            self.owner._buffers[self.key] = found
        return found

    def computed(self) -> Tensor:
        """Return what the owner computes with: the tensor that stands here, under the mask where it was pruned."""
        if not isinstance(self.owner, nn.Module) or self.is_buffer:
            return self.tensor()
        mask = self.owner._buffers.get(f"{self.key}_mask")
        return self.tensor() if mask is None else self.tensor() * mask


def gone(name: str, owner: object) -> ParameterChangedError:
    """Return the error for a frozen parameter that is no longer where it was."""
    return ParameterChangedError(
        f"the frozen parameter `{name}` is gone from {type(owner).__name__}",
        "remove the frozen entries before the parameter is deleted, renamed, parametrized, fused or quantized (in a "
        "copy of the model: `for frozen in FrozenEntries.of(copy): frozen.remove()`)",
    )


def tensor_of(module: nn.Module, key: str) -> Tensor | None:
    """Return the parameter that goes by `key`, also after torch.nn.utils.prune has renamed it, or the buffer, or None.

    A buffer is what a module keeps beside its parameters, as BatchNorm keeps its running statistics.
    """
    if key in module._buffers:
        return module._buffers[key]
    found = module._parameters.get(key)  # not getattr: pruning leaves a computed tensor under the parameter's name
    if found is None and f"{key}_mask" in module._buffers:
        return module._parameters.get(f"{key}_orig")
    return found
