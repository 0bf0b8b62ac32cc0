"""The shard of a tensor: what of it lies on this rank, where torch.distributed spreads it over several."""

from __future__ import annotations

import sys
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn

from .._torch import is_dtensor, local_tensor

Layout: TypeAlias = "tuple[Any, tuple[Any, ...]]"
"""A device mesh, and for each of its dimensions how a tensor is placed along it."""

_PLAIN: Final = (Tensor, nn.Parameter)


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor: what FSDP2 and tensor parallelism make of a parameter."""
    return type(tensor) not in _PLAIN and is_dtensor(tensor)


def layout_of(tensor: Tensor) -> Layout | None:
    """Return how a tensor is spread over ranks, or None where all of it is here."""
    spread: Any = tensor
    return (spread.device_mesh, spread.placements) if is_sharded(tensor) else None


def local(tensor: Tensor) -> Tensor:
    """Return what of a tensor lies on this rank, as a plain tensor: its own memory, no copy."""
    return local_tensor(tensor) if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor; one that is spread is gathered, which every rank must take part in."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined,no-any-return]


def cut(full: Tensor, layout: Layout) -> Tensor:
    """Return what of a full tensor would lie on this rank; no rank talks to another."""
    mesh, placements = layout
    coordinate = mesh.get_coordinate()
    shard = full
    for dimension, placement in enumerate(placements):
        if hasattr(placement, "_split_tensor"):  # Shard, and what FSDP2 makes of a dimension that is sharded already
            shards, _ = placement._split_tensor(shard, mesh.size(dimension), with_padding=False, contiguous=False)
            shard = shards[coordinate[dimension]]
    return shard.contiguous()


def joined(shard: Tensor, layout: Layout, shape: torch.Size) -> Tensor:
    """Return the full tensor of which each rank holds a shard; every rank must take part."""
    mesh, placements = layout
    numbers = shard.view(torch.uint8) if shard.dtype == torch.bool else shard  # not every backend gathers bools
    stride = torch.empty(shape, device="meta").stride()
    kind = sys.modules["torch.distributed.tensor"].DTensor
    made = kind.from_local(numbers, mesh, placements, run_check=False, shape=shape, stride=stride)
    return whole(made).view(shard.dtype)


def index_in_whole(place: tuple[int, ...], shape: torch.Size, layout: Layout) -> tuple[int, ...]:
    """Return where in the whole tensor an entry of this rank's shard lies."""
    numbers = cut(torch.arange(shape.numel(), device="cpu").view(shape), layout)
    return tuple(int(i) for i in torch.unravel_index(numbers[place], shape))


def is_gathered(layout: Layout | None, sharded: Layout | None) -> bool:
    """Return whether FSDP2 has gathered a parameter for a while.

    What tensor parallelism has spread stays spread meanwhile.

    Args:
        layout: The layout of the tensor that stands in the parameter's place now.
        sharded: The layout of the parameter itself, as far as it is known.
    """
    return sharded is not None and (layout is None or layout[0].ndim < sharded[0].ndim)


def local_gradient(parameter: Tensor) -> Tensor | None:
    """Return the gradient on this rank, laid out as the parameter's shard.

    Tensor parallelism may leave it spread otherwise. Where each rank has a summand of it, or the whole of what the
    parameter has a shard of, no rank has to talk to another.
    """
    gradient = parameter.grad
    if gradient is None or not is_sharded(gradient):
        return gradient
    spread: Any = parameter
    wanted, found = spread.placements, gradient.placements  # type: ignore[attr-defined]
    if not all(own == its or (own.is_partial() and its.is_replicate()) for own, its in zip(found, wanted, strict=True)):
        parameter.grad = gradient = gradient.redistribute(spread.device_mesh, wanted)  # type: ignore[attr-defined]
    return local(gradient)
