"""Turns a region and a parameter into a bool tensor that is True at the region's entries."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import EllipsisType
from typing import Any, Final, TypeAlias, TypeGuard

import torch
from torch import Tensor

from .._counted import counted
from .._errors import RegionError, SpecError
from .._rules.patterns.pattern import Pattern
from .._rules.region import And, Index, IndexItem, Not, Or, Region, Slice, Union
from .least import least_drawn, of_least_magnitude
from .plain import as_tensor, oddity_of

_SELECTED_AT_ONCE: Final = 1 << 22
"""The most entries that a pattern may sort at once: their positions take eight bytes each."""

Item: TypeAlias = "int | Slice | tuple[int, ...] | Union"
"""What an index contains for one dimension."""


def select(region: Any, parameter: Tensor) -> Tensor:
    """Return the bool tensor, of the parameter's shape and on its device, that is True inside `region`.

    Args:
        region: A `Region`; a bool tensor or array of the parameter's shape or of its leading dimensions, or one that
            broadcasts to it with as many dimensions; or a function from the parameter to one of these.
        parameter: The tensor to select from; what it contains matters only to some patterns and functions.

    Raises:
        RegionError: The region does not fit the parameter's shape, or selects no entry.
        SpecError: `region` is none of these.
    """
    frozen = select_perhaps_nothing(region, parameter)
    if not bool(frozen.any()):
        raise RegionError("the region selects no entry", "correct it, or leave the rule out")
    return frozen


def select_perhaps_nothing(region: Any, parameter: Tensor) -> Tensor:
    """Do what `select` does, for a region that may select no entry."""
    with torch.no_grad():
        return _select(region, parameter.detach())


def _select(region: Any, parameter: Tensor) -> Tensor:
    match region:
        case Index():
            return select_index(region, parameter.shape, parameter.device)
        case Pattern():
            return select_pattern(region, parameter)
        case Not(operand=operand):
            return ~_select(operand, parameter)
        case And(left=left, right=right):
            return _select(left, parameter) & _select(right, parameter)
        case Or(left=left, right=right):
            return _select(left, parameter) | _select(right, parameter)
        case _ if hasattr(type(region), "__array__"):
            return _checked_mask(region, parameter)
        case _ if _is_function(region):
            return _checked_mask(region(parameter), parameter)
    raise SpecError(
        f"a region is an index, a pattern, a bool tensor or a function, found {type(region).__name__}",
        "write `freezehooks.entries[...]` for an index, convert an array with torch.as_tensor, "
        "and give a function that takes only the parameter",
    )


def _is_function(region: Any) -> TypeGuard[Callable[[Tensor], Any]]:
    """Return whether a region is a function of one parameter; `nm`, which makes a pattern from two numbers, is not."""
    if not callable(region) or isinstance(region, type | Region):
        return False
    try:
        inspect.signature(region).bind(None)
    except TypeError:
        return False
    except ValueError:  # some functions written in C have no signature
        return True
    return True


def _checked_mask(mask: Any, parameter: Tensor) -> Tensor:
    """Return a mask expanded to the parameter's shape, by its leading dimensions as in torch or by broadcasting.

    Raises:
        RegionError: It is not a dense bool tensor, fits in neither way, or fits in both with different results.
    """
    mask = as_tensor(mask)
    _check_is_mask(mask)
    return _in_shape(mask.detach().to(parameter.device), parameter.shape).clone()


def _check_is_mask(mask: Any) -> None:
    if not isinstance(mask, Tensor):
        raise RegionError(
            f"a mask must be a bool tensor, found {type(mask).__name__}", "give True where an entry is frozen"
        )
    oddity = oddity_of(mask)
    if oddity:
        raise RegionError(
            f"a mask must be a dense tensor with numbers, found {oddity}",
            "convert it with `to_dense()`, or make it on a real device",
        )
    if mask.dtype != torch.bool:
        is_binary = not mask.is_complex() and bool(((mask == 0) | (mask == 1)).all())
        both_ways = "give `mask == 1` if 1 means frozen, `mask == 0` if 1 means trained"
        is_index = mask.ndim == 1 and not mask.is_floating_point() and not mask.is_complex()
        other = "`indices.tolist()` for an index" if is_index else "True where an entry is frozen"
        raise RegionError(
            f"a mask must be a bool tensor, found dtype {mask.dtype}",
            both_ways if is_binary else f"give {other}" + ("" if is_index else ", as in `weight.abs() < 0.1`"),
        )


def _in_shape(mask: Tensor, shape: torch.Size) -> Tensor:
    """Return a mask of the leading dimensions, or one with as many dimensions as the shape, expanded to the shape.

    Raises:
        RegionError: It is neither, or could be a mask of the last dimensions as well.
    """
    if mask.shape == shape:
        return mask
    if 0 < mask.ndim < len(shape) and mask.shape == shape[: mask.ndim]:
        leading = mask[(..., *[None] * (len(shape) - mask.ndim))].expand(shape)
        if mask.shape == shape[-mask.ndim :] and not bool((leading == mask).all()):
            full, new = ", ".join([":"] * mask.ndim), ", ".join(["None"] * (len(shape) - mask.ndim))
            raise RegionError(
                f"a mask of shape {_show(mask)} fits the first and the last dimensions of {tuple(shape)}",
                f"give `mask[{full}, {new}]` for the first, `mask[{new}, {full}]` for the last",
            )
        return leading
    if mask.ndim == len(shape) and all(size in (1, full) for size, full in zip(mask.shape, shape, strict=True)):
        return mask.expand(shape)
    raise RegionError(
        f"a mask must have the parameter's shape {tuple(shape)} or that of its first dimensions, found {_show(mask)}",
        _mask_advice(mask, shape),
    )


def _mask_advice(mask: Tensor, shape: torch.Size) -> str:
    missing = len(shape) - mask.ndim
    if mask.ndim >= 2 and mask.mT.shape == shape:
        return "transpose it: `mask.T`" if mask.ndim == 2 else "transpose its last two dimensions: `mask.mT`"
    if missing > 0 and all(size in (1, full) for size, full in zip(mask.shape, shape[missing:], strict=True)):
        return f"give `mask[{', '.join(['None'] * missing)}]` to repeat it over the leading dimensions"
    return "give a bool for each entry of the parameter, or one for each row"


def _show(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


# --------------------------------------------------------------------------------------------------------------------
# Patterns


def select_pattern(pattern: Pattern, parameter: Tensor) -> Tensor:
    """Return the bool tensor of the parameter's shape that is True at the entries of a pattern.

    Raises:
        RegionError: The pattern does not fit the parameter's shape.
    """
    pattern.check(parameter.shape)
    frozen: Tensor = pattern.select(parameter, _Selector())
    return frozen if frozen.shape == parameter.shape else frozen.expand(parameter.shape).clone()


class _Selector:
    """The operations of torch for patterns, which do not import torch themselves."""

    def coordinates(self, parameter: Tensor, dims: int) -> list[Tensor]:
        return coordinates(parameter, dims)

    def select(self, region: Region, parameter: Tensor) -> Tensor:
        return _select(region, parameter)

    def of_least_magnitude(self, parameter: Tensor, count: int, *, largest: bool = False) -> Tensor:
        return of_least_magnitude(parameter, count, largest=largest)

    def least_drawn(self, parameter: Tensor, count: int, draw: Callable[[Tensor], Tensor]) -> Tensor:
        return least_drawn(parameter, count, draw)

    def by_rows(self, parameter: Tensor, choose: Callable[[Tensor], Tensor]) -> Tensor:
        rows = max(1, _SELECTED_AT_ONCE // (parameter[:1].numel() or 1))
        return torch.cat([choose(chunk) for chunk in parameter.split(rows)])


def coordinates(parameter: Tensor, dims: int) -> list[Tensor]:
    """Return the coordinates along each of the last `dims` dimensions, shaped to broadcast over those dimensions.

    Example:
        >>> coordinates(torch.zeros(5, 2, 3), 2)
        [tensor([[0],
                [1]]), tensor([0, 1, 2])]
    """
    steps = [torch.arange(size, device=parameter.device) for size in parameter.shape[-dims:]]
    return [step.view(-1, *[1] * (dims - 1 - d)) for d, step in enumerate(steps)]


# --------------------------------------------------------------------------------------------------------------------
# Indices


def select_index(index: Index, shape: torch.Size, device: torch.device) -> Tensor:
    """Return the bool tensor of the given shape that is True at the entries of an index."""
    frozen = torch.zeros(shape, dtype=torch.bool, device=device)
    if any(isinstance(item, Union) for item in index.items):
        frozen.view(-1)[positions(index, shape).to(device)] = True
    else:
        frozen[as_key(index, shape)] = True
    return frozen


def positions(index: Index, shape: torch.Size) -> Tensor:
    """Return the positions in the flat tensor of the entries of ``tensor[index]``, in its shape and order.

    A union keeps its dimension, with each of its positions once, whatever the index contains for the others.
    """
    count = torch.arange(shape.numel(), device="cpu").view(shape)
    by_dimension = _by_dimension(index, shape)
    for dimension, item in by_dimension:
        if isinstance(item, Union):
            count = count.index_select(
                dimension, torch.tensor(_joined(item, dimension, shape[dimension]), dtype=torch.int64, device="cpu")
            )
    full = Slice(None, None, None)
    plain = Index(tuple(full if isinstance(item, Union) else item for _, item in by_dimension))
    backward = [d for d, item in by_dimension if isinstance(item, Slice) and (item.step or 1) < 0]
    return (
        count.flip(backward)[as_key(plain, count.shape, flipped=True)]
        if backward
        else count[as_key(plain, count.shape)]
    )


def _joined(union: Union, dimension: int, size: int) -> list[int]:
    """Return the positions in a union, each once."""
    found: dict[int, None] = {}
    for span in union.parts:
        if isinstance(span, Slice):
            found.update(dict.fromkeys(range(*slice(span.start, span.stop, span.step).indices(size))))
        else:
            _check_range(span, dimension, size)
            found[span % size] = None
    return list(found)


def as_key(index: Index, shape: torch.Size, flipped: bool = False) -> tuple[Any, ...]:
    """Convert an index to the key that a tensor of the given shape takes between its brackets.

    torch has no slices that run backward. They become the forward slice with the same positions or, for a tensor
    flipped along their dimension, the forward slice with the same order.
    """
    key: list[Any] = []
    for dimension, item in _by_dimension(index, shape):
        size = shape[dimension]
        if isinstance(item, Slice):
            key.append(_forward(item, size, flipped))
        elif not isinstance(item, Union):
            _check_range(item, dimension, size)
            key.append(list(item) if isinstance(item, tuple) else item)
    _check_lists([item for item in key if isinstance(item, list)])
    return tuple(key)


def _by_dimension(index: Index, shape: torch.Size) -> list[tuple[int, Item]]:
    """Pair every dimension of an index with its item, with a full slice for each dimension that ``...`` covers."""
    items: list[IndexItem] = list(index.items)
    split = items.index(...) if ... in items else len(items)
    before, after = _without_ellipsis(items[:split]), _without_ellipsis(items[split + 1 :])
    indexed = len(before) + len(after)
    if indexed > len(shape):
        raise RegionError(
            f"an index of {counted(indexed, 'dimension', 'dimensions')} on a tensor of {len(shape)}",
            f"give {len(shape)} at most",
        )
    skipped = len(shape) - indexed if split < len(items) else 0
    filled = [*before, *[Slice(None, None, None)] * skipped, *after]
    return list(enumerate(filled))


def _without_ellipsis(items: list[IndexItem]) -> list[Item]:
    return [item for item in items if not isinstance(item, EllipsisType)]


def _forward(item: Slice, size: int, flipped: bool) -> slice:
    span = range(*slice(item.start, item.stop, item.step).indices(size))
    if not len(span):
        return slice(0, 0, 1)
    if span.step > 0:
        return slice(span.start, span.stop, min(span.step, size))  # torch takes no step of over 63 bits
    lowest, highest = (size - 1 - span[0], size - 1 - span[-1]) if flipped else (span[-1], span[0])
    return slice(lowest, highest + 1, min(-span.step, size))


def _check_range(item: int | tuple[int, ...], dimension: int, size: int) -> None:
    for position in item if isinstance(item, tuple) else (item,):
        if not -size <= position < size:
            advice = f"use 0 to {size - 1}" if size else "the dimension is empty"
            raise RegionError(f"index {position} is out of range for dimension {dimension} of size {size}", advice)


def _check_lists(lists: list[list[int]]) -> None:
    lengths = {len(positions) for positions in lists} - {1}
    if len(lengths) > 1:
        raise RegionError(
            f"lists in one index are read side by side and need one length, found {sorted(lengths)}",
            "join two rules with `&` to take every combination",
        )
