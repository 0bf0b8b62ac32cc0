"""The base class of objects that are read like a dict from name to frozen parameter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from typing import Any, TypeVar, overload

from .._errors import TargetError
from .parameter import FrozenParameter

_Default = TypeVar("_Default")


class ReadByName(ABC):
    """Reads like a dict from parameter name to `FrozenParameter`, without being a `Mapping`.

    Code that walks through containers of tensors (to move or save them) rebuilds every `Mapping` from its items. A
    handle cannot be rebuilt like that; to save it, there is its `state_dict`.
    """

    @abstractmethod
    def __getitem__(self, name: str) -> FrozenParameter: ...

    @abstractmethod
    def __iter__(self) -> Iterator[str]: ...

    @abstractmethod
    def __len__(self) -> int: ...

    def __contains__(self, name: object) -> bool:
        return self.get(name) is not None  # type: ignore[call-overload, no-any-return]  # any object may be asked for

    @overload
    def get(self, name: str) -> FrozenParameter | None: ...

    @overload
    def get(self, name: str, default: _Default) -> FrozenParameter | _Default: ...

    def get(self, name: str, default: Any = None) -> Any:
        """Return the frozen parameter with a name, or a default if there is none."""
        try:
            return self[name]
        except TargetError:
            return default

    def keys(self) -> KeysView[str]:
        """Return the names of the parameters with frozen entries."""
        return KeysView(self)  # type: ignore[arg-type]  # it uses only the methods above

    def values(self) -> ValuesView[FrozenParameter]:
        """Return the frozen parameters."""
        return ValuesView(self)  # type: ignore[arg-type]

    def items(self) -> ItemsView[str, FrozenParameter]:
        """Return the pairs of a name and its frozen parameter."""
        return ItemsView(self)  # type: ignore[arg-type]
