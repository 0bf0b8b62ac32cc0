"""Shards: the part of a tensor on this rank, if torch.distributed spreads the tensor over several ranks."""

from __future__ import annotations

import sys
from typing import Any, Final, TypeAlias, cast

import torch
from torch import Tensor, nn

from .._torch import is_dtensor, local_tensor

Layout: TypeAlias = "tuple[Any, tuple[Any, ...]]"
"""A device mesh, and the placement of a tensor along each of its dimensions."""

_PLAIN: Final = (Tensor, nn.Parameter)


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, as the parameters of FSDP2 and of tensor parallelism are."""
    return type(tensor) not in _PLAIN and is_dtensor(tensor)


def layout_of(tensor: Tensor) -> Layout | None:
    """Return the mesh and placements of a sharded tensor, or None if the tensor is not sharded."""
    sharded: Any = tensor
    return (sharded.device_mesh, sharded.placements) if is_sharded(tensor) else None


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor as a plain tensor that shares its memory."""
    return local_tensor(tensor) if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor; if it is sharded, gather it, which every rank must take part in."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined,no-any-return]


def cut(full: Tensor, layout: Layout) -> Tensor:
    """Return this rank's shard of a full tensor, without communication."""
    mesh, placements = layout
    coordinate = mesh.get_coordinate()
    shard = full
    for dimension, placement in enumerate(placements):
        if hasattr(placement, "_split_tensor"):  # Shard, or FSDP2's _StridedShard for a dimension sharded already
            shards, _ = placement._split_tensor(shard, mesh.size(dimension), with_padding=False, contiguous=False)
            shard = shards[coordinate[dimension]]
    return shard.contiguous()


def joined(shard: Tensor, layout: Layout, shape: torch.Size) -> Tensor:
    """Return the full tensor from the shards of all ranks; every rank must take part."""
    mesh, placements = layout
    numbers = shard.view(torch.uint8) if shard.dtype == torch.bool else shard  # not every backend gathers bools
    stride = torch.empty(shape, device="meta").stride()
    kind = sys.modules["torch.distributed.tensor"].DTensor
    made = kind.from_local(numbers, mesh, placements, run_check=False, shape=shape, stride=stride)
    return whole(made).view(shard.dtype)


def index_in_whole(index: tuple[int, ...], shape: torch.Size, layout: Layout) -> tuple[int, ...]:
    """Convert the index of an entry in this rank's shard to its index in the whole tensor."""
    numbers = cut(torch.arange(shape.numel(), device="cpu").view(shape), layout)
    return tuple(int(i) for i in torch.unravel_index(numbers[index], shape))


def is_gathered(layout: Layout | None, sharded: Layout | None) -> bool:
    """Return whether FSDP2 has gathered a parameter for the moment.

    Dimensions that are sharded by tensor parallelism stay sharded meanwhile.

    Args:
        layout: The layout of the tensor that the module has now.
        sharded: The layout of the parameter itself, or None if unknown or not sharded.
    """
    return sharded is not None and (layout is None or layout[0].ndim < sharded[0].ndim)


def local_gradient(parameter: Tensor) -> Tensor | None:
    """Return this rank's shard of the gradient, with the placements of the parameter.

    Tensor parallelism may leave the gradient with other placements. A partial gradient of a replicated parameter stays
    as it is, and a replicated gradient of a sharded parameter is cut without communication.
    """
    gradient = parameter.grad
    if gradient is None or not is_sharded(gradient):
        return gradient
    sharded: Any = parameter
    wanted, found = sharded.placements, gradient.placements  # type: ignore[attr-defined]
    if not all(own == its or (own.is_partial() and its.is_replicate()) for own, its in zip(found, wanted, strict=True)):
        parameter.grad = gradient = gradient.redistribute(sharded.device_mesh, wanted)  # type: ignore[attr-defined]
    return local(gradient)


def summed_gradient(parameter: Tensor) -> Tensor | None:
    """Return this rank's shard of the gradient as an optimizer's step reads it: a partial one is summed over the ranks.

    Every rank must take part if the gradient is partial. The parameter's own gradient stays partial.
    """
    own, sharded = local_gradient(parameter), cast("Any", parameter)
    if own is None or not is_sharded(sharded.grad) or sharded.grad.placements == sharded.placements:
        return own
    return local(sharded.grad.detach().redistribute(sharded.device_mesh, sharded.placements))
