"""The frozen parameters of a model, each with every place that holds it."""

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
    """What a handle, and every optimizer that it guards, knows of a model.

    Iterating pairs each frozen parameter with each tensor that it holds now.

    Attributes:
        model: The model, or a mapping from name to leaf tensor.
        frozen: What is frozen, by name; perhaps of a larger model that this one was a part of.
        sites: Under which name of `frozen` which place stands.
        is_found: Whether it was found in a model that may be a part of the one that was frozen.
        shown: The names that parameters have in the model, by their names in `frozen`, where they have others.
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
        """The names of `frozen` that stand in this model."""
        return list(dict.fromkeys(name for name, _ in self.known_sites()))

    @property
    def parameter_names(self) -> list[str]:
        """The names of `names` that stand for parameters, and not for buffers alone, which no optimizer steps."""
        return list(dict.fromkeys(name for name, site in self.known_sites() if not site.is_buffer))

    def show_names_of_model(self) -> None:
        """Show parameters under the names that they have in the model."""
        paths: dict[Any, list[str]] = {}
        for path, module in (
            self.model.named_modules(remove_duplicate=False) if isinstance(self.model, nn.Module) else ()
        ):
            paths.setdefault(module, []).append(path)
        for name, sites in self.sites_by_name().items():
            self.shown[name] = [f"{path}.{site.key}".lstrip(".") for site in sites for path in paths[site.owner]]

    def as_shown(self, part: FrozenParameter) -> FrozenParameter:
        """Return what is frozen of a parameter, under the names that it has in the model."""
        return part.named(self.shown[part.name]) if part.name in self.shown else part

    def find(self, name: str) -> FrozenParameter:
        """Return what is frozen of the parameter that goes by a name, in the model or in the one that was frozen.

        Raises:
            TargetError: Nothing is.
        """
        shown = [key for key in self.names if name in self.shown.get(key, ())]
        return self.frozen.by_name[shown[0]] if shown else self.frozen.find(name, self.names)

    def sites_by_name(self) -> dict[str, list[Site]]:
        """Return the places of each name of `frozen`."""
        found: dict[str, list[Site]] = {}
        for name, site in self.known_sites():
            found.setdefault(name, []).append(site)
        return found

    @property
    def is_held(self) -> bool:
        """Whether all of it is held at present that was not thawed."""
        known = [name for name, _ in self.known_sites()]
        return (bool(known) or not self.sites) and self.frozen.released.isdisjoint(known)

    @property
    def removal(self) -> str:
        """What of it is not held at present, in words; empty where all of it is."""
        if self.is_held:
            return ""
        names = self.names
        released = [
            f"`{self.as_shown(self.frozen.by_name[name]).name}`" for name in names if not self.frozen.is_held(name)
        ]
        if not names:
            return "removed: another handle has let all of it go"
        return "removed: none of it is held" if len(released) == len(names) else f"removed: {', '.join(released)}"

    @property
    def skips(self) -> list[str]:
        """Which rules with wildcards found parameters without any entry of their region, in words."""
        return [
            f"`{rule}` skipped {counted(count, 'parameter that has', 'parameters that have')} no such entry"
            for rule, count in self.frozen.skipped.items()
        ]

    def known_sites(self) -> Iterator[tuple[str, Site]]:
        """Yield the places of what is frozen still: another handle may have thawed some."""
        return ((name, site) for name, site in self.sites if name in self.frozen.by_name)

    def held_sites(self) -> Iterator[tuple[str, Site]]:
        """Yield the places whose entries are held at present."""
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
        """Refuse to answer for parameters that the model no longer contains.

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
                    "call remove() before a module is replaced or converted, and freeze anew after",
                )

    def rebuilt(self) -> dict[nn.Module, nn.Module]:
        """Return the containers that left the model, each with the one that was made of the same parameters since.

        A container has no forward: whoever computes with its parameters finds them in the new one. Keras makes them
        anew when a model is built.
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
        """Take other modules for those that own the parameters, as `rebuilt` returned them."""
        self.sites = [(name, replace(site, owner=_successor(site.owner, rebuilt))) for name, site in self.sites]

    def check_modules(self) -> None:
        """Refuse to go on where a module that owned frozen parameters was replaced or converted.

        One comparison of lists for each module around such owners; a look at the whole model where that finds a change.

        Raises:
            ParameterChangedError: One was.
        """
        if self._children is None or list(map(list, map(dict.values, self._around))) != self._children:
            self.check_in_place()
            self._around = [module._modules for module in self._modules_around()]
            self._children = [list(children.values()) for children in self._around]

    def _modules_around(self) -> list[nn.Module]:
        """Return the modules on the ways from the model to the owners of frozen parameters."""
        if not isinstance(self.model, nn.Module):
            return []
        owners = {site.owner for _, site in self.known_sites() if isinstance(site.owner, nn.Module)}
        ways = [name.split(".") for name, module in self.model.named_modules() if module in owners]
        names = dict.fromkeys(".".join(way[:n]) for way in ways for n in range(len(way)))
        return [self.model.get_submodule(name) for name in names]

    def violations(self) -> tuple[Violation, ...]:
        """Return, for each parameter where frozen entries drifted, how many and the worst of them.

        Raises:
            ParameterChangedError: A parameter is gone, has another shape or no numbers, or its module was replaced.
        """
        self.check_in_place()
        for name, site in self.known_sites():
            self._pair(name, site)  # a parameter that was put in another's place is no drift
        found: dict[tuple[str, int], Violation | None] = {}
        for name, site in self.known_sites():
            place = name, id(site.find())
            pair = self.frozen.adopt(name, site.computed())
            if pair is not None and found.get(place) is None:  # of names of one tensor, one may be pruned
                found[place] = self.as_shown(pair[0]).violation(pair[1])
        return tuple(filter(None, found.values()))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_around": [], "_children": None}


def _successor(
    owner: nn.Module | Mapping[str, Tensor], rebuilt: Mapping[nn.Module, nn.Module]
) -> nn.Module | Mapping[str, Tensor]:
    return rebuilt.get(owner, owner) if isinstance(owner, nn.Module) else owner
