"""What other handles hold already of the parameters of one: where it disagrees, what it repeats, how it is dropped."""

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
    "let the earlier handle go (`for f in FrozenEntries.of(model): f.remove()`), or drop what it holds of these "
    "parameters with freeze_entries(..., replace=True)"
)


class Hold(NamedTuple):
    """What one handle holds of a parameter: what it froze, and the parameter's name there."""

    frozen: FrozenParameters
    name: str

    def part(self, parameter: Tensor) -> FrozenParameter:
        """Return what is frozen, as it lies in the parameter now."""
        pair = self.frozen.adopt(self.name, parameter)
        return self.frozen.by_name[self.name] if pair is None else pair[0]


class EarlierHandles:
    """What other handles hold at present of the parameters of one handle.

    Args:
        held: What that handle freezes, perhaps not yet.
    """

    def __init__(self, held: HeldParameters) -> None:
        self._held = held
        self._sites = held.sites_by_name()

    def check(self, parts: Mapping[str, FrozenParameter] | None = None) -> None:
        """Refuse what the handle freezes where another holds the same entry otherwise.

        Args:
            parts: What the handle is to freeze of each parameter, or None for what it freezes.

        Raises:
            RuleConflictError: It does; the message names both rules, and the way out.
        """
        for part, parameter, holds in self._shared():
            for hold in holds:
                try:
                    (part if parts is None else parts[part.name]).check_beside(hold.part(parameter))
                except RuleConflictError as error:
                    fact = f"an earlier handle holds `{part.name}` otherwise: {error.fact}"
                    raise RuleConflictError(fact, f"{error.advice}; or {WAY_OUT}") from None

    def repetitions(self) -> Iterator[str]:
        """Say how many entries other handles hold already, and how to let them go, where there are any."""
        repeated: dict[str, int] = {}
        for part, parameter, holds in self._shared():
            count = part.count_shared([hold.part(parameter) for hold in holds])
            if count:
                repeated[part.name] = repeated.get(part.name, 0) + count
        if repeated:
            listed = ", ".join(f"{count:,} of `{name}`" for name, count in repeated.items())
            yield (
                f"{counted(sum(repeated.values()), 'entry is', 'entries are')} held by an earlier handle already "
                f"({listed}), and will still be when this one lets go; to hold each once, {WAY_OUT}"
            )

    def beside(self, part: FrozenParameter) -> list[FrozenParameter]:
        """Return what other handles hold of one parameter."""
        holds = self._holds(part.name)
        parameter = self._parameter(part.name) if holds else None
        return [] if parameter is None else [hold.part(parameter) for hold in holds]

    def guarded(self) -> list[tuple[Optimizer, bool]]:
        """Return the optimizers that other handles guard for these parameters, each with whether it is compact."""
        found: dict[int, tuple[Optimizer, bool]] = {}
        for frozen in self._handles():
            for hooks in frozen.living_guards():
                if hooks.optimizer is not None and any(member.frozen is frozen for member in hooks.members):
                    found[id(hooks.optimizer)] = hooks.optimizer, hooks.compact is not None
        return list(found.values())

    def let_go(self) -> None:
        """Drop what other handles hold of these parameters, and of these alone."""
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

    # Looking for them

    def _shared(self) -> Iterator[tuple[FrozenParameter, Tensor, list[Hold]]]:
        for part, parameter in self._held:
            holds = self._holds(part.name)
            if holds:
                yield part, parameter, holds

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
    """Yield what all handles hold of the parameter at one place: gradient hooks say so, and the module's hooks."""
    parameter = site.find()
    for hook in gradient_hooks(parameter).values() if parameter is not None else ():
        if isinstance(hook, ZeroFrozenGradient):
            yield Hold(hook.frozen, hook.name)
    for hooks in hook_sets_on(site.owner) if isinstance(site.owner, nn.Module) else ():
        if site.key in hooks.names:
            yield Hold(hooks.frozen, hooks.names[site.key])


def copies_in(held: HeldParameters) -> Iterator[Tensor]:
    """Yield the copies of a handle's parameters that its model has beside them, and that brought their hooks along."""
    names = set(held.names)
    for module in held.model.modules() if isinstance(held.model, nn.Module) else ():
        for hooks in hook_sets_on(module):
            if hooks.frozen is not held.frozen:
                own = (place.own() for place in hooks.places(module) if place.name in names)
                yield from (parameter for parameter in own if parameter is not None)


def reset_guards(frozen: FrozenParameters) -> None:
    """Make the state of every optimizer that is guarded for a handle what it would be had the entries never moved."""
    for hooks in frozen.living_guards():
        with suppress(ParameterChangedError):  # what is gone from the model has no state to reset
            hooks.reset()


def leave_released(frozen: FrozenParameters) -> None:
    """Have every optimizer that is guarded for a handle leave what is no longer held."""
    for hooks in frozen.living_guards():
        hooks.leave_released()
