"""The base class of patterns: regions with a name and arguments. Does not import torch."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple, Protocol, TypeAlias, get_args, get_type_hints

from ..._counted import counted
from ..._errors import RegionError, shown
from ..region import Region, is_printable

if TYPE_CHECKING:
    from typing_extensions import Self

Tensor: TypeAlias = Any
"""A `torch.Tensor`; patterns use nothing of it but methods and operators."""


class Selector(Protocol):
    """The operations of torch that patterns need; they do not import torch themselves."""

    def coordinates(self, parameter: Tensor, dims: int) -> Sequence[Tensor]:
        """Return the coordinates along each of the last `dims` dimensions, shaped to broadcast over all of those."""

    def select(self, region: Region, parameter: Tensor) -> Tensor:
        """Return the bool tensor of the parameter's shape that is True inside a region."""

    def of_least_magnitude(self, parameter: Tensor, count: int, *, largest: bool = False) -> Tensor:
        """Return True at the `count` entries of least (or largest) magnitude; earlier entries win ties."""

    def least_drawn(self, parameter: Tensor, count: int, draw: Callable[[Tensor], Tensor]) -> Tensor:
        """Return True at the `count` entries with the least draws, of 32 bits for each position in the tensor."""

    def by_rows(self, parameter: Tensor, choose: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply a function to a few rows of a parameter at a time and return the results as one tensor."""


class Kind(NamedTuple):
    """What an argument may be: a description, and a test."""

    text: str
    includes: Callable[[Any], bool]


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and is_printable(value)


Integer: TypeAlias = Annotated[int, Kind("an integer", _is_integer)]
PositiveInteger: TypeAlias = Annotated[int, Kind("a positive integer", lambda value: _is_integer(value) and value > 0)]
Count: TypeAlias = Annotated[int, Kind("an integer, 0 or more", lambda value: _is_integer(value) and value >= 0)]
SomeRegion: TypeAlias = Annotated[Region, Kind("a region", lambda value: isinstance(value, Region))]
Fraction: TypeAlias = Annotated[
    float, Kind("a number above 0, at most 1", lambda value: isinstance(value, int | float) and 0 < value <= 1)
]


@dataclass(frozen=True, slots=True)
class Pattern(Region, ABC):
    """A region with a name.

    A subclass is one pattern. It is a frozen dataclass with slots, whose fields are the pattern's arguments, each
    annotated with one of the kinds above; the parser finds it by its `name`. It calls its base class by name, since
    `slots=True` creates the class anew, and `super()` without arguments would look for the original.
    """

    name: ClassVar[str]
    depends_on_numbers: ClassVar[bool] = False
    """Whether the selection depends on what the parameter contains, and not on its shape alone."""
    known: ClassVar[dict[str, type[Pattern]]] = {}
    """Every pattern by its name, in the order in which they are defined."""

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):  # `slots=True` creates each class anew, and the new one replaces the first
            cls.known[cls.name] = cls

    def __post_init__(self) -> None:
        for (name, kind), value in zip(_kinds(type(self)).items(), self.arguments, strict=True):
            if isinstance(value, bool) or not kind.includes(value):
                found = shown(value) if isinstance(value, int | float) else type(value).__name__
                raise RegionError(
                    f"`{name}` of `{self.name}` must be {kind.text}, found {found}", f"write `{self.signature()}`"
                )

    # What a pattern selects

    def check(self, shape: Sequence[int]) -> None:  # not abstract: many patterns fit any shape
        """Raise RegionError if the pattern does not fit a tensor of the given shape."""

    @abstractmethod
    def select(self, parameter: Tensor, selector: Selector) -> Tensor:
        """Return a bool tensor, True where an entry is selected, that broadcasts to the shape of `parameter`."""

    def count(self, entries: int) -> int | None:
        """Return how many of so many entries are selected, or None if it depends on more than their number."""
        return None

    @abstractmethod
    def in_words(self, outside: bool = False) -> str:
        """Return what follows "every entry" in a sentence about the selected entries, or about those outside."""

    # Arguments

    @classmethod
    def of(cls, *arguments: Any, **named: Any) -> Self:
        """Return the pattern with the given arguments and the defaults of the others.

        Raises:
            RegionError: The pattern takes other arguments.
        """
        make: Callable[..., Self] = cls
        try:
            inspect.signature(cls).bind(*arguments, **named)
        except TypeError:
            given = counted(len(arguments) + len(named), "argument", "arguments")
            raise RegionError(f"pattern `{cls.name}` got {given}", f"write `{cls.signature()}`") from None
        return make(*arguments, **named)

    def __call__(self, *arguments: float) -> Self:
        """Return a pattern of the same kind with other arguments, as in ``cross(3)``."""
        return self.of(*arguments)

    @classmethod
    def signature(cls) -> str:
        """Return how the pattern is written, with the names of its arguments: ``cross(dims=2)``."""
        names = [
            f.name + ("=..." if f.kw_only else "" if f.default is MISSING else f"={f.default}") for f in fields(cls)
        ]
        return f"{cls.name}({', '.join(names)})" if names else cls.name

    @property
    def arguments(self) -> tuple[Any, ...]:
        """All arguments in order, with the defaults of those left out."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        if self.arguments == tuple(field.default for field in fields(self)):
            return self.name
        written = [f"{f.name}={v}" if f.kw_only else str(v) for f, v in zip(fields(self), self.arguments, strict=True)]
        return f"{self.name}({', '.join(written)})"


class FractionPattern(Pattern):
    """A fraction of a parameter's entries: the first ones in some order."""

    __slots__ = ()
    fraction: float

    def count(self, entries: int) -> int:
        """Return the number of entries in the fraction, rounded."""
        return round(self.fraction * entries)

    @property
    def percent(self) -> str:
        """The fraction as it is printed: ``50 %``."""
        return f"{100 * self.fraction:.12g} %"


def patterns_in(region: Any) -> Iterator[Pattern]:
    """Yield the patterns that a region is made of; none if it is a mask or a function."""
    leaves = region.leaves() if isinstance(region, Region) else ()
    return (leaf for leaf in leaves if isinstance(leaf, Pattern))


def depends_on_numbers(region: Any) -> bool:
    """Return whether what a region selects depends on what the parameter contains."""
    return any(pattern.depends_on_numbers for pattern in patterns_in(region))


@cache
def _kinds(pattern: type[Pattern]) -> dict[str, Kind]:
    """Return what each argument of a pattern may be, by its name."""
    hints = get_type_hints(pattern, include_extras=True)
    return {field.name: get_args(hints[field.name])[1] for field in fields(pattern)}
