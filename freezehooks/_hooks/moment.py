"""The moments at which a module or an optimizer calls a hook."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True, slots=True)
class Moment:
    """One moment.

    Attributes:
        hook: The method of a set of hooks that is called.
        register: Registers it on a module or an optimizer.
        kept: Where torch keeps it there.
        name: What a report calls the moment.
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
