"""The frozen parameters of one handle, in an object that all its hooks and guards share."""

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
    """The frozen parameters of one handle, by name.

    The hooks on modules, gradients and optimizers all refer to one such object and to a name in it. When a parameter
    is moved, sharded, loaded or thawed, its `FrozenParameter` is therefore replaced only here. The object refers to no
    parameter and no module, so that keeping it keeps nothing in the model alive.

    Attributes:
        by_name: The frozen parameters, in a plain dict since compiled code reads it.
        released: The names of those that are not held now.
        changes: A counter of changes, including parameters found at another address; writes are planned again when it
            moves.
        guards: Weak references to the optimizer hooks that guard these parameters.
        skips_gradients: Whether to skip computing the gradients of frozen rows, in modules that support it.
        skipped: How many parameters each rule with wildcards skipped because its region is empty, by the rule's text.
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
        """Return whether the entries of a parameter are held now."""
        return name in self.by_name and name not in self.released

    def release(self, names: Iterable[str]) -> None:
        """Stop holding some parameters until `hold` is called."""
        self.released.update(names)
        self.changes += 1

    def hold(self, names: Iterable[str]) -> None:
        """Start holding some parameters again."""
        self.released.difference_update(names)
        self.changes += 1

    def thaw(self, names: Iterable[str]) -> None:
        """Remove some parameters for good."""
        for name in names:
            self.by_name.pop(name, None)
        self.changes += 1

    def replace(self, by_name: Mapping[str, FrozenParameter]) -> None:
        """Replace some frozen parameters by others, with other entries or values."""
        self.by_name.update(by_name)
        self.changes += 1

    def find(self, name: str, among: Iterable[str]) -> FrozenParameter:
        """Find a frozen parameter by any of its names, with or without the names of wrappers.

        Raises:
            TargetError: None of the parameters in `among` has that name.
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
        """Return the error for a target without frozen entries."""
        return TargetError(f"nothing of `{target}` is frozen", f"frozen are {', '.join(among) or 'none'}")

    def adopt(self, name: str, parameter: Tensor) -> tuple[FrozenParameter, Tensor] | None:
        """Return a frozen parameter and the tensor to write to, after updating it if the tensor was moved or cast.

        Args:
            name: A name in `by_name`.
            parameter: The tensor that the model has under that name now.

        Returns:
            If FSDP2 has gathered the parameter for now, the sharded one, since writes to the gathered one are lost;
            None if the sharded one is not known.

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
        """Return the sharded parameter that was last seen under a name, which an optimizer steps, or None."""
        return self._sharded.get(name)

    def living_guards(self) -> list[Any]:
        """Return the guards of these parameters that still exist."""
        found = [reference() for reference in tuple(self.guards)]  # another thread may add one meanwhile
        return [guard for guard in found if guard is not None]

    def check_guards(self) -> None:
        """Raise if the step of a guarded optimizer was replaced by one that calls no hooks.

        Raises:
            UnguardedError: There is such an optimizer.
        """
        for guard in self.living_guards():
            guard.check()

    def __getstate__(self) -> dict[str, Any]:
        kept = "by_name", "released", "skips_gradients", "skipped"
        return {name: value for name, value in vars(self).items() if name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]  # a copied model gets optimizers and shards of its own
        vars(self).update(state)
