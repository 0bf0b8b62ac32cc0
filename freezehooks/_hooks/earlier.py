"""Earlier handles on the same parameters: checks for conflicts, reports repetitions, and thaws what they hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Final, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from .._counted import counted
from .._errors import ParameterChangedError, RuleConflictError
from .._held.held import HeldParameters
from .._held.parameter import FrozenParameter
from .._held.parameters import FrozenParameters
from .._held.site import Site
from .._torch import gradient_hooks
from .attachment import take_off
from .forward import remove_outer
from .gradient import ZeroFrozenGradient
from .hook_set import hook_sets_on

WAY_OUT: Final = (
    "remove the earlier handle (`for f in FrozenEntries.of(model): f.remove()`), or replace what it holds in these "
    "parameters with freeze_entries(..., replace=True)"
)


class Hold(NamedTuple):
    """A parameter that one handle holds: the handle's frozen parameters, and the parameter's name there."""

    frozen: FrozenParameters
    name: str

    def on(self, parameter: Tensor) -> FrozenParameter:
        """Return the frozen parameter, for the tensor as it is now."""
        pair = self.frozen.adopt(self.name, parameter)
        return self.frozen.by_name[self.name] if pair is None else pair[0]


class EarlierHandles:
    """What other handles hold now in the parameters of one handle.

    Args:
        held: The parameters of that handle, which may not be attached yet.
    """

    def __init__(self, held: HeldParameters) -> None:
        self._held = held
        self._sites = held.sites_by_name()

    def check(self, by_name: Mapping[str, FrozenParameter] | None = None) -> None:
        """Reject what the handle freezes if another one holds the same entry at another value.

        Args:
            by_name: What the handle is going to freeze in each parameter; None for what it freezes now.

        Raises:
            RuleConflictError: Two handles disagree; the message names both rules and the way out.
        """
        for frozen, parameter, holds in self._shared():
            for hold in holds:
                try:
                    (frozen if by_name is None else by_name[frozen.name]).check_beside(hold.on(parameter))
                except RuleConflictError as error:
                    fact = f"an earlier handle holds `{frozen.name}` at other values: {error.fact}"
                    raise RuleConflictError(fact, f"{error.advice}; or {WAY_OUT}") from None

    def repetitions(self) -> Iterator[str]:
        """Yield a note on how many entries other handles hold already, and how to hold them once, if there are any."""
        repeated: dict[str, int] = {}
        for frozen, parameter, holds in self._shared():
            count = frozen.count_shared([hold.on(parameter) for hold in holds])
            if count:
                repeated[frozen.name] = repeated.get(frozen.name, 0) + count
        if repeated:
            listed = ", ".join(f"{count:,} of `{name}`" for name, count in repeated.items())
            yield (
                f"{counted(sum(repeated.values()), 'entry is', 'entries are')} held by an earlier handle already "
                f"({listed}), and will still be when this one is removed; to hold each once, {WAY_OUT}"
            )

    def beside(self, frozen: FrozenParameter) -> list[FrozenParameter]:
        """Return what other handles freeze in one parameter."""
        holds = self._holds(frozen.name)
        parameter = self._parameter(frozen.name) if holds else None
        return [] if parameter is None else [hold.on(parameter) for hold in holds]

    def guarded(self) -> list[tuple[Optimizer, bool]]:
        """Return the optimizers that other handles guard for these parameters, each with a bool for compact mode."""
        found: dict[int, tuple[Optimizer, bool]] = {}
        for frozen in self._handles():
            for hooks in frozen.living_guards():
                if hooks.optimizer is not None and any(member.frozen is frozen for member in hooks.members):
                    found[id(hooks.optimizer)] = hooks.optimizer, hooks.compact is not None
        return list(found.values())

    def thaw(self) -> None:
        """Thaw these parameters, and no others, in all other handles."""
        handles, holds = self._handles(), [(name, hold) for name in self._held.names for hold in self._holds(name)]
        for frozen in handles:
            reset_guards(frozen)
        for name, hold in holds:
            for site in self._sites[name]:
                take_off(hold.frozen, hold.name, site)
            hold.frozen.thaw([hold.name])
        for frozen in handles:
            if not frozen.by_name:
                remove_outer(self._held.model, frozen)
                leave_released(frozen)

    # Finding them

    def _shared(self) -> Iterator[tuple[FrozenParameter, Tensor, list[Hold]]]:
        for frozen, parameter in self._held:
            holds = self._holds(frozen.name)
            if holds:
                yield frozen, parameter, holds

    def _handles(self) -> list[FrozenParameters]:
        holds = [hold for name in self._held.names for hold in self._holds(name)]
        return list({id(hold.frozen): hold.frozen for hold in holds}.values())

    def _holds(self, name: str) -> list[Hold]:
        found = dict.fromkeys(hold for site in self._sites[name] for hold in _holds_at(site))
        return [hold for hold in found if hold.frozen is not self._held.frozen and hold.frozen.is_held(hold.name)]

    def _parameter(self, name: str) -> Tensor | None:
        for site in self._sites[name]:
            pair = self._held.frozen.adopt(name, site.tensor())
            if pair is not None:
                return pair[1]
        return None


def _holds_at(site: Site) -> Iterator[Hold]:
    """Yield the holds of all handles on the parameter at a site, from its gradient hooks and the module's hooks."""
    parameter = site.find()
    for hook in gradient_hooks(parameter).values() if parameter is not None else ():
        if isinstance(hook, ZeroFrozenGradient):
            yield Hold(hook.frozen, hook.name)
    for hooks in hook_sets_on(site.owner) if isinstance(site.owner, nn.Module) else ():
        if site.key in hooks.names:
            yield Hold(hooks.frozen, hooks.names[site.key])


def copies_in(held: HeldParameters) -> Iterator[Tensor]:
    """Yield the copies of a handle's parameters elsewhere in its model, such as an EMA, that were copied with hooks."""
    names = set(held.names)
    for module in held.model.modules() if isinstance(held.model, nn.Module) else ():
        for hooks in hook_sets_on(module):
            if hooks.frozen is not held.frozen:
                own = (place.own() for place in hooks.places(module) if place.name in names)
                yield from (parameter for parameter in own if parameter is not None)


def reset_guards(frozen: FrozenParameters) -> None:
    """Reset the state of all guarded optimizers at a handle's entries, as if the entries had never moved."""
    for hooks in frozen.living_guards():
        with suppress(ParameterChangedError):  # a parameter that is gone has no state to reset
            hooks.reset()


def leave_released(frozen: FrozenParameters) -> None:
    """Remove the guards of a handle's parameters that are no longer held."""
    for hooks in frozen.living_guards():
        hooks.leave_released()
