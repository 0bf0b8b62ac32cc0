"""Checks whether everything that holds frozen entries is in place: hooks on gradients and modules, and guards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Final

from torch import Tensor, nn

from .._errors import ParameterChangedError, UnguardedError
from .._held.held import HeldParameters
from .._held.site import Site
from .._hooks.forward import has_root_hooks
from .._hooks.gradient import is_watched
from .._hooks.hook_set import HookSet, uncalled_owners
from .._optim.state import stepped_by
from .._optim.step import StepHooks

_GUARD: Final = "a guarded optimizer"


@dataclass(frozen=True, slots=True)
class Mechanisms:
    """What holds the frozen entries of one parameter.

    Attributes:
        trained: Whether the parameter requires a gradient: without one, no optimizer steps it.
        gradient_hook: Whether its gradient is zeroed at the frozen entries.
        forward_hook: Whether the values are imposed before its module's forward; None for a bare tensor.
        checkpoint_hooks: Whether they are imposed around saving and loading; None for a bare tensor.
        optimizers: The class names of the guarded optimizers that step it; empty if its names refer to several tensors
            by now, and one of these is not guarded.
    """

    trained: bool
    gradient_hook: bool
    forward_hook: bool | None
    checkpoint_hooks: bool | None
    optimizers: tuple[str, ...]

    @property
    def missing(self) -> tuple[str, ...]:
        """The mechanisms that are missing; empty if the frozen entries are held."""
        absent = {
            "the gradient hook": self.trained and not self.gradient_hook,
            "the forward hook": self.forward_hook is False,
            "a hook for saving or loading": self.checkpoint_hooks is False,
            _GUARD: self.trained and not self.optimizers,
        }
        return tuple(name for name, is_absent in absent.items() if is_absent)


def find_mechanisms(held: HeldParameters, hooks: Mapping[nn.Module, HookSet]) -> dict[str, Mechanisms]:
    """Find what holds the frozen entries of each parameter, by its name.

    Args:
        held: The frozen parameters and their sites.
        hooks: The hooks of the handle on the modules that own those parameters.
    """
    on_modules = _OnModules(held, hooks)
    steps = _guarded_steps(held)
    sites = held.sites_by_name()
    return {name: _mechanisms(held, name, sites[name], on_modules, steps) for name in sites}


def _mechanisms(
    held: HeldParameters, name: str, sites: Sequence[Site], on_modules: _OnModules, steps: Mapping[int, Sequence[str]]
) -> Mechanisms:
    parameters = _parameters(held, name, sites)
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    lost = [on_modules.lost(site.owner, site.key, name) for site in sites if isinstance(site.owner, nn.Module)]
    by_parameter = [steps.get(id(parameter), ()) for parameter in trained or parameters]
    return Mechanisms(
        trained=bool(trained),
        gradient_hook=all(is_watched(parameter, held.frozen, name) for parameter in trained or parameters),
        forward_hook=not any("forward" in moments for moments in lost) if lost else None,
        checkpoint_hooks=not any({"saving", "loading"} & moments for moments in lost) if lost else None,
        optimizers=tuple(sorted(chain(*by_parameter))) if all(by_parameter) else (),
    )


def _parameters(held: HeldParameters, name: str, sites: Sequence[Site]) -> list[Tensor]:
    found: dict[int, Tensor] = {}
    for site in sites:
        pair = held.frozen.adopt(name, site.tensor())
        parameter = site.tensor() if pair is None else pair[1]
        found[id(parameter)] = parameter
    return list(found.values())


class _OnModules:
    """The hooks that impose the values of a handle on the modules of a model, as they are now."""

    def __init__(self, held: HeldParameters, hooks: Mapping[nn.Module, HookSet]) -> None:
        self._held = held
        self._hooks = hooks
        self._callers = uncalled_owners(held.model) if isinstance(held.model, nn.Module) else {}
        self._has_root = held.is_found or has_root_hooks(held.model, held.frozen)

    def lost(self, owner: nn.Module, key: str, name: str) -> set[str]:
        """Return the moments ("forward", "saving", "loading") at which nothing imposes the values on a parameter."""
        if owner not in self._hooks or self._hooks[owner].names.get(key) != name:
            return {"forward", "saving", "loading"}
        before_model = {"forward"} if self._held.frozen.by_name[name].is_sharded and not self._has_root else set()
        return before_model | self._hooks[owner].lost(owner, self._callers.get(owner, []))


def _guarded_steps(held: HeldParameters) -> dict[int, list[str]]:
    """Return the class names of the optimizers that are guarded for each parameter, by the parameter's id."""
    found: dict[int, list[str]] = {}
    held_by = cache(_parameters_of)
    for hooks in held.frozen.living_guards():
        optimizer = hooks.optimizer
        if optimizer is not None and isinstance(hooks, StepHooks) and hooks.is_alive:
            stepped = stepped_by(optimizer)
            for member in hooks.members:
                if member.frozen is held.frozen:
                    for number in held_by(member) & stepped:
                        found.setdefault(number, []).append(type(optimizer).__name__)
    return found


def _parameters_of(held: HeldParameters) -> set[int]:
    """Return the ids of the parameters that are held; none if one is gone, which raises in the next step."""
    with suppress(ParameterChangedError):
        return {id(parameter) for _, parameter in held}
    return set()


def check_complete(mechanisms: Mapping[str, Mechanisms], *, guarded: bool, removal: str = "") -> None:
    """Raise if a mechanism that holds frozen entries is missing.

    Args:
        mechanisms: What holds each parameter, by its name.
        guarded: Whether a guarded optimizer is required.
        removal: A description of what was removed, if anything.

    Raises:
        UnguardedError: Something is missing; the message names the parameters.
    """
    passed = () if guarded else (_GUARD,)
    gaps = {name: [gap for gap in found.missing if gap not in passed] for name, found in mechanisms.items()}
    missing = f"missing is {said(gaps)}" if any(gaps.values()) else ""
    if removal:
        fact = ", so ".join(filter(None, [removal, missing]))
        raise UnguardedError(fact, "hold the entries again with frozen.attach()" if mechanisms else "freeze again")
    if missing:
        raise UnguardedError(f"frozen entries are held only in part: {missing}", _remedy(gaps.values()))


def said(gaps: Mapping[str, Sequence[str]]) -> str:
    """Describe what is missing, with the names of the parameters that lack the same thing together."""
    alike: dict[str, list[str]] = {}
    for name, missing in gaps.items():
        if missing:
            alike.setdefault(", ".join(missing), []).append(f"`{name}`")
    return "; ".join(f"{missing} of {', '.join(names)}" for missing, names in alike.items())


def _remedy(gaps: Iterable[Sequence[str]]) -> str:
    missing = {gap for found in gaps for gap in found}
    steps = ["reinstall the hooks with frozen.remove() and frozen.attach()"] if missing - {_GUARD} else []
    if _GUARD in missing:
        steps.append(
            "guard every optimizer that steps them (MaskedOptimizer or frozen.guard); if none does, call "
            "assert_frozen(guarded=False)"
        )
    return "; ".join(steps)
