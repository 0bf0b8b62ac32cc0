"""Tells whether the step of an optimizer calls its hooks, even if it was replaced by another function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any, Final

from torch.optim import Optimizer

from .._errors import UnguardedError

_HOOKED: Final = Optimizer.profile_hook_step(lambda _: None).__code__
"""The code of every wrapper that `Optimizer.profile_hook_step` returns, which calls hooks."""

_FAR_ENOUGH: Final = 100
"""After how many functions the search for a step ends."""


def current_step(optimizer: Optimizer) -> Any:
    """Return what `optimizer.step` calls: a function assigned to the optimizer, or that of its class.

    Schedulers assign one that calls the class's own, and so do mixed precision and users.
    """
    return vars(optimizer).get("step", type(optimizer).step)


def calls_hooks(step: Callable[..., Any]) -> bool:
    """Return whether a step calls hooks, as far as can be told without calling it.

    It does if torch has marked it, or if what it wraps, contains or names leads to a marked step or to any attribute
    named `step`.
    """
    found, seen = [step], set[int]()
    while found and len(seen) < _FAR_ENOUGH:
        each = found.pop(0)
        if id(each) in seen:
            continue
        seen.add(id(each))
        if getattr(each, "hooked", False) or _calls_a_step(getattr(each, "__code__", None)):
            return True
        found.extend(inside for inside in _reached_by(each) if callable(inside) and not isinstance(inside, type))
    return False


def _calls_a_step(code: Any) -> bool:
    return code is _HOOKED or any("step" in each.co_names for each in _nested(code))


def _nested(code: Any) -> Iterator[CodeType]:
    """Yield the code of a function and of the functions defined inside it; nothing if it has no Python code."""
    if isinstance(code, CodeType):
        yield code
        for constant in code.co_consts:
            yield from _nested(constant)


def _reached_by(function: Any) -> Iterator[Any]:
    """Yield what a function, a bound method, a partial or any other callable object may call."""
    for name in ("__func__", "__wrapped__", "func"):
        yield getattr(function, name, None)
    yield from getattr(function, "args", ()) or ()
    yield from getattr(function, "__dict__", {}).values()
    for cell in getattr(function, "__closure__", None) or ():
        yield from _contents(cell)
    names = getattr(function, "__globals__", {})
    for code in _nested(getattr(function, "__code__", None)):
        yield from (names[name] for name in code.co_names if name in names)


def _contents(cell: Any) -> Iterator[Any]:
    try:
        yield cell.cell_contents
    except ValueError:  # nothing was assigned yet
        return


def check_step(optimizer: Optimizer, step: Any) -> None:
    """Reject a step that calls no hooks, through which nothing would be held.

    Raises:
        UnguardedError: The step calls no hooks.
    """
    if not calls_hooks(step):
        name = getattr(step, "__qualname__", type(step).__name__)
        raise UnguardedError(
            f"the step of `{type(optimizer).__name__}` was replaced by `{name}`, which calls no step hooks, so nothing "
            "holds frozen entries through it",
            "let it call the step that it replaces, or make it call the hooks: "
            "optimizer.step = types.MethodType(torch.optim.Optimizer.profile_hook_step(step), optimizer)",
        )
