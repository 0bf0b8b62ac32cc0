"""What an optimizer remembers of a parameter: which items have a number for each entry, and where those start.

Only what is known is ever written: the items that torch's own optimizers keep, by class and name, as plain tensors of
the parameter's shape and dtype. Zero is not nothing in every state (8-bit codes, preconditioners, moments in a rotated
basis, anchors at the weight), so whatever is not known stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor, optim
from torch.optim import Optimizer

from .._entries.bits import differ
from .._held.parameter import FrozenParameter
from .._ranks.sharding import layout_of, local
from .elementwise import steps_like

_ZERO: Final = ""
_WEIGHT: Final = "weight"

_KNOWN: Final[dict[str, dict[str, str]]] = {
    "SGD": {"momentum_buffer": _ZERO},
    "Adam": {"exp_avg": _ZERO, "exp_avg_sq": _ZERO, "max_exp_avg_sq": _ZERO},
    "AdamW": {"exp_avg": _ZERO, "exp_avg_sq": _ZERO, "max_exp_avg_sq": _ZERO},
    "NAdam": {"exp_avg": _ZERO, "exp_avg_sq": _ZERO},
    "RAdam": {"exp_avg": _ZERO, "exp_avg_sq": _ZERO},
    "Adamax": {"exp_avg": _ZERO, "exp_inf": _ZERO},
    "SparseAdam": {"exp_avg": _ZERO, "exp_avg_sq": _ZERO},
    "Adadelta": {"square_avg": _ZERO, "acc_delta": _ZERO},
    "Adagrad": {"sum": "initial_accumulator_value"},
    "ASGD": {"ax": _WEIGHT},
    "RMSprop": {"square_avg": _ZERO, "grad_avg": _ZERO, "momentum_buffer": _ZERO},
    "Rprop": {"prev": _ZERO, "step_size": "lr"},
    "Muon": {"momentum_buffer": _ZERO},
    "Adafactor": {"variance": _ZERO},
}
"""Of each optimizer of `torch.optim`, the items of its state that have a number for each entry, and where they start.

That is 0, an option of the parameter's group, or the weight itself (the average of ASGD).
"""

_VECTORS: Final = ("d", "prev_flat_grad", "old_dirs", "old_stps")
"""What LBFGS remembers: vectors over all entries of all of its parameters, and lists of such vectors."""


def stepped_by(optimizer: Optimizer) -> set[int]:
    """Return the ids of the parameters that an optimizer steps."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def known_items(optimizer: Optimizer) -> Mapping[str, str]:
    """Return the items of an optimizer's state that are known to have a number for each entry, and where they start."""
    kind: Any = type(optimizer)
    return _known_items(kind)


@cache
def _known_items(kind: Any) -> Mapping[str, str]:
    for name, items in _KNOWN.items():
        known = getattr(optim, name, None)  # Muon is new in torch 2.9
        if known is not None and steps_like(kind, known):
            return items
    return {}


def may_keep_weights(optimizer: Optimizer) -> bool:
    """Return whether some item of the optimizer's state holds weights."""
    return _WEIGHT in known_items(optimizer).values()


def _entrywise(optimizer: Optimizer, parameter: Tensor) -> Iterator[tuple[str, str, Tensor]]:
    """Yield the known items of a parameter's state: name, start and tensor."""
    state = optimizer.state.get(parameter) or {}
    for name, start in known_items(optimizer).items():
        if is_as_expected(state.get(name), parameter):
            yield name, start, state[name]


def is_as_expected(value: Any, parameter: Tensor) -> bool:
    """Return whether an item of a parameter's state is what torch's own optimizers make of it."""
    return (
        isinstance(value, Tensor)
        and value.shape == parameter.shape
        and value.dtype in _dtypes_of(parameter)
        and is_plain(value, parameter)
    )


def is_plain(value: Tensor, parameter: Tensor, *, is_flat: bool = False) -> bool:
    """Return whether a tensor is a dense one without tricks, spread over ranks as the parameter is.

    Args:
        value: The tensor.
        parameter: The parameter.
        is_flat: Whether it is to hold the free entries of this rank alone.
    """
    layout, wanted = layout_of(value), None if is_flat else layout_of(parameter)
    is_known_class = type(value) is Tensor if layout is None else True
    return is_known_class and layout == wanted and value.layout is torch.strided


def _dtypes_of(parameter: Tensor) -> tuple[Any, ...]:
    gradient = parameter.grad
    own = getattr(parameter, "grad_dtype", None)  # since torch 2.10; some state is laid out like the gradient
    return parameter.dtype, own, None if gradient is None else gradient.dtype


def started(start: str, parameter: Tensor, group: dict[str, Any], like: Tensor) -> Tensor:
    """Return an item of a parameter's state as it starts: of the parameter's shape and layout, like another tensor."""
    if start == _WEIGHT:
        return parameter.detach().to(like.device, like.dtype, copy=True)
    number = _number(start, group)
    return torch.full_like(
        parameter, complex(number, number) if like.is_complex() else number, dtype=like.dtype, device=like.device
    )


def _number(start: str, group: dict[str, Any]) -> float:
    """Return what an item starts at; that of complex entries, in their real and in their imaginary part."""
    return float(group.get(start, 0.0))


def reset_frozen_state(optimizer: Optimizer, frozen: FrozenParameter, parameter: Tensor, group: dict[str, Any]) -> None:
    """Make a parameter's state what it would be had the frozen entries never moved.

    What has to change is copied first: a state that was loaded may lie in the memory of whoever loaded it.
    """
    for name, start, value in _entrywise(optimizer, parameter):
        changed = value.clone()
        _settle(local(changed), start, frozen, group)
        if bool(differ(local(changed), local(value)).any()):
            optimizer.state[parameter][name] = changed


def settle_frozen_state(
    optimizer: Optimizer, frozen: FrozenParameter, parameter: Tensor, group: dict[str, Any]
) -> None:
    """Do what `reset_frozen_state` does, in place: what steps have left at frozen entries is about to be saved."""
    for _, start, value in _entrywise(optimizer, parameter):
        _settle(local(value), start, frozen, group)


def impose_on_weights(optimizer: Optimizer, frozen: FrozenParameter, parameter: Tensor) -> None:
    """Write the values into those items of a parameter's state that hold weights."""
    for _, start, value in _entrywise(optimizer, parameter):
        if start == _WEIGHT:
            frozen.impose_(local(value))


def _settle(here: Tensor, start: str, frozen: FrozenParameter, group: dict[str, Any]) -> None:
    if start == _WEIGHT:
        frozen.impose_(here)
    else:
        for real in (here.real, here.imag) if here.is_complex() else (here,):
            frozen.fill_(real, _number(start, group))


# --------------------------------------------------------------------------------------------------------------------
# LBFGS


def has_history(optimizer: Optimizer, state: dict[str, Any]) -> bool:
    """Return whether a parameter's state is that of LBFGS after a step, which speaks of all parameters of its group."""
    return "old_dirs" in state and steps_like(type(optimizer), optim.LBFGS)


def history_vectors(state: dict[str, Any]) -> list[Tensor]:
    """Return the vectors of an LBFGS state."""
    found: list[Tensor | None] = []
    for name in _VECTORS:
        item = state.get(name)
        found.extend(item if isinstance(item, list) else [item])
    return [vector for vector in found if vector is not None]


def with_history(state: dict[str, Any], convert: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Return an LBFGS state with each of its vectors converted."""

    def changed(item: Any) -> Any:
        if isinstance(item, list):
            return [convert(vector) for vector in item]
        return item if item is None else convert(item)

    return {name: changed(item) if name in _VECTORS else item for name, item in state.items()}


def reset_history(optimizer: Optimizer, held: list[tuple[FrozenParameter, Tensor]]) -> None:
    """Drop the history of LBFGS where it moves frozen entries: curvature measured along them is no longer true."""
    for group in optimizer.param_groups:
        parameters = group["params"]
        state = optimizer.state.get(parameters[0], {}) if parameters else {}
        if has_history(optimizer, state):
            frozen = torch.cat([_flat_frozen(parameter, held) for parameter in parameters])
            if any(bool(vector[frozen].any()) for vector in history_vectors(state)):
                state.clear()


def _flat_frozen(parameter: Tensor, held: Iterable[tuple[FrozenParameter, Tensor]]) -> Tensor:
    """Return which entries of the parameter are frozen, flattened as LBFGS flattens it: complex ones as two numbers."""
    frozen = torch.zeros(parameter.shape, dtype=torch.bool, device=parameter.device)
    for its_frozen, its_parameter in held:
        if its_parameter is parameter:
            frozen |= its_frozen.frozen
    return frozen.flatten().repeat_interleave(2 if parameter.is_complex() else 1)
