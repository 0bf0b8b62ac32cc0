"""Rounds values to the dtype of a parameter in one step, where torch would round twice."""

from __future__ import annotations

import struct
from typing import Final

import torch
from torch import Tensor

_COMPONENTS: Final = {torch.complex32: torch.float16}


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert values to a dtype, rounding each once to the nearest number.

    torch converts 64 bits to 16 by way of 32, which rounds twice: a number just beside the midpoint of two 16-bit
    numbers becomes the midpoint first, and may then be rounded to the wrong one.
    """
    if dtype in _COMPONENTS and values.is_complex():
        components = rounded(torch.view_as_real(values.resolve_conj()), _COMPONENTS[dtype])
        return torch.view_as_complex(components)
    is_wide = values.element_size() > 2 and values.dtype not in (torch.float32, torch.complex64)
    if dtype not in (torch.float16, torch.bfloat16) or not is_wide:
        return values.to(dtype)
    return _rounded_to_odd(values.to(torch.float64)).to(dtype)


def _rounded_to_odd(values: Tensor) -> Tensor:
    """Convert 64-bit numbers to 32 bits; an inexact one becomes its neighbor whose last bit is 1 ("round to odd").

    That neighbor is on the same side of every midpoint of two 16-bit numbers, so it rounds as the number itself would.
    """
    near = values.to(torch.float32)
    back = near.to(torch.float64)
    is_beyond = back.abs() > values.abs()
    is_inexact = (back != values) & values.isfinite()
    toward_zero = near.view(torch.int32) - is_beyond.to(torch.int32)
    return (toward_zero | is_inexact.to(torch.int32)).view(torch.float32)


def numbers_of_16_bits(number: float) -> dict[torch.dtype, float]:
    """Return a number as each 16-bit dtype rounds it, or an empty dict if torch rounds it correctly."""
    try:
        if struct.unpack("f", struct.pack("f", number))[0] == number:
            return {}
    except OverflowError:
        return {}
    exact = torch.tensor(number, dtype=torch.float64, device="cpu")
    found = {dtype: rounded(exact, dtype).item() for dtype in (torch.float16, torch.bfloat16)}
    return {**found, **{dtype: found[component] for dtype, component in _COMPONENTS.items()}}
