"""What is given as a mask or as values: as a tensor, and whether its numbers lie in memory as those of a plain one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .._torch import is_tensor_subclass


def as_tensor(given: Any) -> Any:
    """Return an array as a tensor; whatever cannot be one as it is."""
    if isinstance(given, Tensor) or not hasattr(type(given), "__array__"):
        return given
    try:
        return torch.as_tensor(given, device="cpu")
    except (TypeError, ValueError, RuntimeError):  # an array of objects, or of dtypes that torch has not
        return given


def oddity_of(tensor: Tensor) -> str:
    """Return what keeps a tensor from being a dense one with numbers, in words; empty where nothing does.

    Example:
        >>> oddity_of(torch.ones(2)), oddity_of(torch.ones(2, device="meta"))
        ('', 'torch.strided on meta')
    """
    if is_lazy(tensor):
        return "a lazy parameter without a shape"
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.is_quantized:
        return f"a quantized tensor ({tensor.dtype})"
    if tensor.is_meta or tensor.layout != torch.strided:
        return f"{tensor.layout} on {tensor.device}"
    return f"a {type(tensor).__name__}" if is_tensor_subclass(tensor) else ""
