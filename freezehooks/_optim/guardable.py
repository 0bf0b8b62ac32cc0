"""Finds the optimizers to guard: the given one, and those inside it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from torch.optim import Optimizer

from .._errors import SpecError
from .calls import check_step, current_step
from .step import MOMENTS


def guardable(optimizer: Any) -> list[Optimizer]:
    """Return the optimizers whose hooks hold entries through an optimizer's steps, the outermost first.

    A wrapper that skips `Optimizer.__init__` has no hooks, only some of them, or those of the optimizer that it wraps:
    then the optimizers inside it are guarded instead.

    Raises:
        SpecError: It is not an optimizer, or neither it nor any optimizer inside it has hooks.
        UnguardedError: A step was replaced by one that calls no hooks.
    """
    _check_is_optimizer(optimizer)
    found = list(_with_hooks(optimizer, set()))
    if not found:
        raise SpecError(
            f"`{type(optimizer).__name__}` has no step hooks: its class, {_of_its_module(optimizer)}, skips "
            "`Optimizer.__init__`",
            "call super().__init__ in it, or guard the optimizer that it wraps",
        )
    for each in [optimizer, *found]:
        if "step" in vars(each):
            check_step(each, current_step(each))
    return found


def has_own_hooks(optimizer: Optimizer) -> bool:
    """Return whether an optimizer's step calls hooks of its own, and not only those of an optimizer inside it."""
    kept = [getattr(optimizer, moment.kept, None) for moment in MOMENTS]
    if not all(isinstance(hooks, OrderedDict) for hooks in kept):
        return False
    inside = list(_inside(optimizer))
    if any(getattr(each, MOMENTS[0].kept, None) is kept[0] for each in inside):
        return False
    return not inside or getattr(type(optimizer).step, "hooked", False)


def _with_hooks(optimizer: Optimizer, seen: set[int]) -> Iterator[Optimizer]:
    if id(optimizer) not in seen:  # one inside may refer back
        seen.add(id(optimizer))
        if has_own_hooks(optimizer):
            yield optimizer
        for inside in _inside(optimizer):
            yield from _with_hooks(inside, seen)


def _inside(holder: Any) -> Iterator[Optimizer]:
    """Yield the optimizers in an object's attributes, and in lists, tuples and dicts there."""
    for item in getattr(holder, "__dict__", {}).values():
        several = item.values() if isinstance(item, dict) else item if isinstance(item, list | tuple) else [item]
        yield from (each for each in several if isinstance(each, Optimizer) and each is not holder)


def _check_is_optimizer(optimizer: Any) -> None:
    if not isinstance(optimizer, Optimizer):
        wrapped = "".join(f" ({_of_its_module(each)})" for each in _inside(optimizer))
        raise SpecError(
            f"`optimizer` must be a torch.optim.Optimizer, found {_of_its_module(optimizer)}",
            f"if it is a wrapper, guard what it wraps{wrapped}; pass the optimizer first, then the handle: "
            "MaskedOptimizer(optimizer, frozen)",
        )


def _of_its_module(found: Any) -> str:
    """Return the names of an object's class and its module: many libraries have an `AdamW`."""
    kind = type(found)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__qualname__} of {kind.__module__}"
