"""A rule: target, region and value. Does not import torch."""

from __future__ import annotations

import cmath
import enum
import math
import numbers
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from .._errors import FrozenValueError, RegionError, SpecError, shown
from .region import WHOLE, Described, Region
from .ties import Tie

TARGET: Final = re.compile(r"(?:\(\s*\w+(?:\s*,\s*\w+)*\s*\)|[^\s\[\]=#])+")
"""A target: no spaces, brackets, ``=`` or ``#``, except that classes in parentheses may have spaces between them."""

MOST_DIMENSIONS: Final = 64
"""The most dimensions of a list of values: as many as torch allows for a tensor."""


class Keep(enum.Enum):
    """The type of `keep`: the entries are held at what they contain at the moment of freezing."""

    KEEP = "keep"

    def __repr__(self) -> str:
        return self.value

    __str__ = __repr__


keep: Final = Keep.KEEP


@dataclass(frozen=True, slots=True)
class Numbers:
    """A value that is a list of numbers, possibly nested: ``[1, 2, 3]``."""

    items: tuple[Any, ...]

    @staticmethod
    def of(items: Sequence[Any]) -> Numbers:
        """Return the value for a list of numbers, or of nested lists of equal lengths.

        Raises:
            FrozenValueError: It contains anything else, or numbers that are not finite.
        """
        return Numbers(_nested(items, MOST_DIMENSIONS))

    @property
    def is_complex(self) -> bool:
        """Whether any of the numbers is complex."""
        return "j" in str(self)

    def __str__(self) -> str:
        return _value_text(self.items)


def _nested(items: Sequence[Any], deepest: int) -> tuple[Any, ...]:
    if not deepest:
        raise FrozenValueError(f"a list of values is nested at most {MOST_DIMENSIONS} deep", "nest fewer lists")
    found = tuple(
        _nested(item, deepest - 1) if isinstance(item, list | tuple) else _finite("a list of values", item)
        for item in items
    )
    if len({_shape(item) for item in found}) != 1:
        raise FrozenValueError(
            "a list of values must contain at least one number, or lists of equal lengths",
            "write for instance `[1, 2]` or `[[1, 2], [3, 4]]`",
        )
    return found


def _shape(item: Any) -> tuple[int, ...]:
    return (len(item), *_shape(item[0])) if isinstance(item, tuple) else ()


@dataclass(frozen=True, slots=True, eq=False)
class Rule:
    """Describe which entries of which parameters are frozen, and at what value: ``Rule("conv.weight", center, 0)``.

    Args:
        target: A parameter's qualified name, in which ``*`` and ``?`` stand for any characters and any one character;
            a module's name stands for its ``weight``, and may be followed by classes of modules in parentheses, as in
            ``*(Conv2d).weight``. Or a parameter or a module itself.
        region: Which entries: a region of this library, a bool tensor of the parameter's shape (True = frozen), or a
            function from the parameter to one. Left out: the whole tensor.
        value: A finite number, a list of numbers or a tensor that fits the region or has the parameter's shape, `keep`
            (what the entries hold at the moment of freezing), or for a whole tensor `tied`, `mirrored` or `symmetric`.
            Left out: `keep`.

    Raises:
        SpecError: The target is not a name.
        FrozenValueError: The value is infinite or nan.
        RegionError: The value is a tie, such as `tied`, and a region is given.

    Example:
        >>> from freezehooks import Rule, center
        >>> str(Rule("features.*.weight", ~center, 0))
        'features.*.weight[~center] = 0'
    """

    target: Any
    region: Any = WHOLE
    value: Any = keep

    def __post_init__(self) -> None:
        if not is_of_model(self.target) and not (isinstance(self.target, str) and TARGET.fullmatch(self.target)):
            raise SpecError(
                f"a target is a parameter's name without spaces, brackets, `=` or `#`, found {shown(self.target)}",
                'write the region apart, as in Rule("conv.weight", entries[0], 1) or "conv.weight[0] = 1"',
            )
        if self.region is ...:
            object.__setattr__(self, "region", WHOLE)
        if isinstance(self.value, Tie) and self.region != WHOLE:
            raise RegionError(f"`{self.value}` is for a whole tensor, found a region", "leave the brackets out")
        if isinstance(self.value, list | tuple):
            object.__setattr__(self, "value", Numbers.of(self.value))
        elif isinstance(self.value, numbers.Complex) and not isinstance(self.value, bool):
            object.__setattr__(self, "value", _finite(f"the value of `{_target_text(self.target)}`", self.value))

    def __eq__(self, other: object) -> bool:
        return self._identity == other._identity if isinstance(other, Rule) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._identity)

    @property
    def _identity(self) -> tuple[Any, ...]:
        """What rules are compared by: numbers by their text (-0.0 is not 0.0), tensors and functions by identity."""
        region = self.region if isinstance(self.region, Region) else id(self.region)
        has_text = isinstance(self.value, float | complex | Keep | Numbers)
        value = _value_text(self.value) if has_text else self.value if isinstance(self.value, Tie) else id(self.value)
        return self.target if isinstance(self.target, str) else id(self.target), region, value

    def __reduce__(self) -> Any:
        region = self.region
        if callable(region) and not isinstance(region, Region):  # a model must be picklable, and few functions are
            region = Described(_foreign_text(region))
        return Rule, (self.target, region, self.value)

    def __str__(self) -> str:
        region = "" if isinstance(self.region, Region) and self.region == WHOLE else f"[{_foreign_text(self.region)}]"
        return f"{_target_text(self.target)}{region} = {_foreign_text(self.value)}"


def is_of_model(target: Any) -> bool:
    """Return whether a target is a parameter or a module itself rather than a name."""
    return hasattr(target, "requires_grad_")


def _target_text(target: Any) -> str:
    return f"<{type(target).__name__}>" if is_of_model(target) else str(target)


def _finite(what: str, value: Any) -> float | complex:
    """Convert a number to a Python float or complex.

    Raises:
        FrozenValueError: It is infinite or nan, or not a number.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Complex):
        raise FrozenValueError(f"{what} must hold numbers, found {type(value).__name__}", "give finite numbers")
    try:
        number = float(value) if isinstance(value, numbers.Real) else complex(value)
    except OverflowError:
        number = math.inf
    if not cmath.isfinite(number):
        raise FrozenValueError(f"{what} must be finite, found {shown(value)}", "give a finite number")
    return number


def _foreign_text(part: Any) -> str:
    """Return the text of a region or a value, or ``<what it is>`` if the rule syntax has no text for it."""
    if isinstance(part, Region):
        return str(part)
    if isinstance(part, float | complex | tuple | Keep | Tie | Numbers):
        return _value_text(part)
    try:
        return f"<{type(part).__name__.lower()} of shape {tuple(part.shape)}>"
    except Exception:  # it has no shape: nested tensors and lazy parameters each raise an error of their own
        return f"<{getattr(part, '__name__', type(part).__name__)}>"


def _value_text(value: Any) -> str:
    """Return the text of a value that has one in the rule syntax."""
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    if isinstance(value, complex):
        sign = "" if math.copysign(1, value.imag) < 0 else "+"
        return f"{_value_text(value.real)}{sign}{_value_text(value.imag)}j"
    return f"[{', '.join(map(_value_text, value))}]" if isinstance(value, tuple) else str(value)
