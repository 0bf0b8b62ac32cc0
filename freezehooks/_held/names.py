"""Finds the parameters of a model by the names in rules."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Final

from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._errors import RegionError, SpecError, TargetError, UnsupportedParameterError, shown
from .._rules.patterns.pattern import patterns_in
from .._rules.rule import Rule
from .._torch import is_scripted
from .site import Site


class Targets:
    """The names that rules may use for a model's parameters, each with its site.

    Args:
        model: A module, or a mapping from name to leaf tensor.
    """

    def __init__(self, model: nn.Module | Mapping[str, Tensor]) -> None:
        self._model = model
        self.sites: dict[str, Site] = dict(_sites(model))
        self._buffers = [name for name, site in self.sites.items() if site.is_buffer]
        self._parameters = [name for name, site in self.sites.items() if not site.is_buffer]
        self._computed = dict(_computed_tensors(model))
        self._modules = dict(model.named_modules(remove_duplicate=False)) if isinstance(model, nn.Module) else {}
        by_tensor: dict[int, list[str]] = {}
        for name, site in self.sites.items():
            by_tensor.setdefault(id(site.find()), []).append(name)
        self._aliases = {name: names for names in by_tensor.values() for name in names}

    def names_of(self, name: str) -> list[str]:
        """Return all names of the parameter with a given name; a shared parameter has several."""
        return self._aliases[name]

    def named(self, rule: Rule) -> Rule:
        """Return a rule whose target, if it is a parameter or a module, is replaced by its name.

        Raises:
            TargetError: The target is not in this model.
        """
        if isinstance(rule.target, str):
            return rule
        names = [name for name, site in self.sites.items() if site.find() is rule.target]
        paths = [path for path, module in self._modules.items() if module is rule.target]
        if not names and not paths:
            raise TargetError(
                f"the {type(rule.target).__name__} that a rule names is not in the model",
                "give a parameter or a module of the model that is frozen, or its name",
            )
        return replace(rule, target=names[0] if names else f"{paths[0]}.weight".lstrip("."))

    def classes_that_fit(self, rule: Rule) -> list[str]:
        """Return the classes of the modules, among those that a rule with wildcards matches, that its patterns fit.

        The result is empty if the patterns fit all of them: then naming a class would not help.
        """
        if not is_wild(rule.target) or TypedTarget.read(rule.target) is not None:
            return []
        matched: dict[bool, set[str]] = {True: set(), False: set()}
        for site in (self.sites[name] for name in self.find(rule.target)):
            if isinstance(site.owner, nn.Module):
                matched[_fit(rule.region, site.tensor().shape)].add(type(site.owner).__name__)
        return sorted(matched[True]) if matched[False] else []

    def find(self, target: str) -> list[str]:
        """Return the names of the parameters that a rule's target matches, each parameter once.

        Raises:
            TargetError: It matches none.
            UnsupportedParameterError: It matches a tensor that is computed from other parameters.
        """
        names = self._matching(target, [*self._parameters, *self._computed]) or self._matching_buffers(target)
        for name in names:
            if name in self._computed:
                fact, advice = self._computed[name]
                raise UnsupportedParameterError(f"`{name}` is not a parameter: {fact}", advice)
        if not names:
            raise self._unknown(target)
        return list(dict.fromkeys(self._aliases[name][0] for name in names))

    def _matching(self, target: str, known: list[str]) -> list[str]:
        return matching(target, known) or self._matching_unwrapped(target, known) or self._of_classes(target, known)

    def _matching_buffers(self, target: str) -> list[str]:
        """Return the floating-point buffers that a target matches.

        Raises:
            UnsupportedParameterError: It matches only buffers of other dtypes.
        """
        names = self._matching(target, self._buffers)
        dtypes = {name: self.sites[name].tensor().dtype for name in names}
        floating = [name for name, dtype in dtypes.items() if dtype.is_floating_point or dtype.is_complex]
        if names and not floating:
            raise UnsupportedParameterError(
                f"`{names[0]}` is a buffer of {dtypes[names[0]]}",
                "name parameters, or floating-point buffers",
            )
        return floating

    def _matching_unwrapped(self, target: str, known: list[str]) -> list[str]:
        """Return the names that a target matches once the names of wrappers are left out of both.

        Raises:
            TargetError: Two parameters have the same name without the names of wrappers.
        """
        found = matching_unwrapped(target, known)
        firsts: dict[str, str] = {}
        for name in found:
            other = firsts.setdefault(unwrapped(name), name)
            if self._aliases.get(name) != self._aliases.get(other):
                raise TargetError(f"`{target}` may be `{other}` or `{name}`", "write the full name")
        return found

    def _of_classes(self, target: str, known: list[str]) -> list[str]:
        """Return the names that a target with classes of modules matches; none if it has no classes.

        Raises:
            TargetError: The model has no module of any of the classes.
        """
        typed = TypedTarget.read(target)
        if typed is None:
            return []
        if not self._modules:
            raise TargetError(
                f"`{target}` names classes of modules, but here there are only tensors with names",
                "write their names, with `*` and `?`",
            )
        if not any(typed.takes(module) for module in self._modules.values()):
            classes = sorted({type(module).__name__ for module in self._modules.values() if module._parameters})
            raise TargetError(
                f"`{target}` names classes that no module of the model has", f"its modules are {', '.join(classes)}"
            )
        return [name for name in known if any(typed.names(*each, name) for each in self._modules.items())]

    def _unknown(self, target: str) -> TargetError:
        for name, kind in _untrained_tensors(self._model):
            if matching(target, [name]) or matching_unwrapped(target, [name]):
                return TargetError(
                    f"`{name}` is {kind} and not a parameter, so no optimizer trains it",
                    "write its numbers yourself, or make it an nn.Parameter",
                )
        if {"(", ")"} & set(target):
            return self._unknown_classes(target)
        known = [*self.sites, *(name.removesuffix(".weight") for name in self.sites if name.endswith(".weight"))]
        kind = "matches no parameter" if {"*", "?"} & set(target) else "is not a parameter of the model"
        within = [name for name in known if f".{name}".endswith(f".{target}")]
        close = within[:3] or difflib.get_close_matches(target, known, n=3) or known[:5]
        listed = ", ".join(f"`{name}`" for name in close)
        return TargetError(f"`{target}` {kind}", f"did you mean {listed}?" if close else "the model has no parameters")

    def _unknown_classes(self, target: str) -> TargetError:
        """Return the error for a target with parentheses: it names no classes, or no module with a matching path."""
        typed = TypedTarget.read(target)
        if typed is None:
            return TargetError(f"`{target}` names no classes", "write them by their names, as in `*(Conv2d).weight`")
        paths = [f"`{path}`" for path, module in self._modules.items() if typed.takes(module)]
        return TargetError(f"`{target}` matches no parameter", f"modules of its classes are {', '.join(paths[:5])}")


@dataclass(frozen=True, slots=True)
class TypedTarget:
    """A target that names classes of modules: ``features.*(Conv2d, Conv3d).weight``.

    Attributes:
        path: The modules' names, with the wildcards ``*`` and ``?``.
        classes: The names of classes; subclasses count.
        key: The parameters' names in the modules; ``weight`` if left out.
    """

    path: str
    classes: frozenset[str]
    key: str

    @staticmethod
    def read(target: str) -> TypedTarget | None:
        """Parse a target, or return None if it names no classes."""
        found = _TYPED.fullmatch(target)
        if found is None:
            return None
        path, classes, key = found.groups()
        return TypedTarget(path, frozenset(re.findall(r"\w+", classes)), key or "weight")

    def takes(self, module: nn.Module) -> bool:
        """Return whether a module is an instance of one of the classes."""
        return not self.classes.isdisjoint(kind.__name__ for kind in type(module).__mro__)

    def names(self, path: str, module: nn.Module, name: str) -> bool:
        """Return whether the target matches a parameter in a module, given the names of both in the model."""
        prefix = f"{path}." if path else ""
        if not name.startswith(prefix) or not self.takes(module):
            return False
        is_here = any(fnmatch.fnmatchcase(each, self.path) for each in (path, unwrapped(f"{path}.").rstrip(".")))
        return is_here and fnmatch.fnmatchcase(name.removeprefix(prefix), self.key)


_TYPED: Final = re.compile(r"([^()]*)\(([\w\s,]+)\)(?:\.(.+))?")


def is_wild(target: str) -> bool:
    """Return whether a target may match several parameters."""
    return bool({"*", "?"} & set(target)) or TypedTarget.read(target) is not None


def typed(rule: Rule, classes: Iterable[str]) -> Rule:
    """Restrict a rule with wildcards to the modules of some classes."""
    path, _, key = rule.target.rpartition(".")
    if not path or is_wild(key):
        path, key = rule.target, ""
    return replace(rule, target=f"{path}({', '.join(classes)}){f'.{key}' if key else ''}")


def _fit(region: Any, shape: Sequence[int]) -> bool:
    try:
        for pattern in patterns_in(region):
            pattern.check(shape)
    except RegionError:
        return False
    return True


_WRAPPERS: Final = re.compile(
    r"(^|(?<=\.))(module|_orig_mod|_checkpoint_wrapped_module|_forward_module|_original_module|_module"
    r"|base_model\.model|modules_to_save\.\w+)\."
)
"""The names under which wrappers hold what they wrap.

They are those of DataParallel and DistributedDataParallel, torch.compile, activation checkpointing, Fabric, Opacus, and
PEFT, including `modules_to_save`.
"""


def unwrapped(name: str) -> str:
    """Return a name without the names of wrappers in it."""
    return _WRAPPERS.sub("", name)


def matching(target: str, names: list[str]) -> list[str]:
    """Return the names that a target matches or, if there are none, the weights of the modules that it matches."""
    pattern = re.compile(fnmatch.translate(target))
    weights = [name for name in names if name.endswith(".weight")]
    return [name for name in names if pattern.fullmatch(name)] or [
        name for name in weights if pattern.fullmatch(name.removesuffix(".weight"))
    ]


def matching_unwrapped(target: str, names: list[str]) -> list[str]:
    """Return the names that a target matches once the names of wrappers are left out of both."""
    found = set(matching(unwrapped(target), [unwrapped(name) for name in names]))
    return [name for name in names if unwrapped(name) in found]


def _sites(model: nn.Module | Mapping[str, Tensor]) -> Iterator[tuple[str, Site]]:
    if not isinstance(model, nn.Module):
        known: dict[str, Tensor] = {}
        for name, tensor in model.items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise SpecError(
                    f"`model` must be a module or a mapping from name to tensor, found the item {shown(name)}: "
                    f"{type(tensor).__name__}",
                    "give leaf tensors by name",
                )
            yield name, Site(model, name, known)
        return
    known_of: dict[nn.Module, dict[str, Tensor]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for key, found in () if is_scripted(module) else chain(module._parameters.items(), module._buffers.items()):
            if found is not None:
                yield f"{prefix}.{key}".lstrip("."), Site(module, key, known_of.setdefault(module, {}))


def _untrained_tensors(model: nn.Module | Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Yield the names of tensors in a model that are not parameters, each with what it is."""
    for prefix, module in model.named_modules(remove_duplicate=False) if isinstance(model, nn.Module) else ():
        dot = f"{prefix}." if prefix else ""
        yield from (
            (f"{dot}{key}", "a plain tensor") for key, found in vars(module).items() if isinstance(found, Tensor)
        )


def _computed_tensors(model: nn.Module | Mapping[str, Tensor]) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield the names of tensors that look like parameters but are computed from others, with fact and advice."""
    if not isinstance(model, nn.Module):
        return
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        if is_scripted(module):
            yield from ((f"{dot}{key}", _SCRIPTED) for key, _ in module.named_parameters(recurse=False))
            continue
        for key in getattr(module, "parametrizations", {}) if parametrize.is_parametrized(module) else ():
            yield (
                f"{dot}{key}",
                (
                    "it is parametrized, so it is computed at every access",
                    "remove the parametrization (torch.nn.utils.parametrize.remove_parametrizations), "
                    f"or freeze `{dot}parametrizations.{key}.*`",
                ),
            )
        for key, suffix in _RENAMED.findall("\n".join(module._parameters)):
            if isinstance(vars(module).get(key), Tensor):
                yield (
                    f"{dot}{key}",
                    (
                        f"a hook computes it from `{dot}{key}{suffix}`",
                        "remove that hook first (torch.nn.utils.prune.remove, remove_weight_norm, "
                        f"remove_spectral_norm), or freeze `{dot}{key}{suffix}`",
                    ),
                )


_SCRIPTED: Final = (
    "torch.jit has compiled its module, whose forward calls no hook",
    "freeze entries of the original module, and compile it after removing them",
)

_RENAMED: Final = re.compile(r"^(.+)(_orig|_v)$", re.MULTILINE)
"""How torch's older hooks rename the parameter they compute from: pruning, spectral norm and weight norm."""
