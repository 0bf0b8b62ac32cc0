"""The values of rules that make entries of a tensor one: `tied`, `mirrored` and `symmetric`. No torch."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import prod
from typing import Any, ClassVar, Protocol

from .._counted import counted
from .._errors import RegionError, SpecError, shown
from .region import is_printable

_STARTS = ("first", "mean")


@dataclass(frozen=True, slots=True)
class Tie(ABC):
    """The value of a rule that makes entries one: they have one value, and the sum of their gradients.

    A subclass is one way to say which. It is a frozen dataclass, whose fields are what its text holds.

    Attributes:
        start: What entries that differ start from: "first" (the first of those that are one, row by row) or "mean".
            None: they are refused.
    """

    name: ClassVar[str]
    known: ClassVar[dict[str, type[Tie]]] = {}
    """Every tie that text can say, by its name."""

    start: str | None = field(default=None, kw_only=True)

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):  # `slots=True` makes each class a second time, which then takes the first one's place
            cls.known[cls.name] = cls

    def __post_init__(self) -> None:
        if self.start is not None and not (isinstance(self.start, str) and self.start in _STARTS):
            raise RegionError(
                f"`start` of `{self.name}` must be first or mean, found {shown(self.start)}", "or leave it out"
            )

    # What a tie is asked

    @abstractmethod
    def check(self, shape: Sequence[int]) -> None:
        """Raise RegionError where the tie does not fit a tensor of the given shape."""

    @abstractmethod
    def count(self, shape: Sequence[int]) -> int:
        """Return how many numbers are left of a tensor of the given shape."""

    @abstractmethod
    def in_words(self, shape: Sequence[int] | None = None) -> str:
        """Return what is one: ``all slices along dimension 0``; of a tensor of a given shape, with their number."""

    def are_one_in_words(self, shape: Sequence[int]) -> str:
        """Return ``the 4 slices along dimension 0 are one``."""
        return f"{self.in_words(shape)} are one"

    # Text

    def starting_from(self, start: str | None) -> Tie:
        """Return the same tie with another start."""
        return type(self)(**{**{f.name: getattr(self, f.name) for f in fields(self)}, "start": start})

    def __str__(self) -> str:
        own = [f for f in fields(self) if f.name != "start"]
        values = [(f, getattr(self, f.name)) for f in own]
        written = [str(value) if not f.kw_only else f"{f.name}={value}" for f, value in values if value != f.default]
        written += [] if self.start is None else [f"start={self.start}"]
        return f"{self.name}({', '.join(written)})" if written else self.name


@dataclass(frozen=True, slots=True)
class Tied(Tie):
    """All slices along a dimension are one, or those of each of several equal groups of them."""

    name = "tied"
    dim: int
    groups: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        _check_integer("dim", self, self.dim, "tied(0)")
        _check_integer("groups", self, self.groups, "tied(0, groups=2)")
        if self.groups < 1:
            raise RegionError(f"`groups` of `tied` must be 1 or more, found {self.groups}", "write `tied(0, groups=2)`")
        Tie.__post_init__(self)

    def check(self, shape: Sequence[int]) -> None:
        """Raise RegionError where there is no such dimension, or it does not fall into the groups."""
        size = _size(self.dim, shape)
        if not size:
            raise RegionError(f"dimension {self.dim} has size 0: there is no slice to tie", "leave the rule out")
        if size % self.groups:
            raise RegionError(
                f"`{self}` needs dimension {self.dim} to be a multiple of {self.groups}, found {size}",
                "choose a number of groups that divides it",
            )

    def count(self, shape: Sequence[int]) -> int:
        """Return how many numbers a slice of each group has."""
        return prod(shape) // shape[self.dim] * self.groups

    def in_words(self, shape: Sequence[int] | None = None) -> str:
        """Return ``all slices along dimension 0``, or those of each group."""
        slices = "all slices" if shape is None else f"the {counted(shape[self.dim] // self.groups, 'slice', 'slices')}"
        within = "" if self.groups == 1 else f" within each of {self.groups} groups"
        dim = self.dim if shape is None else self.dim % len(shape)
        return f"{slices} along dimension {dim}{within}"

    def are_one_in_words(self, shape: Sequence[int]) -> str:
        """Return ``the 4 slices along dimension 0 are one``."""
        return f"{self.in_words(shape)} {'is' if shape[self.dim] == self.groups else 'are'} one"


@dataclass(frozen=True, slots=True)
class Mirrored(Tie):
    """Each slice along a dimension and its mirror image are one: the first and the last, and so on."""

    name = "mirrored"
    dim: int

    def __post_init__(self) -> None:
        _check_integer("dim", self, self.dim, "mirrored(-1)")
        Tie.__post_init__(self)

    def check(self, shape: Sequence[int]) -> None:
        """Raise RegionError where there is no such dimension, or nothing to mirror in it."""
        if _size(self.dim, shape) < 2:
            raise RegionError(f"dimension {self.dim} has no two slices to mirror", "leave the rule out")

    def count(self, shape: Sequence[int]) -> int:
        """Return how many numbers one half and the middle have."""
        return prod(shape) // shape[self.dim] * ((shape[self.dim] + 1) // 2)

    def in_words(self, shape: Sequence[int] | None = None) -> str:
        """Return ``each slice along dimension 2 and its mirror image``."""
        return f"each slice along dimension {self.dim if shape is None else self.dim % len(shape)} and its mirror image"


@dataclass(frozen=True, slots=True)
class Symmetric(Tie):
    """Each entry of the last two dimensions and the one across the main diagonal are one."""

    name = "symmetric"

    def check(self, shape: Sequence[int]) -> None:
        """Raise RegionError where the last two dimensions are not those of a square matrix."""
        if len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] < 2:
            found = " x ".join(map(str, shape[-2:])) or "none"
            raise RegionError(
                f"`symmetric` needs square last two dimensions of 2 or more, found {found}", "leave it out"
            )

    def count(self, shape: Sequence[int]) -> int:
        """Return how many numbers a triangle with its diagonal has, in all matrices."""
        return prod(shape[:-2]) * (shape[-1] * (shape[-1] + 1) // 2)

    def in_words(self, shape: Sequence[int] | None = None) -> str:
        """Return ``each entry of the last two dimensions and the one across the main diagonal``."""
        return "each entry of the last two dimensions and the one across the main diagonal"

    def __call__(self, *, start: str | None = None) -> Symmetric:
        """Return the same with another start, as in ``symmetric(start="mean")``."""
        return Symmetric(start=start)


@dataclass(frozen=True, slots=True, eq=False)
class Labeled(Tie):
    """Entries of one label are one. Text cannot say it."""

    labels: Any

    def __post_init__(self) -> None:
        Tie.__post_init__(self)
        try:
            tuple(self.labels.shape)
        except Exception:  # nested tensors and lazy parameters say so each in their own way
            found = type(self.labels).__name__
            raise SpecError(f"labels must be a dense tensor of integers, found {found}", "give one") from None

    def check(self, shape: Sequence[int]) -> None:
        """Raise RegionError where the labels are no integers of the shape."""
        if tuple(self.labels.shape) != tuple(shape):
            raise RegionError(
                f"labels must have the parameter's shape {tuple(shape)}, found {tuple(self.labels.shape)}",
                "give an integer for each entry, and -1 where it is free",
            )

    def count(self, shape: Sequence[int]) -> int:
        """Return how many labels and free entries there are."""
        return int((self.labels < 0).sum()) + len(self.labels[self.labels >= 0].unique())

    def in_words(self, shape: Sequence[int] | None = None) -> str:
        """Return ``all entries of one label``."""
        return "all entries of one label"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Labeled) and other.labels is self.labels and other.start == self.start

    def __hash__(self) -> int:
        return hash((id(self.labels), self.start))

    def __str__(self) -> str:
        start = "" if self.start is None else f", start={self.start}"
        return f"tied(<labels of shape {tuple(self.labels.shape)}>{start})"


def _size(dim: int, shape: Sequence[int]) -> int:
    """Return the size of a dimension.

    Raises:
        RegionError: There is no such dimension.
    """
    if not -len(shape) <= dim < len(shape):
        raise RegionError(
            f"dimension {dim} is out of range for a tensor of {len(shape)}",
            f"use 0 to {len(shape) - 1}" if shape else "name a tensor with dimensions",
        )
    return shape[dim]


def _check_integer(name: str, tie: Tie, found: Any, example: str) -> None:
    if isinstance(found, bool) or not isinstance(found, int) or not is_printable(found):
        raise SpecError(f"`{name}` of `{tie.name}` must be an integer, found {shown(found)}", f"write `{example}`")


def tie_named(name: str, arguments: Sequence[Any] = (), named: Mapping[str, Any] | None = None) -> Tie:
    """Return the tie of the given name.

    Raises:
        RegionError: It takes other arguments.
    """
    kind = Tie.known[name]
    try:
        inspect.signature(kind).bind(*arguments, **(named or {}))
    except TypeError:
        own = [f.name if not f.kw_only else f"{f.name}={f.default}" for f in fields(kind) if f.name != "start"]
        text = f"{name}({', '.join(own)})" if own else name
        raise RegionError(f"`{name}` takes other arguments", f"write `{text}`, perhaps with `start=first`") from None
    return kind(*arguments, **(named or {}))


symmetric = Symmetric()


def mirrored(dim: int, *, start: str | None = None) -> Mirrored:
    """Say that each slice along a dimension and its mirror image are one: the first and the last, and so on.

    Args:
        dim: The dimension.
        start: What images that differ start from: "first" (that of the lower position) or "mean". Left out: they are
            refused.

    Raises:
        SpecError: `dim` is no integer.
        RegionError: `start` is none of the two.

    Example:
        >>> from freezehooks import Rule, mirrored
        >>> str(Rule("conv.weight", value=mirrored(-1, start="mean")))  # kernels that are even from left to right
        'conv.weight = mirrored(-1, start=mean)'
    """
    return Mirrored(dim, start=start)


class Labels(Protocol):
    """A tensor or an array."""

    @property
    def shape(self) -> Any:
        """Its shape."""


def tied(dim: int | Labels, *, groups: int = 1, start: str | None = None) -> Tie:
    """Say that slices of a tensor along a dimension are one, or any entries of one label: one value, one gradient.

    The gradient at every copy is the sum over the copies, so that a plain depthwise convolution whose weight is
    ``tied(0)`` trains like a layer with one kernel, under every elementwise optimizer.

    Args:
        dim: The dimension along which the copies lie; or a tensor of integers of the parameter's shape, in which
            entries of one label are one, and those at -1 are free.
        groups: Into how many equal groups of consecutive slices the dimension falls; the slices of each are one.
        start: What copies that differ start from: "first" (the first of them) or "mean". Left out: they are refused.

    Raises:
        SpecError: `dim` or `groups` is no integer.
        RegionError: `start` is none of the two, or `groups` is below 1 or given beside labels.

    Example:
        >>> from freezehooks import Rule, tied
        >>> str(Rule("conv.weight", value=tied(0, start="mean")))
        'conv.weight = tied(0, start=mean)'
    """
    if isinstance(dim, int) or not hasattr(type(dim), "__array__"):
        return Tied(dim, groups=groups, start=start)  # type: ignore[arg-type]  # which says what it found
    if groups != 1:
        raise RegionError("`groups` of `tied` is for slices along a dimension", "say groups in the labels")
    return Labeled(dim, start=start)
