"""The places that hold a parameter: modules and mappings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from .._errors import ParameterChangedError


@dataclass(frozen=True, slots=True)
class Site:
    """One place that holds a parameter: a module and an attribute of it, or a mapping and a key of it.

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
        return parameter_of(self.owner, self.key) if isinstance(self.owner, nn.Module) else self.owner.get(self.key)

    def computed(self) -> Tensor:
        """Return what the owner computes with: the tensor that stands here, under the mask where it was pruned."""
        mask = self.owner._buffers.get(f"{self.key}_mask") if isinstance(self.owner, nn.Module) else None
        return self.tensor() if mask is None else self.tensor() * mask


def gone(name: str, owner: object) -> ParameterChangedError:
    """Return the error for a frozen parameter that is no longer where it was."""
    return ParameterChangedError(
        f"the frozen parameter `{name}` is gone from {type(owner).__name__}",
        "remove the frozen entries before the parameter is deleted, renamed, parametrized, fused or quantized (in a "
        "copy of the model: `for frozen in FrozenEntries.of(copy): frozen.remove()`)",
    )


def parameter_of(module: nn.Module, key: str) -> Tensor | None:
    """Return the parameter that goes by `key`, also after torch.nn.utils.prune has renamed it, or None."""
    found = module._parameters.get(key)  # not getattr: pruning leaves a computed tensor under the parameter's name
    if found is None and f"{key}_mask" in module._buffers:
        return module._parameters.get(f"{key}_orig")
    return found
