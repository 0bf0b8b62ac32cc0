"""Where a frozen parameter stands, and what stands there now."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .._errors import UnsupportedParameterError
from .._torch import is_expanded_weight, is_replica
from .parameter import FrozenParameter
from .parameters import FrozenParameters
from .site import Site, gone


@dataclass(frozen=True, slots=True)
class Place:
    """Where a frozen parameter stands.

    Attributes:
        frozen: What the handle froze.
        name: The parameter's name there.
        site: The module, or the mapping, and the name in it.
        is_wanted: Whether whoever lists it writes to it at present; others are listed since that may change.
    """

    frozen: FrozenParameters
    name: str
    site: Site
    is_wanted: bool = True

    def own(self) -> Tensor | None:
        """Return the parameter that stands here; None for a tensor that somebody put in its place for one call.

        `torch.func.functional_call` does, and nn.DataParallel; those belong to the caller.

        Raises:
            ParameterChangedError: Nothing stands here.
            UnsupportedParameterError: It stands for the parameter in torch's own way to gradients of single samples,
                which pass by every hook.
        """
        owner = self.site.owner
        if isinstance(owner, nn.Module) and is_replica(owner):
            return None
        found = self.site.find()
        if found is None:
            raise gone(self.name, owner)
        if is_expanded_weight(found):
            raise UnsupportedParameterError(
                f"`{self.name}` is taken for gradients of single samples by expanded weights of torch, which leave "
                "them on the parameter past every hook",
                "take Opacus's own hooks, grad_sample_mode='hooks', or remove the frozen entries first",
            )
        return found if isinstance(found, nn.Parameter) or not isinstance(owner, nn.Module) else None

    def pair(self) -> tuple[FrozenParameter, Tensor] | None:
        """Pair what is frozen with the tensor to write to; None where that does not stand here now.

        Raises:
            ParameterChangedError: Nothing stands here.
        """
        found = self.own()
        return None if found is None else self.frozen.adopt(self.name, found)
