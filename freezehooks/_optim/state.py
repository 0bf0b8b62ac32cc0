"""The state of torch's own optimizers: which items have a number for each entry, and their initial values.

Only known items are ever written: those that torch's own optimizers keep, by class and name, as plain tensors of the
parameter's shape and dtype. Zero does not mean "no history" in every optimizer's state (8-bit codes, preconditioners,
moments in a rotated basis, anchors at the weight), so unknown items stay as they are.
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
"""The items with a number for each entry in the state of each `torch.optim` optimizer, and their initial values.

An initial value is 0, an option of the parameter's group, or the weight itself (for the average of ASGD).
"""

_VECTORS: Final = ("d", "prev_flat_grad", "old_dirs", "old_stps")
"""The items of LBFGS: vectors over all entries of all of its parameters, and lists of such vectors."""


def stepped_by(optimizer: Optimizer) -> set[int]:
    """Return the ids of the parameters that an optimizer steps."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def known_items(optimizer: Optimizer) -> Mapping[str, str]:
    """Return the known items with a number for each entry in an optimizer's state, and their initial values."""
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
    """Return whether the optimizer's state may contain weights, as the average of ASGD does."""
    return _WEIGHT in known_items(optimizer).values()


def _entrywise(optimizer: Optimizer, parameter: Tensor) -> Iterator[tuple[str, str, Tensor]]:
    """Yield the name, initial value and tensor of each known item in a parameter's state."""
    state = optimizer.state.get(parameter) or {}
    for name, start in known_items(optimizer).items():
        if is_as_expected(state.get(name), parameter):
            yield name, start, state[name]


def is_as_expected(value: Any, parameter: Tensor) -> bool:
    """Return whether an item of a parameter's state has the form that torch's own optimizers give it."""
    return (
        isinstance(value, Tensor)
        and value.shape == parameter.shape
        and value.dtype in _dtypes_of(parameter)
        and is_plain(value, parameter)
    )


def is_plain(value: Tensor, parameter: Tensor, *, is_flat: bool = False) -> bool:
    """Return whether a tensor is a plain dense one, with the parameter's placements if that is sharded.

    Args:
        value: The tensor.
        parameter: The parameter.
        is_flat: Whether the tensor should hold this rank's free entries alone, which are never sharded.
    """
    layout, wanted = layout_of(value), None if is_flat else layout_of(parameter)
    is_known_class = layout is not None or type(value) is Tensor
    return is_known_class and layout == wanted and value.layout is torch.strided


def _dtypes_of(parameter: Tensor) -> tuple[Any, ...]:
    gradient = parameter.grad
    own = getattr(parameter, "grad_dtype", None)  # since torch 2.10; some state has the gradient's dtype
    return parameter.dtype, own, None if gradient is None else gradient.dtype


def started(start: str, parameter: Tensor, group: dict[str, Any], like: Tensor) -> Tensor:
    """Return the initial tensor of a state item, in the parameter's shape and the dtype and device of `like`."""
    if start == _WEIGHT:
        return parameter.detach().to(like.device, like.dtype, copy=True)
    number = _number(start, group)
    return torch.full_like(
        parameter, complex(number, number) if like.is_complex() else number, dtype=like.dtype, device=like.device
    )


def _number(start: str, group: dict[str, Any]) -> float:
    """Return the initial number of an item; for complex entries, of each of their two components."""
    return float(group.get(start, 0.0))


def reset_frozen_state(optimizer: Optimizer, frozen: FrozenParameter, parameter: Tensor, group: dict[str, Any]) -> None:
    """Reset a parameter's state at the frozen entries to what it would be if they had never moved.

    Tensors that have to change are copied first: a loaded state may share memory with the caller's state dict.
    """
    for name, start, value in _entrywise(optimizer, parameter):
        changed = value.clone()
        _reset(local(changed), start, frozen, group)
        if bool(differ(local(changed), local(value)).any()):
            optimizer.state[parameter][name] = changed


def reset_frozen_state_(
    optimizer: Optimizer, frozen: FrozenParameter, parameter: Tensor, group: dict[str, Any]
) -> None:
    """Do what `reset_frozen_state` does in place, before the state is saved."""
    for _, start, value in _entrywise(optimizer, parameter):
        _reset(local(value), start, frozen, group)


def impose_on_weights(optimizer: Optimizer, frozen: FrozenParameter, parameter: Tensor) -> None:
    """Impose the values on those items of a parameter's state that contain weights."""
    for _, start, value in _entrywise(optimizer, parameter):
        if start == _WEIGHT:
            frozen.impose_(local(value))


def _reset(shard: Tensor, start: str, frozen: FrozenParameter, group: dict[str, Any]) -> None:
    if start == _WEIGHT:
        frozen.impose_(shard)
    else:
        for real in (shard.real, shard.imag) if shard.is_complex() else (shard,):
            frozen.fill_(real, _number(start, group))


# --------------------------------------------------------------------------------------------------------------------
# LBFGS


def has_history(optimizer: Optimizer, state: dict[str, Any]) -> bool:
    """Return whether a parameter's state is that of LBFGS after a step, which covers all parameters of its group."""
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
    """Drop the history of LBFGS if it would move frozen entries: curvature measured along them no longer applies."""
    for group in optimizer.param_groups:
        parameters = group["params"]
        state = optimizer.state.get(parameters[0], {}) if parameters else {}
        if has_history(optimizer, state):
            frozen = torch.cat([_flat_frozen(parameter, held) for parameter in parameters])
            if any(bool(vector[frozen].any()) for vector in history_vectors(state)):
                state.clear()


def _flat_frozen(parameter: Tensor, held: Iterable[tuple[FrozenParameter, Tensor]]) -> Tensor:
    """Return the mask of the frozen entries, flattened as in LBFGS, which has two numbers for a complex entry."""
    frozen = torch.zeros(parameter.shape, dtype=torch.bool, device=parameter.device)
    for its_frozen, its_parameter in held:
        if its_parameter is parameter:
            frozen |= its_frozen.frozen
    return frozen.flatten().repeat_interleave(2 if parameter.is_complex() else 1)
