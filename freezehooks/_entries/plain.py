"""Converts arrays to tensors, and tells whether a tensor is dense and whether its entries share memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .._torch import is_tensor_subclass


def as_tensor(given: Any) -> Any:
    """Return an array as a tensor, and anything else unchanged."""
    if isinstance(given, Tensor) or not hasattr(type(given), "__array__"):
        return given
    try:
        return torch.as_tensor(given.__array__(), device="cpu")  # a scalar of NumPy is none yet
    except (TypeError, ValueError, RuntimeError):  # an array of objects, or of dtypes that torch lacks
        return given


def oddity_of(tensor: Tensor) -> str:
    """Describe what kind of tensor this is if it is not a dense one with data; else return an empty string.

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
    """Return whether each entry has memory of its own that may be written to.

    The answer is no for a lazy conjugate, an expanded tensor, and a tensor made under torch.inference_mode.
    """
    if tensor.is_neg() or tensor.is_inference() or tensor.is_conj():
        return False
    return tensor.is_contiguous() or 0 not in tensor.stride()  # the quicker test comes first
