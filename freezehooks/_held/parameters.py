"""What one call of `freeze_entries` froze: the object that everything which holds it shares."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from .._errors import ParameterChangedError, TargetError
from .._ranks.sharding import is_gathered, is_sharded, layout_of
from .._torch import is_tensor_subclass
from .names import unwrapped
from .parameter import FrozenParameter


class FrozenParameters:
    """Frozen parameters by name.

    Hooks on modules, on gradients and on optimizers all refer to one such object and to a name in it, so that what is
    frozen of a parameter that is moved, sharded, loaded or thawed is replaced in one place. It refers to no parameter
    and to no module: whatever holds it keeps nothing of the model alive.

    Attributes:
        by_name: The frozen parameters: a plain dict, since compiled frames look into it.
        released: The names of those that are not held at present.
        changes: How often something of it has changed, or a parameter was found elsewhere than before: whoever has
            planned a write looks again then.
        guards: What guards an optimizer for these parameters.
        skips_gradients: Whether gradients of frozen rows are not computed at all, where a module can do without.
        skipped: How many parameters a rule with wildcards found without any entry of its region, by the rule's text.
    """

    def __init__(self) -> None:
        self.by_name: dict[str, FrozenParameter] = {}
        self.released: set[str] = set()
        self.changes = 0
        self.guards: list[weakref.ref[Any]] = []
        self.skips_gradients = False
        self.skipped: dict[str, int] = {}
        self._sharded: dict[str, Tensor] = {}

    def is_held(self, name: str) -> bool:
        """Return whether entries of a parameter are held at present."""
        return name in self.by_name and name not in self.released

    def release(self, names: Iterable[str]) -> None:
        """Hold some parameters no longer, until `hold`."""
        self.released.update(names)
        self.changes += 1

    def hold(self, names: Iterable[str]) -> None:
        """Hold some parameters from now on."""
        self.released.difference_update(names)
        self.changes += 1

    def thaw(self, names: Iterable[str]) -> None:
        """Forget some parameters."""
        for name in names:
            self.by_name.pop(name, None)
        self.changes += 1

    def replace(self, by_name: Mapping[str, FrozenParameter]) -> None:
        """Hold other entries of some parameters, or at other values."""
        self.by_name.update(by_name)
        self.changes += 1

    def find(self, name: str, among: Iterable[str]) -> FrozenParameter:
        """Return the parameter that goes by a name, under any of its names, with or without those of wrappers.

        Raises:
            TargetError: None of those it is sought among does.
        """
        parameters = [self.by_name[each] for each in among]
        for parameter in parameters:
            if name in parameter.names:
                return parameter
        for parameter in parameters:
            if unwrapped(name) in map(unwrapped, parameter.names):
                return parameter
        raise self.not_frozen(name, among)

    def not_frozen(self, target: str, among: Iterable[str]) -> TargetError:
        """Return the error for a target of which nothing is frozen."""
        return TargetError(f"nothing of `{target}` is frozen", f"frozen are {', '.join(among) or 'none'}")

    def adopt(self, name: str, parameter: Tensor) -> tuple[FrozenParameter, Tensor] | None:
        """Pair what is frozen under a name with the tensor to write to; renew it where the tensor is not as it was.

        Args:
            name: A name in `by_name`.
            parameter: The tensor that stands in the parameter's place now.

        Returns:
            For a parameter that FSDP2 has gathered for a while, the sharded one, since writes to the other are lost;
            None where that is not known.

        Raises:
            ParameterChangedError: It was quantized.
        """
        frozen = self.by_name[name]
        if is_gathered(layout_of(parameter), frozen.layout):
            original = self.sharded_original(name)
            return None if original is None else (frozen, original)
        if is_sharded(parameter):
            self._sharded[name] = parameter
        elif type(parameter) is not nn.Parameter and is_tensor_subclass(parameter):
            raise ParameterChangedError(
                f"`{name}` became a tensor subclass ({type(parameter).__name__}) after it was frozen: its numbers lie "
                "in other tensors",
                "call remove() before the model is quantized or converted",
            )
        found = frozen.for_tensor(parameter)
        if found is not frozen:
            self.by_name[name] = found
        return found, parameter

    def sharded_original(self, name: str) -> Tensor | None:
        """Return the sharded parameter that an optimizer steps, where one was seen under this name."""
        return self._sharded.get(name)

    def living_guards(self) -> list[Any]:
        """Return what guards an optimizer for these parameters and still lives."""
        found = [reference() for reference in tuple(self.guards)]  # another thread may add one meanwhile
        return [guard for guard in found if guard is not None]

    def check_guards(self) -> None:
        """Refuse a guarded optimizer whose step was replaced by one that calls no hooks.

        Raises:
            UnguardedError: One was.
        """
        for guard in self.living_guards():
            guard.check()

    def __getstate__(self) -> dict[str, Any]:
        kept = "by_name", "released", "skips_gradients", "skipped"
        return {name: value for name, value in vars(self).items() if name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]  # a copied model has optimizers and shards of its own
        vars(self).update(state)
