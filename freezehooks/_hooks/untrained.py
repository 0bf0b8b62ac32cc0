"""The parameters that `train_only` did not name, which require no gradient while the handle is attached."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

from .._errors import UnguardedError
from .._held.held import Model
from .._held.parameters import FrozenParameters
from .._held.site import tensor_of
from .._torch import is_scripted

Owner: TypeAlias = "nn.Module | Mapping[str, Tensor]"


class RequireNoGradient:
    """After loading: make some parameters of a module require no gradient again.

    The hook stays on the module for as long as the parameters do not train, so that a copy of the module has it too.

    Attributes:
        frozen: The frozen parameters of the handle.
        keys: The names of the untrained parameters inside the module.
    """

    def __init__(self, frozen: FrozenParameters, keys: Iterable[str]) -> None:
        self.frozen = frozen
        self.keys = list(keys)

    def __call__(self, module: nn.Module, incompatible_keys: Any) -> None:
        for key in self.keys:
            _switch_off(_find(module, key))


class Untrained:
    """The parameters of a model that require no gradient while one handle is attached.

    Those that required one before do so again afterwards. A parameter that two handles keep from training trains again
    once both are removed.

    Args:
        frozen: The frozen parameters of the handle.
        places: The owner of each untrained parameter, and its name there.
    """

    def __init__(self, frozen: FrozenParameters, places: Iterable[tuple[Owner, str]] = ()) -> None:
        self._frozen = frozen
        self._places: dict[int, tuple[Owner, list[str]]] = {}
        self._of_mapping: list[RequireNoGradient] = []
        for owner, key in places:
            self.add(owner, [key])

    @staticmethod
    def beside(model: Model, frozen: FrozenParameters, trained: Iterable[Tensor]) -> Untrained:
        """Return all parameters of a model except those with entries that train."""
        named = {id(parameter) for parameter in trained}
        return Untrained(frozen, [place for place in _owned(model) if id(_find(*place)) not in named])

    def add(self, owner: Owner, keys: Iterable[str]) -> None:
        """Add parameters of one module, or of the mapping."""
        self._places.setdefault(id(owner), (owner, []))[1].extend(keys)

    def __len__(self) -> int:
        return len({id(parameter) for parameter in self._parameters()})

    def _parameters(self) -> Iterator[Tensor]:
        found = (_find(owner, key) for owner, keys in self._places.values() for key in keys)
        return (parameter for parameter in found if parameter is not None)

    def names_in(self, model: Model) -> list[str]:
        """Return the first name of each of them in the model."""
        return _names_in(model, self._parameters())

    @property
    def count(self) -> int:
        """How many of them require no gradient now."""
        return len(self) - len(list(self._training()))

    def _training(self) -> Iterator[Tensor]:
        found = {id(parameter): parameter for parameter in self._parameters()}.values()
        return (parameter for parameter in found if parameter.requires_grad and parameter.is_leaf)

    def check(self, model: Model) -> None:
        """Raise if one of them requires a gradient.

        Raises:
            UnguardedError: Someone has called `requires_grad_()` on it since.
        """
        training = _names_in(model, self._training())
        if training:
            raise UnguardedError(
                f"train_only did not name {', '.join(f'`{name}`' for name in training)}, which requires a gradient now",
                "call requires_grad_(False) on it, or remove() the handle and name it as well",
            )

    def begin(self) -> None:
        """Make them require no gradient, and drop gradients, which would make an optimizer step them."""
        found = [
            (owner, [key for key in keys if self._would_train(owner, key)]) for owner, keys in self._places.values()
        ]
        for owner, keys in found:
            if keys and not any(map(self._is_own, self._hooks_on(owner))):
                self._mark(owner, RequireNoGradient(self._frozen, keys))
                for key in keys:
                    _switch_off(_find(owner, key))

    def end(self) -> None:
        """Make those require a gradient again that did before and that no other handle keeps from training."""
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
    """Return the hooks by which handles keep parameters of a module from training."""
    return [hook for hook in module._load_state_dict_post_hooks.values() if isinstance(hook, RequireNoGradient)]


def _names_in(model: Model, parameters: Iterable[Tensor]) -> list[str]:
    """Return the first name of each parameter in the model."""
    wanted = {id(parameter) for parameter in parameters}
    named = model.named_parameters() if isinstance(model, nn.Module) else model.items()
    return [name for name, parameter in named if id(parameter) in wanted]


def _owned(model: Model) -> Iterator[tuple[Owner, str]]:
    """Yield the owner of each parameter and its name there; a scripted module's owner is the plain one around it."""
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
    """Return the parameter with a name in its owner, or None."""
    if not isinstance(owner, nn.Module):
        return owner.get(key)
    return owner.get_parameter(key) if "." in key else tensor_of(owner, key)


def _switch_off(parameter: Tensor | None) -> None:
    if parameter is not None:
        parameter.requires_grad_(False)
        parameter.grad = None
