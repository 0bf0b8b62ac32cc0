"""Embeddings with `max_norm`, whose forward rescales every row above a norm, frozen entries included."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .._entries.bits import differ
from .._errors import FrozenValueError, UnsupportedParameterError
from .parameter import FrozenParameter


def check_rows(frozen: FrozenParameter, module: nn.Embedding | nn.EmbeddingBag) -> None:
    """Reject values that exceed the norm of their row even if all its other entries were 0.

    Raises:
        FrozenValueError: There are such values.
    """
    held = frozen.alone()
    _check_kept(frozen.name, torch.arange(len(held), device=held.device), held, held != 0, module)


@torch.no_grad()
def rescale_free_entries(
    module: nn.Embedding | nn.EmbeddingBag, parameter: Tensor, indices: Tensor, held: Sequence[FrozenParameter]
) -> None:
    """Rescale the free entries of the rows that the forward looks up, so that the rows are within the norm.

    The frozen entries of a row stay constant, and the free ones share the norm that is left. Rows without frozen
    entries are left to the forward.

    Args:
        module: The embedding.
        parameter: Its weight.
        indices: What is looked up.
        held: What each handle freezes in the weight.

    Raises:
        FrozenValueError: The frozen entries of a row exceed the norm by themselves.
        UnsupportedParameterError: The weight is sharded.
    """
    if any(each.is_sharded for each in held):
        raise UnsupportedParameterError(
            f"`{held[0].name}` is sharded, and its embedding has `max_norm`, which rescales frozen entries",
            "leave `max_norm` out, or freeze no entry of it",
        )
    weight, rows = parameter.data, indices.flatten().unique()
    bound = (module.max_norm or 0) * (1 - 8 * torch.finfo(weight.dtype).eps)  # torch's kernel adds in another order
    rows = rows[_norms(weight[rows], module) > bound]
    if not len(rows):
        return
    frozen = torch.stack([each.frozen[rows] for each in held]).any(dim=0)
    held_in_rows = weight[rows].where(frozen, 0)
    _check_kept(held[0].name, rows, held_in_rows, frozen, module)
    room = _room(_norms(held_in_rows, module), bound, module.norm_type)
    scale = (room / _norms(weight[rows].where(~frozen, 0), module)).clamp(max=1).unsqueeze(1)
    rescaled = (weight[rows].double() * scale).to(weight.dtype)
    weight[rows] = rescaled.where(frozen.any(dim=1, keepdim=True) & ~frozen, weight[rows])


def _norms(rows: Tensor, module: nn.Embedding | nn.EmbeddingBag) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows.double(), module.norm_type, dim=1)
    return norms


def _room(taken: Tensor, bound: float, order: float) -> Tensor:
    """Return the norm that the frozen entries of each row leave for the free ones."""
    if math.isinf(order):
        return torch.full_like(taken, bound)
    room: Tensor = (bound**order - taken**order).clamp(min=0) ** (1 / order)
    return room


def _check_kept(name: str, rows: Tensor, kept: Tensor, frozen: Tensor, module: nn.Embedding | nn.EmbeddingBag) -> None:
    """Reject rows whose frozen entries alone exceed the norm, judged by torch's own kernel.

    Raises:
        FrozenValueError: There is such a row.
    """
    rescaled = kept.clone()
    torch.embedding_renorm_(
        rescaled, torch.arange(len(kept), device=kept.device), module.max_norm or 0, module.norm_type
    )
    changed = (differ(rescaled, kept) & frozen).any(dim=1)
    if bool(changed.any()):
        worst = int(changed.nonzero()[0])
        norm = torch.linalg.vector_norm(kept[worst].double(), module.norm_type).item()
        raise FrozenValueError(
            f"the frozen entries of row {int(rows[worst])} of `{name}` have a norm of {norm:g}, and the forward of its "
            f"{type(module).__name__} rescales rows above max_norm={module.max_norm:g}",
            "hold values within it, or set `max_norm` to None",
        )
