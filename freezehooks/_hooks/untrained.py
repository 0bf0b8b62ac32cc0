"""Parameters that require no gradient while a handle holds: those that `train_only` did not name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

from .._held.held import Model
from .._held.parameters import FrozenParameters
from .._held.site import tensor_of
from .._torch import is_scripted

Owner: TypeAlias = "nn.Module | Mapping[str, Tensor]"


class RequireNoGradient:
    """After loading: some parameters of a module still require no gradient.

    It stays on the module that owns them for as long as they do not train, so that a copy of the module knows them too.

    Attributes:
        frozen: What the handle froze beside them.
        keys: Their names below the module.
    """

    def __init__(self, frozen: FrozenParameters, keys: Iterable[str]) -> None:
        self.frozen = frozen
        self.keys = list(keys)

    def __call__(self, module: nn.Module, incompatible_keys: Any) -> None:
        for key in self.keys:
            _switch_off(_find(module, key))


class Untrained:
    """The parameters of a model that require no gradient while one handle holds.

    Those that required one before are given back at the end. A parameter that two handles keep from training trains
    again when both have let go.

    Args:
        frozen: What the handle froze beside them.
        places: Who owns each, and its name there.
    """

    def __init__(self, frozen: FrozenParameters, places: Iterable[tuple[Owner, str]] = ()) -> None:
        self._frozen = frozen
        self._places: dict[int, tuple[Owner, list[str]]] = {}
        self._of_mapping: list[RequireNoGradient] = []
        for owner, key in places:
            self.add(owner, [key])

    @staticmethod
    def beside(model: Model, frozen: FrozenParameters, trained: Iterable[Tensor]) -> Untrained:
        """Return all parameters of a model but those that are to train, at least in part."""
        named = {id(parameter) for parameter in trained}
        return Untrained(frozen, [place for place in _owned(model) if id(_find(*place)) not in named])

    def add(self, owner: Owner, keys: Iterable[str]) -> None:
        """Add parameters that one module, or the mapping, owns."""
        self._places.setdefault(id(owner), (owner, []))[1].extend(keys)

    def __len__(self) -> int:
        found = (_find(owner, key) for owner, keys in self._places.values() for key in keys)
        return len({id(parameter) for parameter in found if parameter is not None})

    def names_in(self, model: Model) -> list[str]:
        """Return their names in the model, each parameter's first one."""
        untrained = {id(_find(owner, key)) for owner, keys in self._places.values() for key in keys}
        named = model.named_parameters() if isinstance(model, nn.Module) else model.items()
        return [name for name, parameter in named if id(parameter) in untrained]

    def begin(self) -> None:
        """Have them require no gradient; one that is there already would make an optimizer step them."""
        found = [
            (owner, [key for key in keys if self._would_train(owner, key)]) for owner, keys in self._places.values()
        ]
        for owner, keys in found:
            if keys and not any(map(self._is_own, self._hooks_on(owner))):
                self._mark(owner, RequireNoGradient(self._frozen, keys))
                for key in keys:
                    _switch_off(_find(owner, key))

    def end(self) -> None:
        """Give back what required a gradient before, and is kept from it by no other handle."""
        for owner, _ in self._places.values():
            for hook in filter(self._is_own, self._hooks_on(owner)):
                self._unmark(owner, hook)
                kept = {key for other in self._hooks_on(owner) for key in other.keys}
                for parameter in (_find(owner, key) for key in hook.keys if key not in kept):
                    if parameter is not None:
                        parameter.requires_grad_()

    def _would_train(self, owner: Owner, key: str) -> bool:
        parameter = _find(owner, key)
        others = (hook for hook in self._hooks_on(owner) if not self._is_own(hook))
        return parameter is not None and (
            (parameter.requires_grad and parameter.is_leaf) or any(key in hook.keys for hook in others)
        )

    def _is_own(self, hook: RequireNoGradient) -> bool:
        return hook.frozen is self._frozen

    def _hooks_on(self, owner: Owner) -> list[RequireNoGradient]:
        return untrained_on(owner) if isinstance(owner, nn.Module) else list(self._of_mapping)

    def _mark(self, owner: Owner, hook: RequireNoGradient) -> None:
        if isinstance(owner, nn.Module):
            owner.register_load_state_dict_post_hook(hook)
        else:
            self._of_mapping.append(hook)

    def _unmark(self, owner: Owner, hook: RequireNoGradient) -> None:
        if isinstance(owner, nn.Module):
            hooks = owner._load_state_dict_post_hooks
            del hooks[next(key for key, each in hooks.items() if each is hook)]
        else:
            self._of_mapping.remove(hook)


def untrained_on(module: nn.Module) -> list[RequireNoGradient]:
    """Return what handles keep from training of the parameters that a module owns."""
    return [hook for hook in module._load_state_dict_post_hooks.values() if isinstance(hook, RequireNoGradient)]


def _owned(model: Model) -> Iterator[tuple[Owner, str]]:
    """Yield who owns each parameter, and its name there; a scripted module's are the next plain one's above it."""
    if not isinstance(model, nn.Module):
        yield from ((model, name) for name in model)
        return
    for module in model.modules():
        if not is_scripted(module):
            yield from ((module, key) for key, parameter in module._parameters.items() if parameter is not None)
            for name, child in module.named_children():
                if is_scripted(child):
                    yield from ((module, f"{name}.{key}") for key, _ in child.named_parameters())


def _find(owner: Owner, key: str) -> Tensor | None:
    """Return the parameter that stands under a name now, or None."""
    if not isinstance(owner, nn.Module):
        return owner.get(key)
    return owner.get_parameter(key) if "." in key else tensor_of(owner, key)


def _switch_off(parameter: Tensor | None) -> None:
    if parameter is not None:
        parameter.requires_grad_(False)
        parameter.grad = None
