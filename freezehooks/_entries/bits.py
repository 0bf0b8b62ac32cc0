"""Numbers as the integers whose bits they are, and masks as bits."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

_INTEGERS: Final = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_POWERS: Final = (1, 2, 4, 8, 16, 32, 64, 128)


def bits(tensor: Tensor) -> Tensor:
    """Return a view of the tensor as integers of the same width; a complex number counts as its two parts."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.view(_INTEGERS[real.element_size()])


def differ(first: Tensor, second: Tensor) -> Tensor:
    """Return where two tensors of one shape and dtype differ in their bits: nan equals nan, -0.0 is not 0.0."""
    unequal = bits(first) != bits(second)
    return unequal.any(dim=-1) if first.is_complex() else unequal


def count_true(mask: Tensor) -> int:
    """Return how many entries of a bool tensor are True; its `sum` would make integers of all of them first."""
    return int(torch.count_nonzero(mask))


def packed(mask: Tensor) -> Tensor:
    """Return a bool tensor as bytes, eight entries each, row by row."""
    flat = mask.flatten()
    padded = torch.cat([flat, flat.new_zeros(-len(flat) % 8)]).view(-1, 8)
    return (padded * _powers(mask.device)).sum(dim=1, dtype=torch.uint8)


def unpacked(packed_mask: Tensor, count: int) -> Tensor:
    """Return the bool tensor of so many entries that `packed` made into bytes, flattened."""
    return (packed_mask.unsqueeze(1) & _powers(packed_mask.device)).ne(0).flatten()[:count]


def _powers(device: torch.device) -> Tensor:
    return torch.tensor(_POWERS, dtype=torch.uint8, device=device)
