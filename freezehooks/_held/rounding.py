"""Values rounded once, to whatever dtype a parameter has."""

from __future__ import annotations

import struct
from typing import Final

import torch
from torch import Tensor

_PARTS: Final = {torch.complex32: torch.float16}


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values in a dtype, each rounded once to the nearest.

    torch goes from 64 bits to 16 by way of 32, which rounds twice: a number that lies just beside the middle of two
    becomes the middle, and from there either of them.
    """
    if dtype in _PARTS and values.is_complex():
        parts = rounded(torch.view_as_real(values.resolve_conj()), _PARTS[dtype])
        return torch.view_as_complex(parts)
    is_wide = values.element_size() > 2 and values.dtype not in (torch.float32, torch.complex64)
    if dtype not in (torch.float16, torch.bfloat16) or not is_wide:
        return values.to(dtype)
    return _rounded_to_odd(values.to(torch.float64)).to(dtype)


def _rounded_to_odd(values: Tensor) -> Tensor:
    """Return numbers of 64 bits in 32: those that do not fit become the neighbor whose last bit is 1.

    Such a neighbor lies on the same side of each middle of two numbers of 16 bits, and so rounds as the number would.
    """
    near = values.to(torch.float32)
    back = near.to(torch.float64)
    is_beyond = back.abs() > values.abs()
    is_inexact = (back != values) & values.isfinite()
    toward_zero = near.view(torch.int32) - is_beyond.to(torch.int32)
    return (toward_zero | is_inexact.to(torch.int32)).view(torch.float32)


def numbers_of_16_bits(number: float) -> dict[torch.dtype, float]:
    """Return what a number becomes in the dtypes of 16 bits, where torch would round it twice."""
    try:
        if struct.unpack("f", struct.pack("f", number))[0] == number:
            return {}
    except OverflowError:
        return {}
    exact = torch.tensor(number, dtype=torch.float64, device="cpu")
    found = {dtype: rounded(exact, dtype).item() for dtype in (torch.float16, torch.bfloat16)}
    return {**found, **{dtype: found[part] for dtype, part in _PARTS.items()}}
