"""Which entries of a tensor a region means: region + parameter -> bool tensor (True = frozen)."""

from __future__ import annotations

from collections.abc import Callable
from types import EllipsisType
from typing import Any, Final

import torch
from torch import Tensor

from .._counted import counted
from .._errors import RegionError, SpecError
from .._rules.region import And, Index, IndexItem, Not, Or, Pattern, Region, Slice


def select(region: Any, parameter: Tensor) -> Tensor:
    """Return the bool tensor, of the parameter's shape and on its device, that is True inside `region`.

    Args:
        region: A `Region`, a bool tensor of the parameter's shape, or a function from the parameter to one.
        parameter: The tensor the region is to be cut from; its numbers matter to `zeros`, `smallest` and `nm` alone.

    Raises:
        RegionError: The region does not fit the parameter's shape, or selects no entry.
        SpecError: `region` is none of the three.
    """
    with torch.no_grad():
        frozen = _select(region, parameter.detach())
    if not bool(frozen.any()):
        raise RegionError("the region selects no entry", "correct it, or leave the rule out")
    return frozen


def _select(region: Any, parameter: Tensor) -> Tensor:
    match region:
        case Index():
            return select_index(region, parameter.shape, parameter.device)
        case Pattern(name=name, arguments=arguments):
            return _PATTERNS[name](parameter, *arguments)
        case Not(operand=operand):
            return ~_select(operand, parameter)
        case And(left=left, right=right):
            return _select(left, parameter) & _select(right, parameter)
        case Or(left=left, right=right):
            return _select(left, parameter) | _select(right, parameter)
        case Tensor():
            return _checked_mask(region, parameter)
        case _ if callable(region) and not isinstance(region, Region):
            return _checked_mask(region(parameter), parameter)
    raise SpecError(
        f"a region is an index, a pattern, a bool tensor or a function, found {type(region).__name__}",
        "write `freezehooks.entries[...]` for an index, or convert an array with torch.as_tensor",
    )


def _checked_mask(mask: Any, parameter: Tensor) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        found = f"dtype {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise RegionError(
            f"a mask must be a bool tensor, found {found}", "give True where an entry is frozen, as in `mask == 0`"
        )
    if mask.shape != parameter.shape:
        raise RegionError(
            f"a mask must have the parameter's shape {_show(parameter)}, found {_show(mask)}",
            "give a bool for each entry of the parameter, or expand the mask to its shape",
        )
    if mask.is_meta or mask.layout != torch.strided:
        raise RegionError(
            f"a mask must be a dense tensor with numbers, found {mask.layout} on {mask.device}",
            "convert it with `to_dense()`, or make it on a real device",
        )
    return mask.detach().to(parameter.device, copy=True)


def _show(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


# --------------------------------------------------------------------------------------------------------------------
# Indices


def select_index(index: Index, shape: torch.Size, device: torch.device) -> Tensor:
    """Return the bool tensor of the given shape that is True at `index`."""
    frozen = torch.zeros(shape, dtype=torch.bool, device=device)
    frozen[as_key(index, shape)] = True
    return frozen


def positions(index: Index, shape: torch.Size) -> Tensor:
    """Return, in the shape and order of ``tensor[index]``, where its entries lie in the flattened tensor."""
    count = torch.arange(shape.numel()).view(shape)
    backward = [d for d, item in _by_dimension(index, shape) if isinstance(item, Slice) and (item.step or 1) < 0]
    return count.flip(backward)[as_key(index, shape, flipped=True)] if backward else count[as_key(index, shape)]


def as_key(index: Index, shape: torch.Size, flipped: bool = False) -> tuple[Any, ...]:
    """Return `index` as what a tensor of the given shape takes between its brackets.

    torch has no slices that run backward: they become the forward slice of the same positions, or, for a tensor
    that was flipped along their dimension, the forward slice of the same order.
    """
    key: list[Any] = []
    for dimension, item in _by_dimension(index, shape):
        size = shape[dimension]
        if isinstance(item, Slice):
            key.append(_forward(item, size, flipped))
        else:
            _check_range(item, dimension, size)
            key.append(list(item) if isinstance(item, tuple) else item)
    _check_lists([item for item in key if isinstance(item, list)])
    return tuple(key)


def _by_dimension(index: Index, shape: torch.Size) -> list[tuple[int, int | Slice | tuple[int, ...]]]:
    """Pair every dimension that `index` speaks of with its item; ``...`` stands for the full ones between."""
    items: list[IndexItem] = list(index.items)
    split = items.index(...) if ... in items else len(items)
    before, after = _without_ellipsis(items[:split]), _without_ellipsis(items[split + 1 :])
    spoken_of = len(before) + len(after)
    if spoken_of > len(shape):
        raise RegionError(
            f"an index of {counted(spoken_of, 'dimension', 'dimensions')} on a tensor of {len(shape)}",
            f"give {len(shape)} at most",
        )
    skipped = len(shape) - spoken_of if split < len(items) else 0
    filled = [*before, *[Slice(None, None, None)] * skipped, *after]
    return list(enumerate(filled))


def _without_ellipsis(items: list[IndexItem]) -> list[int | Slice | tuple[int, ...]]:
    return [item for item in items if not isinstance(item, EllipsisType)]


def _forward(item: Slice, size: int, flipped: bool) -> slice:
    span = range(*slice(item.start, item.stop, item.step).indices(size))
    if span.step > 0:
        return slice(span.start, max(span.stop, span.start), span.step)
    if not len(span):
        return slice(0, 0, 1)
    lowest, highest = (size - 1 - span[0], size - 1 - span[-1]) if flipped else (span[-1], span[0])
    return slice(lowest, highest + 1, -span.step)


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


# --------------------------------------------------------------------------------------------------------------------
# Patterns


def kernel_center(shape: torch.Size) -> Index:
    """Return the index of a convolution kernel's middle tap.

    Raises:
        RegionError: The tensor is no convolution weight, or its kernel has an even size and so no middle.
    """
    return Index((..., *_middles(shape, _spatial_dimensions(shape, "center"), "center")))


def _center(parameter: Tensor) -> Tensor:
    return select_index(kernel_center(parameter.shape), parameter.shape, parameter.device)


def _cross(parameter: Tensor, dims: int) -> Tensor:
    """The taps at the middle of all but at most one of the last `dims` dimensions."""
    spatial = _spatial_dimensions(parameter.shape, "cross")
    if dims > spatial:
        raise RegionError(
            f"pattern `cross({dims})` needs a kernel of {dims} spatial dimensions, found {spatial}",
            f"write `cross({spatial})`",
        )
    middles = _middles(parameter.shape, dims, "cross")
    off_axis = sum(grid != middle for grid, middle in zip(_grids(parameter, dims), middles, strict=True))
    return _everywhere(torch.as_tensor(off_axis <= 1), parameter)


def _border(parameter: Tensor) -> Tensor:
    dims = _spatial_dimensions(parameter.shape, "border")
    inside = torch.ones((), dtype=torch.bool, device=parameter.device)
    for grid, size in zip(_grids(parameter, dims), parameter.shape[-dims:], strict=True):
        inside = inside & (grid > 0) & (grid < size - 1)
    return _everywhere(~inside, parameter)


def _diagonal(parameter: Tensor, k: int) -> Tensor:
    rows, columns = _matrix_grids(parameter, "diagonal")
    return _everywhere(columns - rows == _nearest_diagonal(k, parameter), parameter)


def _triu(parameter: Tensor, k: int) -> Tensor:
    rows, columns = _matrix_grids(parameter, "triu")
    return _everywhere(columns - rows >= _nearest_diagonal(k, parameter), parameter)


def _tril(parameter: Tensor, k: int) -> Tensor:
    rows, columns = _matrix_grids(parameter, "tril")
    return _everywhere(columns - rows <= _nearest_diagonal(k, parameter), parameter)


def _zeros(parameter: Tensor) -> Tensor:
    return parameter.eq(0)


def _smallest(parameter: Tensor, fraction: float) -> Tensor:
    magnitude = parameter.abs().flatten()
    order = magnitude.sort(stable=True).indices  # stable: the same weights give the same region everywhere
    frozen = torch.zeros_like(magnitude, dtype=torch.bool)
    frozen[order[: round(fraction * len(order))]] = True
    return frozen.view(parameter.shape)


def _nm(parameter: Tensor, n: int, m: int) -> Tensor:
    if parameter.ndim < 2:
        raise _needs_a_matrix("nm", parameter)
    width = parameter.shape[1]
    if width % m:
        raise RegionError(
            f"pattern `nm({n}, {m})` needs dimension 1 to be a multiple of {m}, found {width}",
            "choose a group size that divides it",
        )
    groups = parameter.abs().movedim(1, -1).unflatten(-1, (width // m, m))
    rank = groups.argsort(dim=-1, stable=True).argsort(dim=-1)
    frozen: Tensor = rank < m - n
    return frozen.flatten(-2).movedim(-1, 1)


_PATTERNS: Final[dict[str, Callable[..., Tensor]]] = {
    "center": _center,
    "cross": _cross,
    "border": _border,
    "diagonal": _diagonal,
    "triu": _triu,
    "tril": _tril,
    "zeros": _zeros,
    "smallest": _smallest,
    "nm": _nm,
}


def _spatial_dimensions(shape: torch.Size, pattern: str) -> int:
    if len(shape) < 3:
        found = counted(len(shape), "dimension", "dimensions")
        raise RegionError(
            f"pattern `{pattern}` needs a convolution weight (out, in/groups, *kernel), found {found}",
            "name the convolutions alone, or write an index",
        )
    return len(shape) - 2


def _middles(shape: torch.Size, dims: int, pattern: str) -> list[int]:
    kernel = tuple(shape[-dims:])
    if not all(size % 2 for size in kernel):
        raise RegionError(
            f"pattern `{pattern}` needs a kernel of odd size, found {'x'.join(map(str, kernel))}",
            "write the entries as an index",
        )
    return [size // 2 for size in kernel]


def _grids(parameter: Tensor, dims: int) -> tuple[Tensor, ...]:
    """Return each of the last `dims` coordinates, shaped to broadcast over those dimensions."""
    sizes = parameter.shape[-dims:]
    return torch.meshgrid(*(torch.arange(size, device=parameter.device) for size in sizes), indexing="ij")


def _matrix_grids(parameter: Tensor, pattern: str) -> tuple[Tensor, ...]:
    if parameter.ndim < 2:
        raise _needs_a_matrix(pattern, parameter)
    return _grids(parameter, 2)


def _nearest_diagonal(k: int, parameter: Tensor) -> int:
    """Return k, or the first diagonal past the corner on its side: torch compares with no integer of over 64 bits."""
    return max(-parameter.shape[-2], min(k, parameter.shape[-1]))


def _needs_a_matrix(pattern: str, parameter: Tensor) -> RegionError:
    return RegionError(
        f"pattern `{pattern}` needs a tensor of 2 or more dimensions, found {parameter.ndim}",
        "name the matrices alone, or write an index",
    )


def _everywhere(frozen: Tensor, parameter: Tensor) -> Tensor:
    """Repeat what holds for the last dimensions over the leading ones."""
    return frozen.expand(parameter.shape).clone()
