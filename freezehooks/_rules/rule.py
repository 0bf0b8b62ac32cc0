"""A rule: target, region and value. Plain Python, no tensors."""

from __future__ import annotations

import enum
import math
import numbers
import re
from dataclasses import dataclass
from typing import Any, Final

from .._errors import FrozenValueError, RegionError, SpecError, shown
from .region import WHOLE, Described, Region, is_printable

TARGET: Final = re.compile(r"[^\s\[\]=#]+")
"""What a target is made of: no spaces, no brackets, no ``=`` and no ``#``."""


class Keep(enum.Enum):
    """The value of a rule that holds what the entries contain at the moment of freezing."""

    KEEP = "keep"

    def __repr__(self) -> str:
        return self.value

    __str__ = __repr__


keep: Final = Keep.KEEP


@dataclass(frozen=True, slots=True)
class Tied:
    """The value of a rule that makes all slices of a tensor along one dimension one. Made by `tied`."""

    dim: int
    start: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.dim, bool) or not isinstance(self.dim, int) or not is_printable(self.dim):
            raise SpecError(f"`dim` of `tied` must be an integer, found {shown(self.dim)}", "write `tied(0)`")
        if self.start is not None and not (isinstance(self.start, str) and self.start in ("first", "mean")):
            raise RegionError(f"`start` of `tied` must be first or mean, found {shown(self.start)}", "or leave it out")

    def __str__(self) -> str:
        return f"tied({self.dim})" if self.start is None else f"tied({self.dim}, start={self.start})"


def tied(dim: int, *, start: str | None = None) -> Tied:
    """Say that all slices of a tensor along a dimension are one: its copies have one value and one gradient.

    The gradient at every copy is the sum over the copies, so that a plain depthwise convolution whose weight is
    ``tied(0)`` trains like a layer with one kernel, under every elementwise optimizer.

    Args:
        dim: The dimension along which the copies lie.
        start: What copies that differ start from: "first" (the first of them) or "mean". Left out: they are refused.

    Raises:
        SpecError: `dim` is no integer.
        RegionError: `start` is none of the two.

    Example:
        >>> from freezehooks import Rule, tied
        >>> str(Rule("conv.weight", value=tied(0, start="mean")))
        'conv.weight = tied(0, start=mean)'
    """
    return Tied(dim, start)


@dataclass(frozen=True, slots=True, eq=False)
class Rule:
    """Say which entries of which parameters are held, and at what: ``Rule("conv.weight", center, 0)``.

    Args:
        target: A parameter's qualified name, in which ``*`` and ``?`` stand for any characters and any one character;
            a module's name stands for its ``weight``.
        region: Which entries: a region of this library, a bool tensor of the parameter's shape (True = frozen), or a
            function from the parameter to one. Left out: the whole tensor.
        value: A finite number, a tensor that fits the region or has the parameter's shape, `keep` (what the entries
            hold at the moment of freezing), or `tied` (of the whole tensor). Left out: `keep`.

    Raises:
        SpecError: The target is not a name.
        FrozenValueError: The value is an infinite number or nan.
        RegionError: Only part of a tensor is to be tied.

    Example:
        >>> from freezehooks import Rule, center
        >>> str(Rule("features.*.weight", ~center, 0))
        'features.*.weight[~center] = 0'
    """

    target: str
    region: Any = WHOLE
    value: Any = keep

    def __post_init__(self) -> None:
        if not isinstance(self.target, str) or not TARGET.fullmatch(self.target):
            raise SpecError(
                f"a target is a parameter's name without spaces, brackets, `=` or `#`, found {shown(self.target)}",
                'write the region apart, as in Rule("conv.weight", entries[0], 1) or "conv.weight[0] = 1"',
            )
        if self.region is ...:
            object.__setattr__(self, "region", WHOLE)
        if isinstance(self.value, Tied) and self.region != WHOLE:
            raise RegionError(f"`{self.value}` speaks of a whole tensor, found a region", "leave the brackets out")
        if isinstance(self.value, numbers.Real) and not isinstance(self.value, bool):
            object.__setattr__(self, "value", _finite(self.target, self.value))

    def __eq__(self, other: object) -> bool:
        return self._identity == other._identity if isinstance(other, Rule) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._identity)

    @property
    def _identity(self) -> tuple[Any, ...]:
        """Regions, numbers and `keep` compare by what they say; tensors and functions by which object they are."""
        region = self.region if isinstance(self.region, Region) else id(self.region)
        value = str(self.value) if isinstance(self.value, float | Keep | Tied) else id(self.value)  # -0.0 is not 0.0
        return self.target, region, value

    def __reduce__(self) -> Any:
        region = self.region
        if callable(region) and not isinstance(region, Region):  # a model must pickle, and few functions do
            region = Described(_foreign_text(region))
        return Rule, (self.target, region, self.value)

    def __str__(self) -> str:
        region = "" if isinstance(self.region, Region) and self.region == WHOLE else f"[{_foreign_text(self.region)}]"
        return f"{self.target}{region} = {_foreign_text(self.value)}"


def _finite(target: str, value: numbers.Real) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise FrozenValueError(f"the value of `{target}` must be finite, found {shown(value)}", "give a finite number")
    return number


def _foreign_text(part: Any) -> str:
    """Return the text of a region or a value; one that text cannot say shows as ``<what it is>``."""
    if isinstance(part, Region | Keep | Tied):
        return str(part)
    if isinstance(part, float):
        return _number_text(part)
    if isinstance(part, complex):
        return str(part)
    try:
        return f"<{type(part).__name__.lower()} of shape {tuple(part.shape)}>"
    except Exception:  # it has none: nested tensors and lazy parameters say so each in their own way
        return f"<{getattr(part, '__name__', type(part).__name__)}>"


def _number_text(number: float) -> str:
    return repr(number).removesuffix(".0")
