"""What an optimizer remembers of a parameter: which items have a number for each entry, and where those start."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._held.parameter import FrozenParameter
from .._ranks.sharding import local
from .elementwise import is_elementwise, steps_like

_WEIGHTS: Final = frozenset({"ax", "slow_buffer", "slow_param", "master_param"})
"""State that holds weights: the averages of ASGD, the slow weights of Lookahead, master copies."""

_STARTS: Final = {"step_size": "lr", "sum": "initial_accumulator_value"}
"""State that does not start at 0 but at an option of its group: Rprop's step sizes, Adagrad's sums."""

_COUNTERS: Final = frozenset({"step", "eta", "mu", "mu_product"})
"""State that counts steps: of the shape of a parameter without dimensions, yet none of its entries."""

_VECTORS: Final = ("d", "prev_flat_grad", "old_dirs", "old_stps")
"""What LBFGS remembers: vectors over all entries of all of its parameters, and lists of such vectors."""


def stepped_by(optimizer: Optimizer) -> set[int]:
    """Return the ids of the parameters that an optimizer steps."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def entrywise(state: dict[str, Any], shape: torch.Size) -> Iterator[tuple[str, Tensor]]:
    """Yield the items of a parameter's state that have a number for each entry of a tensor of that shape."""
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == shape and name not in _COUNTERS:
            yield name, value


def is_counter(name: str) -> bool:
    """Return whether an item of a parameter's state counts its steps."""
    return name in _COUNTERS


def holds_weights(name: str, group: dict[str, Any]) -> bool:
    """Return whether an item of an optimizer's state is weights; schedule-free's `z` is, that of others is not."""
    return name in _WEIGHTS or (name == "z" and "train_mode" in group)


def started(name: str, parameter: Tensor, group: dict[str, Any], like: Tensor) -> Tensor:
    """Return an item of a parameter's state as it starts: of the parameter's shape and layout, like another tensor."""
    if holds_weights(name, group):
        return parameter.detach().to(like.device, like.dtype, copy=True)
    start = _start_of(name, group)
    number = complex(start, start) if like.is_complex() else start
    return torch.full_like(parameter, number, dtype=like.dtype, device=like.device)


def _start_of(name: str, group: dict[str, Any]) -> float:
    """Return what an item starts at; that of complex entries, in their real and in their imaginary part."""
    return float(group.get(_STARTS.get(name, ""), 0.0))


def reset_frozen_state(state: dict[str, Any], frozen: FrozenParameter, group: dict[str, Any]) -> None:
    """Make a parameter's state what it would be had the frozen entries never moved."""
    for name, value in entrywise(state, frozen.shape):
        if holds_weights(name, group):
            frozen.impose_(local(value))
        else:
            here = local(value)
            for real in (here.real, here.imag) if here.is_complex() else (here,):
                frozen.fill_(real, _start_of(name, group))


def may_keep_weights(optimizer: Optimizer) -> bool:
    """Return whether some item of the optimizer's state may hold weights."""
    return not is_elementwise(optimizer) or steps_like(type(optimizer), torch.optim.ASGD)


def impose_on_weights(state: dict[str, Any], frozen: FrozenParameter, group: dict[str, Any]) -> None:
    """Write the values into those items of a parameter's state that hold weights."""
    for name, value in entrywise(state, frozen.shape):
        if holds_weights(name, group):
            frozen.impose_(local(value))


# --------------------------------------------------------------------------------------------------------------------
# LBFGS


def has_history(state: dict[str, Any]) -> bool:
    """Return whether a parameter's state is that of LBFGS after a step, which speaks of all parameters of its group."""
    return "old_dirs" in state


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
        if has_history(state):
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
