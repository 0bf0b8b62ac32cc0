"""Tensors viewed as integers of the same bits, and masks packed into bits."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

_INTEGERS: Final = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_POWERS: Final = (1, 2, 4, 8, 16, 32, 64, 128)


def bits(tensor: Tensor) -> Tensor:
    """View a tensor as integers of the same width; a complex number becomes two, one for each component."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.view(_INTEGERS[real.element_size()])


def differ(first: Tensor, second: Tensor) -> Tensor:
    """Return where two tensors of the same shape and dtype differ in their bits: nan equals nan, -0.0 is not 0.0."""
    unequal = bits(first) != bits(second)
    return unequal.any(dim=-1) if first.is_complex() else unequal


def count_true(mask: Tensor) -> int:
    """Count the True entries of a bool tensor; `sum` would first convert all of them to integers."""
    return int(torch.count_nonzero(mask))


def packed(mask: Tensor) -> Tensor:
    """Pack a bool tensor into bytes of eight entries each, row by row."""
    flat = mask.flatten()
    padded = torch.cat([flat, flat.new_zeros(-len(flat) % 8)]).view(-1, 8)
    return (padded * _powers(mask.device)).sum(dim=1, dtype=torch.uint8)


def unpacked(packed_mask: Tensor, count: int) -> Tensor:
    """Unpack the flat bool tensor with `count` entries that `packed` turned into bytes."""
    return (packed_mask.unsqueeze(1) & _powers(packed_mask.device)).ne(0).flatten()[:count]


def _powers(device: torch.device) -> Tensor:
    return torch.tensor(_POWERS, dtype=torch.uint8, device=device)
