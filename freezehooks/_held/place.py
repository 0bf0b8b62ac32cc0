"""Where a frozen parameter stands, and what stands there now."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .._entries.bits import differ
from .._errors import ParameterChangedError, UnsupportedParameterError
from .._ranks.sharding import is_sharded
from .._torch import is_expanded_weight, is_inside_functional_call, is_replica
from .parameter import FrozenParameter
from .parameters import FrozenParameters
from .site import Site, gone
from .supported import check_supported


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
        """Return the parameter or buffer that stands here; None for what somebody put in its place for one call.

        `torch.func.functional_call` does, and nn.DataParallel; those belong to the caller. They may be parameters of
        another model.

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
        is_own = isinstance(found, nn.Parameter) or self.site.is_buffer
        is_plain = isinstance(owner, nn.Module) and not is_own
        return None if is_plain or (self.is_new(found) and is_inside_functional_call()) else found

    def is_new(self, found: Tensor) -> bool:
        """Return whether another parameter stood here when somebody last looked.

        FSDP2 puts shards and gathered parameters in place of one another: that says nothing.
        """
        known = self.site.known.get(self.site.key)
        return known is not None and known is not found and not (self._is_sharded or is_sharded(found))

    @property
    def _is_sharded(self) -> bool:
        return self.name in self.frozen.by_name and self.frozen.by_name[self.name].is_sharded

    def pair(self) -> tuple[FrozenParameter, Tensor] | None:
        """Pair what is frozen with the tensor to write to; None where that does not stand here now.

        Raises:
            ParameterChangedError: Nothing stands here, or what was put in place of another cannot be held.
        """
        found = self.own()
        return None if found is None else self.adopt(found)

    def adopt(self, found: Tensor) -> tuple[FrozenParameter, Tensor] | None:
        """Do what `pair` does, for what `own` returned: let `keep` follow what was put in another's place."""
        if not self.frozen.is_held(self.name):
            return self.frozen.adopt(self.name, found)
        known = self.site.known.get(self.site.key)
        is_news = known is not None and not (known.is_meta or found.is_meta)  # what comes from there is `to_empty`
        if known is not None and is_news and self.is_new(found):
            self._follow(found, known)
        self.remember(found)
        return self.frozen.adopt(self.name, found)

    def take_over(self) -> None:
        """Take a buffer that a forward has put in another's place for the one that stands here: it brings no news.

        Raises:
            ParameterChangedError: It cannot be held.
        """
        found = self.own()
        if found is not None and self.is_new(found):
            if found.is_inference():  # outside of torch.inference_mode nothing could write into it
                found = self.site.put_normal(found)
            self._check_successor(found)
            self.remember(found)

    def _follow(self, found: Tensor, known: Tensor) -> None:
        self._check_successor(found)
        if self.site.is_buffer and _is_converted(known, found):
            return
        pair = self.frozen.adopt(self.name, found)
        if pair is not None:
            self.frozen.changes += 1
            pair[0].follow(found, known.dtype)

    def _check_successor(self, found: Tensor) -> None:
        try:
            check_supported(found)
        except UnsupportedParameterError as error:
            raise ParameterChangedError(
                f"`{self.name}` was replaced after it was frozen: {error.fact}",
                "call remove() before the model is quantized or converted",
            ) from error
        self.frozen.by_name[self.name].check_shape(found)

    def remember(self, found: Tensor) -> None:
        """Take a parameter for the one that stands here; one that is spread over ranks comes and goes."""
        if self._is_sharded or is_sharded(found):
            self.site.known.pop(self.site.key, None)
        else:
            self.site.known[self.site.key] = found


def _is_converted(known: Tensor, found: Tensor) -> bool:
    """Return whether a buffer holds what another held: `Module.to` puts a new one in place of each, drifted or not."""
    return not bool(differ(known.detach().to(found), found.detach()).any())
