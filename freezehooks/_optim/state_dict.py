"""Converts optimizer state between whole tensors and flat ones of the free entries."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._entries.flat_order import FlatOrder
from .._errors import StateMismatchError, UnsupportedParameterError
from .._held.parameter import FrozenParameter
from .._held.saved import FORMAT, check_format, load_entries, readable, save_entries
from .._ranks.sharding import is_sharded, local
from .state import has_history, history_vectors, is_plain, known_items, started, with_history

FlatOrders: TypeAlias = "Mapping[Tensor, FlatOrder]"
"""The parameters whose state is flat, each with its free entries; the state of others is whole."""

_KEY: Final = "freezehooks"
"""The key under which a compact state dict describes the entries of its flat tensors.

It is also the key of an additional group without parameters: without that, a plain optimizer would load the state dict,
and its fused kernels would read and write beyond the ends of the flat tensors.
"""


def convert_state(
    optimizer: Optimizer,
    state: Mapping[Any, Any],
    before: FlatOrders,
    after: FlatOrders,
    key_of: Callable[[Tensor], Any] = lambda parameter: parameter,
) -> dict[Any, dict[str, Any]]:
    """Convert an optimizer's state to other free entries; entries that are new in it get their initial values.

    Args:
        optimizer: The optimizer.
        state: Its state, by parameter or by index.
        before: The parameters whose state is flat now.
        after: The parameters whose state is to be flat.
        key_of: Returns a parameter's key in the state.

    Returns:
        The items that change, by key; an item is empty if its state cannot be kept (the history of LBFGS, if it moves
        entries that are frozen now).

    Raises:
        StateMismatchError: An item does not have the form that `before` implies.
    """
    changed = {}
    items = known_items(optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            key = key_of(parameter)
            own = state.get(key) or {}
            if has_history(optimizer, own):
                changed[key] = _convert_history(own, group["params"], before, after)
            elif own and before.get(parameter) is not after.get(parameter):
                changed[key] = _convert_items(own, items, parameter, group, before.get(parameter), after.get(parameter))
    for parameter in before.keys() - _indices(optimizer).keys():  # it was taken out of its group, and keeps its state
        own = state.get(key_of(parameter)) or {}
        if own and not has_history(optimizer, own):
            whole = _convert_items(own, items, parameter, optimizer.defaults, before[parameter], None)
            changed[key_of(parameter)] = whole
    return changed


def _convert_items(
    state: dict[str, Any],
    items: Mapping[str, str],
    parameter: Tensor,
    group: dict[str, Any],
    before: FlatOrder | None,
    after: FlatOrder | None,
) -> dict[str, Any]:
    shape = parameter.shape if before is None else torch.Size([before.count])
    changed = dict(state)
    for name, start in items.items():
        value = state.get(name)
        if isinstance(value, Tensor):
            _check_item(name, value, parameter, shape, is_flat=before is not None)
            changed[name] = _convert(value, started(start, parameter, group, value), before, after)
    return changed


def _check_item(name: str, value: Tensor, parameter: Tensor, shape: torch.Size, *, is_flat: bool = False) -> None:
    """Reject an item that does not have one number for each entry."""
    _check_shape(name, value, parameter, shape)
    if not is_plain(value, parameter, is_flat=is_flat) or not (value.is_floating_point() or value.is_complex()):
        raise StateMismatchError(
            f"the optimizer's `{name}` is a {type(value).__name__} of dtype {value.dtype}, expected a plain tensor of "
            f"{parameter.dtype}",
            "leave out compact=True",
        )


def _check_shape(name: str, value: Tensor, parameter: Tensor, shape: torch.Size) -> None:
    if value.shape != shape:
        raise StateMismatchError(
            f"the optimizer's `{name}` has shape {tuple(value.shape)} for a parameter of shape "
            f"{tuple(parameter.shape)}, expected {tuple(shape)}",
            "use load_state_dict, with the state dict of a plain run or what state_dict(compact=True) returned",
        )


def _convert(value: Tensor, start: Tensor, before: FlatOrder | None, after: FlatOrder | None) -> Tensor:
    """Convert a tensor between whole and flat forms; `start` has its initial values, is whole, and is written to.

    The flat form of a sharded tensor has the entries of this rank's shard.
    """
    if before is not None:
        before.scatter_(local(start), value)
        value = start
    return value if after is None else after.gather(local(value)).clone()


def _convert_history(
    state: dict[str, Any], parameters: list[Tensor], before: FlatOrders, after: FlatOrders
) -> dict[str, Any]:
    """Convert the state of LBFGS, whose vectors concatenate the entries of all parameters."""

    def converted_vector(vector: Tensor) -> Tensor:
        slices = vector.split([_length(parameter, before.get(parameter)) for parameter in parameters])
        return torch.cat(
            [
                _convert_slice(each, parameter, before.get(parameter), after.get(parameter))
                for each, parameter in zip(slices, parameters, strict=True)
            ]
        )

    changed = with_history(state, converted_vector)
    pairs = zip(history_vectors(state), history_vectors(changed), strict=True)
    kept = all(bool(old.count_nonzero() == new.count_nonzero()) for old, new in pairs)
    return changed if kept else {}


def _length(parameter: Tensor, free: FlatOrder | None) -> int:
    """Return how many numbers of a vector belong to a parameter; a complex entry has two."""
    entries = parameter.numel() if free is None else free.count
    return entries * (2 if parameter.is_complex() else 1)


def _convert_slice(flat: Tensor, parameter: Tensor, before: FlatOrder | None, after: FlatOrder | None) -> Tensor:
    entries = torch.view_as_complex(flat.view(-1, 2)) if parameter.is_complex() else flat
    start = torch.zeros_like(parameter, dtype=entries.dtype)
    value = entries if before is not None else entries.view(parameter.shape)
    converted = _convert(value, start, before, after).reshape(-1)
    return torch.view_as_real(converted).view(-1) if parameter.is_complex() else converted


class FlatState(defaultdict[Any, Any]):
    """The state of a compact optimizer; when it is copied or pickled, it becomes whole.

    A copied or unpickled optimizer has lost its hooks, without which it cannot step flat tensors.
    """

    def __init__(self, optimizer: Optimizer, orders: FlatOrders) -> None:
        super().__init__(dict, optimizer.state)
        self._optimizer = weakref.ref(optimizer)
        self._orders = orders

    def __reduce__(self) -> Any:
        optimizer = self._optimizer()
        whole = {} if optimizer is None else convert_state(optimizer, self, self._orders, {})
        return defaultdict, (dict,), None, None, iter({**self, **whole}.items())


# --------------------------------------------------------------------------------------------------------------------
# State dicts


def whole_state_dict(optimizer: Optimizer, state_dict: dict[str, Any], orders: FlatOrders) -> dict[str, Any]:
    """Convert an optimizer's state dict to whole tensors, which any optimizer of the same class can load."""
    state = convert_state(optimizer, state_dict["state"], orders, {}, _indices(optimizer).get)
    return {**state_dict, "state": {**state_dict["state"], **state}}


def compact_state_dict(
    optimizer: Optimizer,
    state_dict: dict[str, Any],
    orders: FlatOrders,
    held: Mapping[Tensor, list[FrozenParameter]],
) -> dict[str, Any]:
    """Convert an optimizer's state dict to flat tensors in row order, and describe which entries they contain.

    Args:
        optimizer: The optimizer.
        state_dict: Its state dict, flat in memory order.
        orders: The parameters whose state is flat.
        held: What is frozen in each of them.

    Raises:
        UnsupportedParameterError: A parameter is sharded.
    """
    index_of = _indices(optimizer)
    for parameter in orders:
        _check_on_one_rank(parameter)
    sets = {parameter: [c.entries for each in found for c in each.constraints] for parameter, found in held.items()}
    described = {index_of[parameter]: save_entries(found, parameter.shape) for parameter, found in sets.items()}
    in_rows = {parameter: _in_rows(parameter, described[index_of[parameter]]) for parameter in orders}
    state = convert_state(optimizer, state_dict["state"], orders, in_rows, index_of.get)
    return {
        **state_dict,
        "state": {**state_dict["state"], **state},
        "param_groups": [*state_dict["param_groups"], {"params": [], _KEY: FORMAT}],
        _KEY: {"format": FORMAT, "parameters": described},
    }


def read_state_dict(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Convert a compact state dict to whole tensors, whatever rules it was saved under; return any other unchanged.

    Raises:
        StateMismatchError: It is a compact one for parameters of other shapes, or cannot be read.
    """
    description = state_dict.get(_KEY)
    if description is None:
        return state_dict
    advice = "pass what MaskedOptimizer.state_dict(compact=True) returned, for the same parameters in the same order"
    with readable("the compact optimizer state", advice):
        check_format("the compact optimizer state", description)
        parameters = {index: parameter for parameter, index in _indices(optimizer).items()}
        orders = {
            parameters[index]: _in_rows(parameters[index], item) for index, item in description["parameters"].items()
        }
        plain = {name: item for name, item in state_dict.items() if name != _KEY}
        plain["param_groups"] = [group for group in plain["param_groups"] if _KEY not in group]
        return whole_state_dict(optimizer, plain, orders)


def check_in_plain_shapes(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Reject a state dict without whole tensors before a compact optimizer loads it.

    Raises:
        StateMismatchError: An item does not have the shape of its parameter.
    """
    index_of = _indices(optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = state_dict["state"].get(index_of[parameter]) or {}
            if has_history(optimizer, state):
                expected = torch.Size([sum(_length(each, None) for each in group["params"])])
                for vector in history_vectors(state):
                    _check_shape("history", vector, parameter, expected)
                continue
            for name in known_items(optimizer):
                if isinstance(state.get(name), Tensor):
                    _check_item(name, state[name], parameter, parameter.shape)


def _in_rows(parameter: Tensor, item: dict[str, Any]) -> FlatOrder:
    """Return the free entries, in row order, given the frozen ones as `save_entries` saved them."""
    _check_on_one_rank(parameter)
    if item["shape"] != list(parameter.shape):
        raise StateMismatchError(
            f"the compact optimizer state is of a parameter of shape {tuple(item['shape'])}, found "
            f"{tuple(parameter.shape)} in its place",
            "give the optimizer the parameters of the saved run, in the same order",
        )
    return FlatOrder.in_rows(~load_entries(item, parameter))


def _check_on_one_rank(parameter: Tensor) -> None:
    if is_sharded(parameter):
        raise UnsupportedParameterError(
            f"state_dict(compact=True) needs whole parameters, found a sharded one of shape {tuple(parameter.shape)}",
            "save state_dict(), which has the plain shapes",
        )


def _indices(optimizer: Optimizer) -> dict[Tensor, int]:
    """Map each parameter to its index in a state dict."""
    parameters = dict.fromkeys(parameter for group in optimizer.param_groups for parameter in group["params"])
    return {parameter: index for index, parameter in enumerate(parameters)}
