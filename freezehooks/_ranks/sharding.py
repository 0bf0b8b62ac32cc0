"""The part of a tensor that lies on this rank, where torch.distributed spreads a tensor over several."""

from __future__ import annotations

import sys
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn

Layout: TypeAlias = "tuple[Any, tuple[Any, ...]]"
"""A device mesh, and for each of its dimensions how a tensor is placed along it."""

_PLAIN: Final = (Tensor, nn.Parameter)


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor: what FSDP2 and tensor parallelism make of a parameter."""
    if type(tensor) in _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")  # without which there is no DTensor
    return module is not None and isinstance(tensor, module.DTensor)


def layout_of(tensor: Tensor) -> Layout | None:
    """Return how a tensor is spread over ranks, or None where all of it is here."""
    spread: Any = tensor
    return (spread.device_mesh, spread.placements) if is_sharded(tensor) else None


def local(tensor: Tensor) -> Tensor:
    """Return what of a tensor lies on this rank, as a plain tensor: its own memory, no copy."""
    return tensor._local_tensor if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor; one that is spread is gathered, which every rank must take part in."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined,no-any-return]


def cut(full: Tensor, layout: Layout) -> Tensor:
    """Return what of a full tensor would lie on this rank; no rank talks to another."""
    mesh, placements = layout
    coordinate = mesh.get_coordinate()
    part = full
    for dimension, placement in enumerate(placements):
        if hasattr(placement, "_split_tensor"):  # Shard, and what FSDP2 makes of a dimension that is sharded already
            parts, _ = placement._split_tensor(part, mesh.size(dimension), with_padding=False, contiguous=False)
            part = parts[coordinate[dimension]]
    return part.contiguous()


def joined(part: Tensor, layout: Layout, shape: torch.Size) -> Tensor:
    """Return the full tensor of which each rank holds a part; every rank must take part."""
    mesh, placements = layout
    numbers = part.view(torch.uint8) if part.dtype == torch.bool else part  # not every backend gathers truth values
    stride = torch.empty(shape, device="meta").stride()
    kind = sys.modules["torch.distributed.tensor"].DTensor
    made = kind.from_local(numbers, mesh, placements, run_check=False, shape=shape, stride=stride)
    return whole(made).view(part.dtype)


def is_stand_in(layout: Layout | None, known: Layout | None) -> bool:
    """Return whether what is laid out so stands for a while in the place of what is known to be spread further.

    FSDP2 gathers the parts of a parameter before a forward; what tensor parallelism has spread stays so meanwhile.
    """
    return known is not None and (layout is None or layout[0].ndim < known[0].ndim)


def local_gradient(parameter: Tensor) -> Tensor | None:
    """Return the gradient on this rank, laid out as the parameter's local part.

    Tensor parallelism may leave it spread otherwise. Where each rank has a summand of it, or the whole of what the
    parameter has a part of, no rank has to talk to another.
    """
    gradient = parameter.grad
    if gradient is None or not is_sharded(gradient):
        return gradient
    spread: Any = parameter
    wanted, found = spread.placements, gradient.placements  # type: ignore[attr-defined]
    if not all(own == its or (own.is_partial() and its.is_replicate()) for own, its in zip(found, wanted, strict=True)):
        parameter.grad = gradient = gradient.redistribute(spread.device_mesh, wanted)  # type: ignore[attr-defined]
    return local(gradient)
