"""Reading frozen parameters by their names, as one reads a dict."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from typing import Any, TypeVar, overload

from .._errors import TargetError
from .parameter import FrozenParameter

_Default = TypeVar("_Default")


class ReadByName(ABC):
    """What reads like a dict from parameter name to `FrozenParameter`, and is no `Mapping`.

    Whoever walks through containers of tensors (to move them, to save them) rebuilds every `Mapping` from its items.
    A handle cannot be rebuilt like that, and has a `state_dict` for those who save.
    """

    @abstractmethod
    def __getitem__(self, name: str) -> FrozenParameter: ...

    @abstractmethod
    def __iter__(self) -> Iterator[str]: ...

    @abstractmethod
    def __len__(self) -> int: ...

    def __contains__(self, name: object) -> bool:
        return self.get(name) is not None  # type: ignore[call-overload, no-any-return]  # what is no name is not in it

    @overload
    def get(self, name: str) -> FrozenParameter | None: ...

    @overload
    def get(self, name: str, default: _Default) -> FrozenParameter | _Default: ...

    def get(self, name: str, default: Any = None) -> Any:
        """Return what is frozen of a parameter, or a default where nothing is."""
        try:
            return self[name]
        except TargetError:
            return default

    def keys(self) -> KeysView[str]:
        """Return the names of the parameters of which something is frozen."""
        return KeysView(self)  # type: ignore[arg-type]  # it needs no more of a mapping than stands above

    def values(self) -> ValuesView[FrozenParameter]:
        """Return what is frozen of each parameter."""
        return ValuesView(self)  # type: ignore[arg-type]

    def items(self) -> ItemsView[str, FrozenParameter]:
        """Return each name with what is frozen there."""
        return ItemsView(self)  # type: ignore[arg-type]
