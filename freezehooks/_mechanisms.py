"""Whether all that shall hold frozen entries is in place: hooks on parameters and modules, guards on optimizers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from torch import nn

from ._errors import UnguardedError
from ._frozen import FrozenPart
from ._guard import living_guards
from ._hooks import ModuleHooks, is_watched
from ._targets import Site

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
        optimizers: The optimizers that step it and are guarded, by the names of their classes.
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


def find_mechanisms(
    part: FrozenPart, sites: Sequence[Site], hooks: Mapping[nn.Module, ModuleHooks], guarded: Guarded
) -> Mechanisms:
    """Look for what holds the frozen entries of one parameter.

    Args:
        part: What is frozen of it.
        sites: The places that hold it.
        hooks: The hooks of the handle on the modules that own such places.
        guarded: What `guarded_now` returned.
    """
    parameters = [part.current(site.tensor()) for site in sites]
    lost = [_lost(site.owner, site.key, part, hooks) for site in sites if isinstance(site.owner, nn.Module)]
    pairs = dict.fromkeys((id(part), id(parameter)) for parameter in parameters)
    return Mechanisms(
        trained=any(parameter.requires_grad for parameter in parameters),
        gradient_hook=all(is_watched(parameter, part) for parameter in parameters),
        forward_hook=not any("forward" in moments for moments in lost) if lost else None,
        checkpoint_hooks=not any({"saving", "loading"} & moments for moments in lost) if lost else None,
        optimizers=tuple(sorted(name for pair in pairs for name in guarded.get(pair, ()))),
    )


def _lost(owner: nn.Module, key: str, part: FrozenPart, hooks: Mapping[nn.Module, ModuleHooks]) -> set[str]:
    """Return the moments at which nothing imposes the values on one place."""
    if owner in hooks and hooks[owner].parts.get(key) is part:
        return hooks[owner].lost(owner)
    return {"forward", "saving", "loading"}


def guarded_now() -> Guarded:
    """Return what the guards of all handles hold now."""
    found: dict[tuple[int, int], list[str]] = {}
    for guard in living_guards():
        for part, parameter in guard.holds():
            found.setdefault((id(part), id(parameter)), []).append(type(guard.optimizer).__name__)
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
