"""The sites of parameters and buffers: a module or mapping that holds one, and the key there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import ParameterChangedError


@dataclass(frozen=True, slots=True)
class Site:
    """A site that holds a parameter or a buffer: a module and the name in it, or a mapping and its key.

    Attributes:
        owner: The module or the mapping.
        key: The name or the key.
        known: The tensor last seen under each of the owner's keys, shared by all hooks of one handle. If another
            tensor is there now, it replaced that one.
    """

    owner: nn.Module | Mapping[str, Tensor]
    key: str
    known: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def is_whole(self) -> bool:
        """Whether the owner has its parameters already: a module that is being copied or unpickled may not."""
        return not isinstance(self.owner, nn.Module) or "_parameters" in vars(self.owner)

    @property
    def is_buffer(self) -> bool:
        """Whether a module holds a buffer here: no optimizer steps it, and the module's forward may write to it."""
        return isinstance(self.owner, nn.Module) and self.key in self.owner._buffers

    @property
    def holder(self) -> Mapping[str, Any]:
        """The mapping of the owner that contains the tensor."""
        if not isinstance(self.owner, nn.Module):
            return self.owner
        return self.owner._buffers if self.is_buffer else self.owner._parameters

    def tensor(self) -> Tensor:
        """Return the tensor at the site.

        Raises:
            ParameterChangedError: There is none.
        """
        found = self.find()
        if found is None:
            raise gone(self.key, self.owner)
        return found

    def find(self) -> Tensor | None:
        """Return the tensor at the site, or None."""
        return tensor_of(self.owner, self.key) if isinstance(self.owner, nn.Module) else self.owner.get(self.key)

    def put_normal(self, buffer: Tensor) -> Tensor:
        """Replace a buffer that was made under torch.inference_mode by a normal tensor, and return that."""
        with torch.inference_mode(False):
            found = buffer.clone()
        if isinstance(self.owner, nn.Module):
            self.owner._buffers[self.key] = found
        return found

    def computed(self) -> Tensor:
        """Return what the owner computes with: the tensor at the site, times its mask if it was pruned."""
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
    """Return a module's parameter or buffer by its name, even if torch.nn.utils.prune has renamed it, or None.

    A buffer is a tensor that a module keeps beside its parameters, such as the running statistics of BatchNorm.
    """
    if key in module._buffers:
        return module._buffers[key]
    found = module._parameters.get(key)  # not getattr: pruning leaves a computed tensor under the parameter's name
    if found is None and f"{key}_mask" in module._buffers:
        return module._parameters.get(f"{key}_orig")
    return found
