"""The frozen parameters of a model, each with all the sites at which the model holds it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .._counted import counted
from .._errors import ParameterChangedError
from .parameter import FrozenParameter
from .parameters import FrozenParameters
from .place import Place
from .site import Site, tensor_of
from .violation import Violation

Model: TypeAlias = "nn.Module | Mapping[str, Tensor]"


class HeldParameters:
    """What a handle and the optimizers that it guards know about a model.

    Iterating yields each frozen parameter with each tensor that it has now.

    Attributes:
        model: The model, or a mapping from name to leaf tensor.
        frozen: The frozen parameters by name; possibly those of a larger model that contained this one.
        sites: Pairs of a name in `frozen` and a site of that parameter.
        is_found: Whether the entries were found in a model, which may be a submodule of the one that was frozen.
        shown: The names that parameters have in the model, by their names in `frozen`, if those differ.
    """

    def __init__(
        self,
        model: Model,
        frozen: FrozenParameters,
        sites: Iterable[tuple[str, Site]] = (),
        *,
        is_found: bool = False,
    ) -> None:
        self.model = model
        self.frozen = frozen
        self.sites = list(sites)
        self.is_found = is_found
        self.shown: dict[str, list[str]] = {}
        self._around: list[dict[str, nn.Module | None]] = []
        self._children: list[list[nn.Module | None]] | None = None

    @property
    def names(self) -> list[str]:
        """The names in `frozen` of the parameters in this model."""
        return list(dict.fromkeys(name for name, _ in self.known_sites()))

    @property
    def parameters(self) -> list[FrozenParameter]:
        """What is frozen in each of `names`."""
        return [self.frozen.by_name[name] for name in self.names]

    @property
    def parameter_names(self) -> list[str]:
        """Those of `names` that are parameters; the others are only buffers, which no optimizer steps."""
        return list(dict.fromkeys(name for name, site in self.known_sites() if not site.is_buffer))

    def show_names_of_model(self) -> None:
        """Fill `shown`: show parameters under the names that they have in this model."""
        paths: dict[Any, list[str]] = {}
        for path, module in (
            self.model.named_modules(remove_duplicate=False) if isinstance(self.model, nn.Module) else ()
        ):
            paths.setdefault(module, []).append(path)
        for name, sites in self.sites_by_name().items():
            self.shown[name] = [f"{path}.{site.key}".lstrip(".") for site in sites for path in paths[site.owner]]

    def as_shown(self, frozen: FrozenParameter) -> FrozenParameter:
        """Return a frozen parameter with the names that it has in the model."""
        return frozen.named(self.shown[frozen.name]) if frozen.name in self.shown else frozen

    def find(self, name: str) -> FrozenParameter:
        """Return the frozen parameter with a name in this model or in the one that was frozen.

        Raises:
            TargetError: Nothing is frozen under that name.
        """
        shown = [key for key in self.names if name in self.shown.get(key, ())]
        return self.frozen.by_name[shown[0]] if shown else self.frozen.find(name, self.names)

    def every_name(self) -> list[str]:
        """Return all names that `find` knows."""
        return [name for each in self.parameters for name in (*self.as_shown(each).names, *each.names)]

    def sites_by_name(self) -> dict[str, list[Site]]:
        """Return the sites of each parameter, by its name in `frozen`."""
        found: dict[str, list[Site]] = {}
        for name, site in self.known_sites():
            found.setdefault(name, []).append(site)
        return found

    @property
    def is_held(self) -> bool:
        """Whether everything is held now that was frozen and not thawed since."""
        known = [name for name, _ in self.known_sites()]
        return (bool(known) or not self.sites) and self.frozen.released.isdisjoint(known)

    @property
    def removal(self) -> str:
        """A description of what is not held now; empty if everything is held."""
        if self.is_held:
            return ""
        names = self.names
        released = [
            f"`{self.as_shown(self.frozen.by_name[name]).name}`" for name in names if not self.frozen.is_held(name)
        ]
        if not names:
            return "removed: another handle has thawed all of it"
        return "removed: none of it is held" if len(released) == len(names) else f"removed: {', '.join(released)}"

    @property
    def skips(self) -> list[str]:
        """A note for each rule with wildcards that skipped parameters where its region is empty."""
        return [
            f"`{rule}` skipped {counted(count, 'parameter that has', 'parameters that have')} no such entry"
            for rule, count in self.frozen.skipped.items()
        ]

    def known_sites(self) -> Iterator[tuple[str, Site]]:
        """Yield the sites of what is still frozen: another handle may have thawed some."""
        return ((name, site) for name, site in self.sites if name in self.frozen.by_name)

    def held_sites(self) -> Iterator[tuple[str, Site]]:
        """Yield the sites whose entries are held now."""
        return ((name, site) for name, site in self.sites if self.frozen.is_held(name))

    def __iter__(self) -> Iterator[tuple[FrozenParameter, Tensor]]:
        seen: set[tuple[str, int]] = set()
        for name, site in self.known_sites():
            pair = self._pair(name, site)
            if pair is not None and (name, id(pair[1])) not in seen:
                seen.add((name, id(pair[1])))
                yield pair

    def _pair(self, name: str, site: Site) -> tuple[FrozenParameter, Tensor] | None:
        if torch.compiler.is_compiling():
            return self.frozen.adopt(name, site.tensor())
        return Place(self.frozen, name, site).pair()

    def check_in_place(self) -> None:
        """Raise if the model no longer contains the frozen parameters.

        Raises:
            ParameterChangedError: A parameter is gone or has another shape, or its module was replaced.
        """
        modules = set(self.model.modules()) if isinstance(self.model, nn.Module) else set()
        modules.update(self.rebuilt())
        for name, site in self.known_sites():
            self.frozen.by_name[name].check_shape(site.tensor())
            if isinstance(site.owner, nn.Module) and site.owner not in modules:
                raise ParameterChangedError(
                    f"the {type(site.owner).__name__} that owned `{name}` is no longer in the model",
                    "call remove() before a module is replaced or converted, and freeze again afterwards",
                )

    def rebuilt(self) -> dict[nn.Module, nn.Module]:
        """Map each container that has left the model to the one that replaced it with the same parameters.

        A container has no forward: the modules that compute with its parameters find them in the new one. Keras
        replaces containers when a model is built.
        """
        kept: dict[nn.Module, list[str]] = {}
        for _, site in self.known_sites():
            if isinstance(site.owner, nn.Module) and type(site.owner).forward is nn.Module.forward:
                kept.setdefault(site.owner, []).append(site.key)
        modules = list(self.model.modules()) if kept and isinstance(self.model, nn.Module) else []
        return {
            owner: module
            for owner, keys in kept.items()
            if owner not in modules
            for module in modules
            if all(tensor_of(owner, key) is tensor_of(module, key) is not None for key in keys)
        }

    def move_to(self, rebuilt: Mapping[nn.Module, nn.Module]) -> None:
        """Replace the modules that own parameters by their successors, as `rebuilt` returned them."""
        self.sites = [(name, replace(site, owner=_successor(site.owner, rebuilt))) for name, site in self.sites]

    def check_modules(self) -> None:
        """Raise if a module that owned frozen parameters was replaced or converted.

        It compares the children of the modules above such owners, and looks at the whole model only if they changed.

        Raises:
            ParameterChangedError: A module was replaced or converted.
        """
        if self._children is None or list(map(list, map(dict.values, self._around))) != self._children:
            self.check_in_place()
            self._around = [module._modules for module in self._modules_around()]
            self._children = [list(children.values()) for children in self._around]

    def _modules_around(self) -> list[nn.Module]:
        """Return the modules on the paths from the model to the owners of frozen parameters."""
        if not isinstance(self.model, nn.Module):
            return []
        owners = {site.owner for _, site in self.known_sites() if isinstance(site.owner, nn.Module)}
        paths = [name.split(".") for name, module in self.model.named_modules() if module in owners]
        names = dict.fromkeys(".".join(path[:n]) for path in paths for n in range(len(path)))
        return [self.model.get_submodule(name) for name in names]

    def violations(self) -> tuple[Violation, ...]:
        """Return a violation for each parameter whose frozen entries drifted, with their number and the worst of them.

        Raises:
            ParameterChangedError: A parameter is gone, has another shape or no data, or its module was replaced.
        """
        self.check_in_place()
        for name, site in self.known_sites():
            self._pair(name, site)  # follow replaced parameters first: those are not drift
        found: dict[tuple[str, int], Violation | None] = {}
        for name, site in self.known_sites():
            key = name, id(site.find())
            pair = self.frozen.adopt(name, site.computed())
            if pair is not None and found.get(key) is None:  # one of several names of a tensor may be pruned
                found[key] = self.as_shown(pair[0]).violation(pair[1])
        return tuple(filter(None, found.values()))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_around": [], "_children": None}


def _successor(
    owner: nn.Module | Mapping[str, Tensor], rebuilt: Mapping[nn.Module, nn.Module]
) -> nn.Module | Mapping[str, Tensor]:
    return rebuilt.get(owner, owner) if isinstance(owner, nn.Module) else owner
