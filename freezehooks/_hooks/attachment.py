"""All hooks of one handle on a model: on gradients, on the modules that own parameters, and on modules around them."""

from __future__ import annotations

from collections.abc import Container

from torch import nn

from .._held.held import HeldParameters
from .._held.parameters import FrozenParameters
from .._held.site import Site
from .forward import install_outer, remove_outer
from .gradient import unwatch_gradient, watch_gradient
from .hook_set import HookSet, hook_set_of, uncalled_owners
from .skipped import skip_frozen_rows


class Attachment:
    """The hooks of one handle on a model, even if another object for the same handle installed them."""

    def __init__(self, held: HeldParameters) -> None:
        self._held = held

    @property
    def by_module(self) -> dict[nn.Module, HookSet]:
        """The hook set on each module that owns a frozen parameter."""
        owners = dict.fromkeys(site.owner for _, site in self._held.sites if isinstance(site.owner, nn.Module))
        found = {owner: hook_set_of(self._held.frozen, owner) for owner in owners}
        return {owner: hooks for owner, hooks in found.items() if hooks is not None}

    def is_on(self, name: str, site: Site) -> bool:
        """Return whether the parameter at a site is held now."""
        if isinstance(site.owner, nn.Module):
            hooks = hook_set_of(self._held.frozen, site.owner)
            if hooks is None or hooks.names.get(site.key) != name:
                return False
        return self._held.frozen.is_held(name)

    def install(self) -> None:
        """Install the hooks on everything that is held; those that are there already are replaced."""
        self._remove_from_modules()
        for frozen, parameter in self._held:
            watch_gradient(parameter, self._held.frozen, frozen.name)
        by_module: dict[nn.Module, HookSet] = {}
        for name, site in self._held.held_sites():
            if isinstance(site.owner, nn.Module):
                by_module.setdefault(site.owner, HookSet(self._held.frozen, site.known)).names[site.key] = name
        callers = uncalled_owners(self._held.model) if isinstance(self._held.model, nn.Module) else {}
        for module, hooks in by_module.items():
            hooks.install(module, callers.get(module, []))
            if self._held.frozen.skips_gradients and module not in callers:
                skip_frozen_rows(module, hooks)
        if by_module:
            install_outer(self._held.model, self._held.frozen)

    def follow_rebuilt(self) -> None:
        """Move the hooks from containers that left the model to the ones that replaced them."""
        rebuilt = self._held.rebuilt()
        if rebuilt:
            self._remove_from_modules()
            self._held.move_to(rebuilt)
            if self._held.is_held:
                self.install()

    def add_copied(self, module: nn.Module, hooks: HookSet) -> None:
        """Add the hooks that a copied model has on one of its modules."""
        for place in hooks.places(module):
            self._held.sites.append((place.name, place.site))
            pair = place.pair()
            if pair is not None:
                watch_gradient(pair[1], hooks.frozen, place.name)

    def renew(self) -> None:
        """Install the gradient hooks again, which a copied or unpickled tensor has lost."""
        for name, site in self._held.held_sites():
            parameter = site.find() if site.is_whole else None  # otherwise the first forward does it
            pair = None if parameter is None else self._held.frozen.adopt(name, parameter)
            if pair is not None:
                watch_gradient(pair[1], self._held.frozen, name)

    def release(self, names: Container[str]) -> None:
        """Remove the hooks from every site of some parameters."""
        for name, site in self._held.sites:
            if name in names:
                take_off(self._held.frozen, name, site)

    def remove(self) -> None:
        """Remove all hooks."""
        self.release({name for name, _ in self._held.sites})
        self._remove_from_modules()

    def _remove_from_modules(self) -> None:
        for hooks in self.by_module.values():
            hooks.remove()
        remove_outer(self._held.model, self._held.frozen)


def take_off(frozen: FrozenParameters, name: str, site: Site) -> None:
    """Remove the hooks of a handle from one site of a parameter."""
    parameter = site.find()
    if parameter is not None:
        unwatch_gradient(parameter, frozen, name)
    site.known.pop(site.key, None)
    hooks = hook_set_of(frozen, site.owner) if isinstance(site.owner, nn.Module) else None
    if hooks is not None and hooks.names.get(site.key) == name:
        hooks.drop(site.key)
