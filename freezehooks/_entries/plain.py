"""Arrays as tensors, and whether a tensor lies in memory as a plain one does, each entry in a place of its own."""

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


def owns_its_entries(tensor: Tensor) -> bool:
    """Return whether each entry has memory of its own, which holds just that entry and may be written to.

    Not so in a lazy conjugate, an expanded tensor, and one made under torch.inference_mode.
    """
    if tensor.is_neg() or tensor.is_inference() or tensor.is_conj():
        return False
    return tensor.is_contiguous() or 0 not in tensor.stride()  # the first is quicker
