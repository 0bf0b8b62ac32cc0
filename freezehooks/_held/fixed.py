"""What one rule freezes of one parameter: where, and at what."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._entries.places import Places
from .._entries.select import positions, select
from .._errors import FrozenValueError, SpecError, StateMismatchError
from .._rules.patterns.kernels import Center
from .._rules.region import Index
from .._rules.rule import Keep, Rule


class Piece:
    """What one rule freezes of one parameter.

    Attributes:
        rule: The rule, as it was given.
        places: Where its entries lie.
    """

    def __init__(self, rule: Rule, places: Places, source: float | Tensor) -> None:
        self.rule = rule
        self.places = places
        self._source = source
        self._is_zero = isinstance(source, float) and source == 0 and math.copysign(1, source) > 0
        self._cast: Tensor | None = None

    @staticmethod
    def resolve(rule: Rule, parameter: Tensor) -> Piece:
        """Work out where and at what `rule` holds `parameter`, without changing it.

        Raises:
            RegionError: The region does not fit the parameter, or selects nothing of it.
            FrozenValueError: The value does not fit the region or the dtype.
            SpecError: The region or the value is of a kind that cannot be understood.
        """
        frozen = select(rule.region, parameter)
        places = Places.like(parameter, frozen)
        return Piece(rule, places, _source(rule, places, frozen, parameter.detach()))

    @staticmethod
    def from_state(rule: Rule, state: dict[str, Any], parameter: Tensor) -> Piece:
        """Return the piece that `state` wrote down, for a parameter and the rule that it was saved under.

        Where the entries lie, and what kept ones hold, is the state's to say; masks, indices and values are the
        rule's, and the state must agree.

        Raises:
            StateMismatchError: It does not.
        """
        places = Places.from_state(state["places"], parameter)
        frozen = places.frozen(parameter.shape, parameter.device)
        given = isinstance(rule.region, Tensor | Index)
        if given and not bool((frozen == select(rule.region, parameter)).all()):
            raise StateMismatchError("it was saved with another mask", _SAME_TENSORS)
        if rule.value is Keep.KEEP:
            source = state["value"].detach().clone()
            places.write_(torch.empty_like(parameter.detach()), source.to(parameter.device, parameter.dtype))  # it fits
            return Piece(rule, places, source)
        own = _source(rule, places, frozen, parameter.detach())
        if isinstance(own, Tensor) and not own.cpu().equal(state["value"].cpu()):
            raise StateMismatchError("it was saved with other values", _SAME_TENSORS)
        return Piece(rule, places, own)

    def resized(self, before: torch.Size, after: Tensor, change: Callable[[Tensor], Tensor]) -> Piece:
        """Return the piece on another part of the parameter.

        Args:
            before: The shape of the part that this piece is of.
            after: The part that the new one is of.
            change: From a tensor of the first shape to one of the second.
        """
        frozen = self.places.frozen(before, after.device)
        places = Places.like(after, change(frozen))
        if not isinstance(self._source, Tensor):
            return Piece(self.rule, places, self._source)
        values = torch.zeros(before, dtype=self._source.dtype, device=after.device)
        self.places.write_(values, self._source.to(after.device))
        return Piece(self.rule, places, places.read(torch.empty_like(after, dtype=values.dtype).copy_(change(values))))

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors that it holds in memory."""
        values = [value for value in (self._source, self._cast) if isinstance(value, Tensor)]
        return *self.places.tensors(), *values

    @property
    def keeps(self) -> bool:
        """Whether the value is whatever the entries held when they were frozen, or loaded since."""
        return self.rule.value is Keep.KEEP

    def recapture(self, parameter: Tensor) -> None:
        """Make what the entries of a plain tensor hold now the value to keep."""
        self._source, self._cast = self.places.read(parameter), None

    def impose_(self, tensor: Tensor) -> None:
        """Write the value into the frozen entries of a tensor of the parameter's shape."""
        if self._is_zero:
            self.places.zero_(tensor)
        elif isinstance(self._source, float):
            self.places.fill_(tensor, self._source)
        else:
            self.places.write_(tensor, self._values_like(tensor))

    def _values_like(self, tensor: Tensor) -> Tensor:
        """Return the values in the tensor's dtype, rounded once from those first given, and on its device."""
        if self._cast is None or self._cast.dtype != tensor.dtype or self._cast.device != tensor.device:
            self._cast = torch.as_tensor(self._source).to(tensor.device, tensor.dtype)
        return self._cast

    def state(self) -> dict[str, Any]:
        """Return plain tensors and builtins from which `from_state` makes the same piece."""
        source = self._source if isinstance(self._source, float) else self._source.clone()
        return {"places": self.places.state(), "value": source}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_cast": None}


_SAME_TENSORS = "use the tensors of the saved run, or start from its weights alone"


def _source(rule: Rule, places: Places, frozen: Tensor, parameter: Tensor) -> float | Tensor:
    """Return the value of a rule: a number, or a tensor in the places' own shape."""
    value = rule.value
    if value is Keep.KEEP:
        return places.read(parameter)
    if isinstance(value, float):
        _check_finite(torch.tensor(value, dtype=torch.float64), parameter)
        return value
    if isinstance(value, complex):
        value = torch.tensor(value, dtype=torch.complex128)
    if not isinstance(value, Tensor):
        raise SpecError(
            f"a value is a number, `keep` or a tensor, found {type(value).__name__}",
            "give a number, or convert it with torch.as_tensor",
        )
    if value.is_meta or value.layout != torch.strided:
        raise FrozenValueError(
            f"a value must be a dense tensor with numbers, found {value.layout} on {value.device}",
            "convert it with `to_dense()`, or make it on a real device",
        )
    if value.is_complex() and not parameter.is_complex():
        raise FrozenValueError(f"a complex value for a parameter of {parameter.dtype}", "give its real part")
    spread = _spread(value.detach().to(parameter.device), rule.region, frozen, parameter)
    source = places.read(torch.empty_like(parameter, dtype=spread.dtype).copy_(spread))  # laid out like the parameter
    _check_finite(source, parameter)
    return source


def _check_finite(value: Tensor, parameter: Tensor) -> None:
    finite = value.to(parameter.dtype).isfinite()
    if not bool(finite.all()):
        raise FrozenValueError(
            f"the value {value[~finite][0].item():g} is not finite as {parameter.dtype}",
            "give a value that the parameter's dtype can hold",
        )


def _spread(value: Tensor, region: Any, frozen: Tensor, parameter: Tensor) -> Tensor:
    """Return a tensor of the parameter's shape that holds the value's numbers inside the region, where it is frozen."""
    spread = torch.zeros(parameter.shape, dtype=value.dtype, device=parameter.device)
    region = region.index(parameter.shape) if isinstance(region, Center) else region
    if isinstance(region, Index):
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
    """Refuse an index that names an entry twice, with another value each time."""
    if bool(((written != value) & (value == value)).any()):
        raise FrozenValueError("the region names an entry twice, with two values", "name every entry once")


def _fits(shape: torch.Size, target: torch.Size) -> bool:
    """Return whether a tensor of the first shape broadcasts to the second."""
    pairs = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(size in (1, wanted) for size, wanted in pairs)
