"""Describes hooks of a module or an optimizer: which method is called when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True, slots=True)
class Moment:
    """A moment at which a module or an optimizer calls a hook.

    Attributes:
        hook: The name of the method that is called.
        register: The function that registers it on a module or an optimizer.
        kept: The attribute in which torch keeps such hooks.
        name: The moment's name in reports.
    """

    hook: str
    register: Callable[[Any, Any], RemovableHandle]
    kept: str
    name: str = ""

    def put_on(self, owner: Any, hooks: object) -> RemovableHandle:
        """Register the method of a set of hooks on a module or an optimizer."""
        return self.register(owner, getattr(hooks, self.hook))

    def is_called(self, owner: Any, hooks: object) -> bool:
        """Return whether the method is among the hooks that a module or an optimizer calls now."""
        called = [getattr(hook, "hook", hook) for hook in getattr(owner, self.kept).values()]  # torch wraps some
        return getattr(hooks, self.hook) in called
