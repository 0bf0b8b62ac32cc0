"""Whether all that shall hold frozen entries is in place: hooks on parameters and modules, guards on optimizers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Final, TypeAlias

from torch import nn

from .._errors import ParameterChangedError, UnguardedError
from .._held.names import Site
from .._held.parameter import FrozenPart
from .._held.resolve import Model
from .._hooks.module import ModuleHooks, is_watched, silent_callers
from .._optim.compact import Held
from .._optim.state import stepped_by
from .._optim.step import living_guards

_GUARD: Final = "a guarded optimizer"

Guarded: TypeAlias = "Mapping[tuple[int, int], Sequence[str]]"
"""By the ids of a part and a parameter: the optimizers that step the one and are guarded for the other."""


@dataclass(frozen=True, slots=True)
class Mechanisms:
    """What holds the frozen entries of one parameter.

    Attributes:
        trained: Whether the parameter requires a gradient: without one, no optimizer steps it.
        gradient_hook: Whether its gradient is zeroed at the frozen entries.
        forward_hook: Whether the values are imposed before its module's forward; None for a bare tensor.
        checkpoint_hooks: Whether they are imposed around saving and loading; None for a bare tensor.
        optimizers: The optimizers that step it and are guarded, by the names of their classes; none where its names no
            longer stand for one tensor, and one of these is not guarded.
    """

    trained: bool
    gradient_hook: bool
    forward_hook: bool | None
    checkpoint_hooks: bool | None
    optimizers: tuple[str, ...]

    @property
    def missing(self) -> tuple[str, ...]:
        """What should hold the frozen entries and is not there; empty where everything is."""
        absent = {
            "the gradient hook": self.trained and not self.gradient_hook,
            "the forward hook": self.forward_hook is False,
            "a hook for saving or loading": self.checkpoint_hooks is False,
            _GUARD: self.trained and not self.optimizers,
        }
        return tuple(name for name, is_absent in absent.items() if is_absent)


def find_mechanisms(part: FrozenPart, sites: Sequence[Site], on_modules: OnModules, guarded: Guarded) -> Mechanisms:
    """Look for what holds the frozen entries of one parameter.

    Args:
        part: What is frozen of it.
        sites: The places that hold it.
        on_modules: The hooks of the handle on the modules that own such places, and on those that call them.
        guarded: What `guarded_now` returned.
    """
    parameters = list({id(found): found for found in (part.current(site.tensor()) for site in sites)}.values())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    lost = [on_modules.lost(site.owner, site.key, part) for site in sites if isinstance(site.owner, nn.Module)]
    by_parameter = [guarded.get((id(part), id(parameter)), ()) for parameter in trained or parameters]
    return Mechanisms(
        trained=bool(trained),
        gradient_hook=all(is_watched(parameter, part) for parameter in trained or parameters),
        forward_hook=not any("forward" in moments for moments in lost) if lost else None,
        checkpoint_hooks=not any({"saving", "loading"} & moments for moments in lost) if lost else None,
        optimizers=tuple(sorted(chain(*by_parameter))) if all(by_parameter) else (),
    )


class OnModules:
    """What imposes the values of a handle on the modules of a model, as it is now.

    Args:
        model: The model, or a mapping of bare tensors, which has no modules.
        hooks: The hooks of the handle on the modules that own parameters.
        has_model_hook: Whether something imposes before the forward of the whole model, on what FSDP2 gathers.
    """

    def __init__(self, model: Model, hooks: Mapping[nn.Module, ModuleHooks], *, has_model_hook: bool) -> None:
        self._hooks = hooks
        self._callers = silent_callers(model) if isinstance(model, nn.Module) else {}
        self._has_model_hook = has_model_hook

    def lost(self, owner: nn.Module, key: str, part: FrozenPart) -> set[str]:
        """Return the moments at which nothing imposes the values on one place."""
        if owner not in self._hooks or self._hooks[owner].parts.get(key) is not part:
            return {"forward", "saving", "loading"}
        before_model = {"forward"} if part.is_spread and not self._has_model_hook else set()
        return before_model | self._hooks[owner].lost(owner, self._callers.get(owner, []))


def guarded_now() -> Guarded:
    """Return what the guards of all handles hold now; each handle and each optimizer is asked once."""
    found: dict[tuple[int, int], list[str]] = {}
    held_by, steps = cache(_held), cache(stepped_by)
    for guard in living_guards():
        optimizer = guard.optimizer
        if optimizer is not None:
            held = held_by(guard.held)
            for parameter in held.keys() & steps(optimizer):
                for part in held[parameter]:
                    found.setdefault((part, parameter), []).append(type(optimizer).__name__)
    return found


def _held(held: Held) -> dict[int, list[int]]:
    """Return the ids of what a handle freezes of each parameter, by the parameter's id."""
    found: dict[int, list[int]] = {}
    with suppress(ParameterChangedError):  # perhaps of another model: the handle itself says so, and its next step
        for part, parameter in held():
            found.setdefault(id(parameter), []).append(id(part))
    return found


def check_complete(mechanisms: Mapping[str, Mechanisms], *, guarded: bool) -> None:
    """Refuse parameters that are held only in part.

    Args:
        mechanisms: What holds each parameter, by its name.
        guarded: Whether a guarded optimizer counts.

    Raises:
        UnguardedError: Something is missing; the message says of which parameters.
    """
    passed = () if guarded else (_GUARD,)
    gaps = {name: [gap for gap in found.missing if gap not in passed] for name, found in mechanisms.items()}
    if any(gaps.values()):
        raise UnguardedError(f"frozen entries are held only in part: missing is {said(gaps)}", _remedy(gaps.values()))


def said(gaps: Mapping[str, Sequence[str]]) -> str:
    """Say what is missing of which parameters, those that lack the same in one breath."""
    alike: dict[str, list[str]] = {}
    for name, missing in gaps.items():
        if missing:
            alike.setdefault(", ".join(missing), []).append(f"`{name}`")
    return "; ".join(f"{missing} of {', '.join(names)}" for missing, names in alike.items())


def _remedy(gaps: Iterable[Sequence[str]]) -> str:
    missing = {gap for found in gaps for gap in found}
    steps = ["put the hooks on again with frozen.remove() and frozen.attach()"] if missing - {_GUARD} else []
    if _GUARD in missing:
        steps.append(
            "guard every optimizer that steps them (MaskedOptimizer or frozen.guard); where none does, say "
            "assert_frozen(guarded=False)"
        )
    return "; ".join(steps)
