"""Tensors that are given as masks or values: whether their numbers lie in memory as those of a plain tensor do."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .._torch import is_tensor_subclass


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
