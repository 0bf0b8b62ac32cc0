"""A frozen parameter at one of its sites: finds the tensor there, and follows it when it is replaced."""

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
    """A frozen parameter of a handle, at one site that holds it.

    Attributes:
        frozen: The frozen parameters of the handle.
        name: The parameter's name in `frozen`.
        site: The module or mapping that holds the parameter, and its key there.
        is_wanted: Whether to write to it now; places that are not wanted are listed because that may change.
    """

    frozen: FrozenParameters
    name: str
    site: Site
    is_wanted: bool = True

    def own(self) -> Tensor | None:
        """Return the parameter or buffer at the site, or None if it is swapped out for the duration of a call.

        `torch.func.functional_call` and nn.DataParallel do so. What they put there belongs to the caller, and may be
        the parameter of another model.

        Raises:
            ParameterChangedError: There is no tensor at the site.
            UnsupportedParameterError: It is an expanded weight, torch's own way to per-sample gradients, which
                bypasses every hook.
        """
        owner = self.site.owner
        if isinstance(owner, nn.Module) and is_replica(owner):
            return None
        found = self.site.find()
        if found is None:
            raise gone(self.name, owner)
        if is_expanded_weight(found):
            raise UnsupportedParameterError(
                f"`{self.name}` is used for per-sample gradients by torch's expanded weights, which write them to the "
                "parameter without calling any hook",
                "use Opacus's own hooks, grad_sample_mode='hooks', or remove the frozen entries first",
            )
        is_own = isinstance(found, nn.Parameter) or self.site.is_buffer
        is_plain = isinstance(owner, nn.Module) and not is_own
        return None if is_plain or (self.is_new(found) and is_inside_functional_call()) else found

    def is_new(self, found: Tensor) -> bool:
        """Return whether the tensor replaced the one that was last seen at the site.

        Under FSDP2, where shards and gathered parameters alternate, it never counts as a replacement.
        """
        known = self.site.known.get(self.site.key)
        return known is not None and known is not found and not (self._is_sharded or is_sharded(found))

    @property
    def _is_sharded(self) -> bool:
        return self.name in self.frozen.by_name and self.frozen.by_name[self.name].is_sharded

    def pair(self) -> tuple[FrozenParameter, Tensor] | None:
        """Return the frozen parameter and the tensor to write to, or None if that tensor is not at the site now.

        Raises:
            ParameterChangedError: There is no tensor, or it replaced another one and cannot be frozen.
        """
        found = self.own()
        return None if found is None else self.adopt(found)

    def adopt(self, found: Tensor) -> tuple[FrozenParameter, Tensor] | None:
        """Do what `pair` does for the tensor that `own` returned, and follow it if it replaced another one."""
        if not self.frozen.is_held(self.name):
            return self.frozen.adopt(self.name, found)
        known = self.site.known.get(self.site.key)
        is_loaded = known is not None and not (known.is_meta or found.is_meta)  # `to_empty` replaces meta tensors
        if known is not None and is_loaded and self.is_new(found):
            self._follow(found, known)
        self.remember(found)
        return self.frozen.adopt(self.name, found)

    def accept_assigned(self) -> None:
        """Accept a buffer that a forward assigned, without updating `keep` as for one that was loaded.

        Raises:
            ParameterChangedError: It cannot be frozen.
        """
        found = self.own()
        if found is not None and self.is_new(found):
            if found.is_inference():  # nothing outside torch.inference_mode could write into it
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
        """Remember the tensor at the site, to notice when it is replaced; not for sharded ones, which alternate."""
        if self._is_sharded or is_sharded(found):
            self.site.known.pop(self.site.key, None)
        else:
            self.site.known[self.site.key] = found


def _is_converted(known: Tensor, found: Tensor) -> bool:
    """Return whether a buffer equals another in its dtype: `Module.to` replaces every buffer, drifted or not."""
    return not bool(differ(known.detach().to(found), found.detach()).any())
