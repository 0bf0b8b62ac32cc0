"""Checks the value of a rule against its region and parameter, and converts it."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from .._entries.entry_set import EntrySet
from .._entries.plain import as_tensor, oddity_of
from .._entries.select import positions
from .._errors import FrozenValueError, SpecError
from .._rules.patterns.kernels import Center
from .._rules.region import Index
from .._rules.rule import Keep, Numbers, Rule
from .rounding import rounded


def value_of(rule: Rule, entries: EntrySet, frozen: Tensor, parameter: Tensor) -> float | Tensor:
    """Return the value of a rule: a number, or a tensor in the shape that the entry set writes.

    Raises:
        FrozenValueError: It does not fit the region, or is not finite in the parameter's dtype.
        SpecError: It is neither a number nor a tensor.
    """
    value = rule.value
    if value is Keep.KEEP:
        return entries.read(parameter)
    if isinstance(value, float):
        _check_finite(torch.tensor(value, dtype=torch.float64, device="cpu"), parameter)
        return value
    value = _as_tensor(value)
    oddity = oddity_of(value)
    if oddity:
        raise FrozenValueError(
            f"a value must be a dense tensor with numbers, found {oddity}",
            "convert it with `to_dense()`, or make it on a real device",
        )
    if value.is_complex() and not parameter.is_complex():
        raise FrozenValueError(f"a complex value for a parameter of {parameter.dtype}", "give its real part")
    spread = _spread(_numbers(value.detach()).to(parameter.device), rule.region, frozen, parameter)
    source = entries.read(torch.empty_like(parameter, dtype=spread.dtype).copy_(spread))  # laid out like the parameter
    _check_finite(source, parameter)
    return source


def _as_tensor(value: Any) -> Tensor:
    if isinstance(value, Numbers):
        dtype = torch.complex128 if value.is_complex else torch.float64
        return torch.tensor(value.items, dtype=dtype, device="cpu")
    if isinstance(value, complex):
        return torch.tensor(value, dtype=torch.complex128, device="cpu")
    value = as_tensor(value)
    if not isinstance(value, Tensor):
        raise SpecError(
            f"a value is a number, a list of numbers, `keep` or a tensor, found {type(value).__name__}",
            "give a number, or convert it with torch.as_tensor",
        )
    return value


def _numbers(value: Tensor) -> Tensor:
    """Convert a tensor to a dtype that torch can index and compare, if its own is not."""
    if value.dtype == torch.bool:
        raise FrozenValueError("a value must hold numbers, found a bool tensor", "give a mask as the region instead")
    wider = _WIDER.get(value.dtype)
    return value if wider is None else value.to(wider)


_WIDER: Final = {torch.uint16: torch.int64, torch.uint32: torch.int64, torch.uint64: torch.float64}


def _check_finite(value: Tensor, parameter: Tensor) -> None:
    finite = rounded(value, parameter.dtype).isfinite()
    if not bool(finite.all()):
        raise FrozenValueError(
            f"the value {value[~finite][0].item():g} is not finite as {parameter.dtype}",
            "give a value that the parameter's dtype can hold",
        )


def _spread(value: Tensor, region: Any, frozen: Tensor, parameter: Tensor) -> Tensor:
    """Return a tensor of the parameter's shape with the value in the frozen entries."""
    spread = torch.zeros(parameter.shape, dtype=value.dtype, device=parameter.device)
    region = region.index(parameter.shape) if isinstance(region, Center) else region
    if isinstance(region, Index):  # in the order and shape of the index; for other regions row by row
        where = positions(region, parameter.shape).to(parameter.device)
    else:
        where = frozen.flatten().nonzero().flatten()
    if _fits(value.shape, where.shape):
        spread.view(-1)[where] = value.expand(where.shape)
        _check_one_value_each(spread.view(-1)[where], value)
    elif value.shape == parameter.shape:
        spread.copy_(value)
    else:
        raise FrozenValueError(
            f"a value of shape {tuple(value.shape)} does not fit the region of shape {tuple(where.shape)}",
            f"give a number, a tensor that broadcasts to the region's shape, or one of shape {tuple(parameter.shape)}",
        )
    return spread


def _check_one_value_each(written: Tensor, value: Tensor) -> None:
    """Reject an index that names an entry twice with different values."""
    if bool(((written != value) & (value == value)).any()):
        raise FrozenValueError("the region names an entry twice, with two values", "name every entry once")


def _fits(shape: torch.Size, target: torch.Size) -> bool:
    """Return whether a tensor of the first shape broadcasts to the second."""
    pairs = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(size in (1, wanted) for size, wanted in pairs)
