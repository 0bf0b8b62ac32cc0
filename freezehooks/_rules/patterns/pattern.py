"""What a pattern is: a region with a name and arguments, that knows what it selects and says so. No torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple, TypeAlias, get_args, get_type_hints

from ..._errors import RegionError, shown
from ..region import Region, is_printable

if TYPE_CHECKING:
    from typing_extensions import Self

Tensor: TypeAlias = Any
"""A `torch.Tensor`, of which patterns use methods and operators alone."""

Coordinates: TypeAlias = Callable[[Tensor, int], Sequence[Tensor]]
"""From a tensor and a number n to each of its last n coordinates, shaped to broadcast over those dimensions."""


class Kind(NamedTuple):
    """What an argument may be, in words and as a test."""

    text: str
    includes: Callable[[Any], bool]


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and is_printable(value)


Integer: TypeAlias = Annotated[int, Kind("an integer", _is_integer)]
PositiveInteger: TypeAlias = Annotated[int, Kind("a positive integer", lambda value: _is_integer(value) and value > 0)]
Fraction: TypeAlias = Annotated[
    float, Kind("a number above 0, at most 1", lambda value: isinstance(value, int | float) and 0 < value <= 1)
]


@dataclass(frozen=True, slots=True)
class Pattern(Region, ABC):
    """A region with a name.

    A subclass is one pattern. It is a frozen dataclass with slots, whose fields are the pattern's arguments, each
    annotated with one of the kinds above; text finds it by its `name`. It calls its base by name, since `slots=True`
    makes a class a second time and `super()` without arguments would look for the first one.
    """

    name: ClassVar[str]
    depends_on_numbers: ClassVar[bool] = False
    """Whether the numbers of a parameter decide what is selected; else its shape alone does."""
    known: ClassVar[dict[str, type[Pattern]]] = {}
    """Every pattern by its name, in the order in which they are defined."""

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):  # `slots=True` makes each class a second time, which then takes the first one's place
            cls.known[cls.name] = cls

    def __post_init__(self) -> None:
        for (name, kind), value in zip(_kinds(type(self)).items(), self.arguments, strict=True):
            if isinstance(value, bool) or not kind.includes(value):
                found = shown(value) if isinstance(value, int | float) else type(value).__name__
                raise RegionError(
                    f"`{name}` of `{self.name}` must be {kind.text}, found {found}", f"write `{self.signature()}`"
                )

    # What a pattern is asked

    def check(self, shape: Sequence[int]) -> None:  # not abstract: many patterns fit any shape
        """Raise RegionError where the pattern does not fit a tensor of the given shape."""

    @abstractmethod
    def select(self, parameter: Tensor, coordinates: Coordinates) -> Tensor:
        """Return a bool tensor, True where an entry is selected, that broadcasts to the shape of `parameter`."""

    def count(self, entries: int) -> int | None:
        """Return how many of a tensor's entries are selected, where their number alone decides it."""
        return None

    @abstractmethod
    def in_words(self, outside: bool = False) -> str:
        """Return what follows "every entry" in a sentence about what is selected, or about what is not."""

    # Arguments

    @classmethod
    def of(cls, *arguments: Any) -> Self:
        """Return the pattern with the given arguments, in their order; those left out have their defaults."""
        required = sum(field.default is MISSING for field in fields(cls))
        if not required <= len(arguments) <= len(fields(cls)):
            raise RegionError(f"pattern `{cls.name}` got {len(arguments)} arguments", f"write `{cls.signature()}`")
        make: Callable[..., Self] = cls
        return make(*arguments)

    def __call__(self, *arguments: float) -> Self:
        """Return the pattern of the same name with other arguments, as in ``cross(3)``."""
        return self.of(*arguments)

    @classmethod
    def signature(cls) -> str:
        """Return how the pattern is written, with the names of its arguments: ``cross(dims=2)``."""
        names = [f.name if f.default is MISSING else f"{f.name}={f.default}" for f in fields(cls)]
        return f"{cls.name}({', '.join(names)})" if names else cls.name

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The arguments in their order, those left out too."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        if self.arguments == tuple(field.default for field in fields(self)):
            return self.name
        return f"{self.name}({', '.join(map(str, self.arguments))})"


@cache
def _kinds(pattern: type[Pattern]) -> dict[str, Kind]:
    """Return for each argument of a pattern what it may be."""
    hints = get_type_hints(pattern, include_extras=True)
    return {field.name: get_args(hints[field.name])[1] for field in fields(pattern)}
