"""Ties: values of rules that make entries share one number. Does not import torch."""

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
    """A value that ties entries together: tied entries share one number, and each gets the sum of their gradients.

    A subclass is one way to tie entries. It is a frozen dataclass, whose fields are the arguments in its text.

    Attributes:
        start: What tied entries that differ start from: "first" (the first of them, row by row) or "mean".
            None: entries that differ are an error.
    """

    name: ClassVar[str]
    known: ClassVar[dict[str, type[Tie]]] = {}
    """Every tie that has a text form, by its name."""

    start: str | None = field(default=None, kw_only=True)

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):  # `slots=True` creates each class anew, and the new one replaces the first
            cls.known[cls.name] = cls

    def __post_init__(self) -> None:
        if self.start is not None and not (isinstance(self.start, str) and self.start in _STARTS):
            raise RegionError(
                f"`start` of `{self.name}` must be first or mean, found {shown(self.start)}", "or leave it out"
            )

    # What a tie ties

    @abstractmethod
    def check(self, shape: Sequence[int]) -> None:
        """Raise RegionError if the tie does not fit a tensor of the given shape."""

    @abstractmethod
    def count(self, shape: Sequence[int]) -> int:
        """Return how many independent numbers a tensor of the given shape has left."""

    @abstractmethod
    def in_words(self, shape: Sequence[int] | None = None) -> str:
        """Describe what is tied: ``all slices along dimension 0``; for a given shape, with their number."""

    def are_tied_in_words(self, shape: Sequence[int]) -> str:
        """Return ``the 4 slices along dimension 0 are tied``."""
        return f"{self.in_words(shape)} are tied"

    # Text

    def written(self, start: str) -> str:
        """Return how the tie is written with another start."""
        return str(self.starting_from(start))

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
    """All slices along a dimension are tied, or those within each of several equal groups."""

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
        """Raise RegionError if there is no such dimension, or its size is not a multiple of the groups."""
        size = _size(self.dim, shape)
        if not size:
            raise RegionError(f"dimension {self.dim} has size 0: there is no slice to tie", "leave the rule out")
        if size % self.groups:
            raise RegionError(
                f"`{self}` needs dimension {self.dim} to be a multiple of {self.groups}, found {size}",
                "choose a number of groups that divides it",
            )

    def count(self, shape: Sequence[int]) -> int:
        """Return how many numbers there are in one slice of each group."""
        return prod(shape) // shape[self.dim] * self.groups

    def in_words(self, shape: Sequence[int] | None = None) -> str:
        """Return ``all slices along dimension 0``, with the groups if there are several."""
        slices = "all slices" if shape is None else f"the {counted(shape[self.dim] // self.groups, 'slice', 'slices')}"
        within = "" if self.groups == 1 else f" within each of {self.groups} groups"
        dim = self.dim if shape is None else self.dim % len(shape)
        return f"{slices} along dimension {dim}{within}"

    def are_tied_in_words(self, shape: Sequence[int]) -> str:
        """Return ``the 4 slices along dimension 0 are tied``."""
        return f"{self.in_words(shape)} {'is' if shape[self.dim] == self.groups else 'are'} tied"


@dataclass(frozen=True, slots=True)
class Mirrored(Tie):
    """Each slice along a dimension is tied to its mirror image: the first to the last, and so on."""

    name = "mirrored"
    dim: int

    def __post_init__(self) -> None:
        _check_integer("dim", self, self.dim, "mirrored(-1)")
        Tie.__post_init__(self)

    def check(self, shape: Sequence[int]) -> None:
        """Raise RegionError if there is no such dimension, or it has fewer than two slices."""
        if _size(self.dim, shape) < 2:
            raise RegionError(f"dimension {self.dim} has no two slices to mirror", "leave the rule out")

    def count(self, shape: Sequence[int]) -> int:
        """Return how many numbers there are in one half and the middle slice."""
        return prod(shape) // shape[self.dim] * ((shape[self.dim] + 1) // 2)

    def in_words(self, shape: Sequence[int] | None = None) -> str:
        """Return ``each slice along dimension 2 and its mirror image``."""
        return f"each slice along dimension {self.dim if shape is None else self.dim % len(shape)} and its mirror image"


@dataclass(frozen=True, slots=True)
class Symmetric(Tie):
    """Each entry of the last two dimensions is tied to the one across the main diagonal."""

    name = "symmetric"

    def check(self, shape: Sequence[int]) -> None:
        """Raise RegionError if the last two dimensions are not those of a square matrix."""
        if len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] < 2:
            found = " x ".join(map(str, shape[-2:])) or "none"
            raise RegionError(
                f"`symmetric` needs square last two dimensions of 2 or more, found {found}", "leave it out"
            )

    def count(self, shape: Sequence[int]) -> int:
        """Return how many numbers there are in the triangles with their diagonals, over all matrices."""
        return prod(shape[:-2]) * (shape[-1] * (shape[-1] + 1) // 2)

    def in_words(self, shape: Sequence[int] | None = None) -> str:
        """Return ``each entry of the last two dimensions and the one across the main diagonal``."""
        return "each entry of the last two dimensions and the one across the main diagonal"

    def __call__(self, *, start: str | None = None) -> Symmetric:
        """Return the same with another start, as in ``symmetric(start="mean")``."""
        return Symmetric(start=start)


@dataclass(frozen=True, slots=True, eq=False)
class Labeled(Tie):
    """Entries with the same label are tied. It has no text form."""

    labels: Any

    def __post_init__(self) -> None:
        Tie.__post_init__(self)
        try:
            tuple(self.labels.shape)
        except Exception:  # nested tensors and lazy parameters each raise an error of their own
            found = type(self.labels).__name__
            raise SpecError(f"labels must be a dense tensor of integers, found {found}", "give one") from None

    def check(self, shape: Sequence[int]) -> None:
        """Raise RegionError if the labels do not have the given shape."""
        if tuple(self.labels.shape) != tuple(shape):
            raise RegionError(
                f"labels must have the parameter's shape {tuple(shape)}, found {tuple(self.labels.shape)}",
                "give each entry of the whole tensor a label, -1 where it is free; to tie only within each kernel, use "
                "other labels in each",
            )

    def count(self, shape: Sequence[int]) -> int:
        """Return how many labels and free entries there are."""
        return int((self.labels < 0).sum()) + len(self.labels[self.labels >= 0].unique())

    def in_words(self, shape: Sequence[int] | None = None) -> str:
        """Return ``entries with the same label``."""
        return "entries with the same label"

    def written(self, start: str) -> str:
        return f'tied(labels, start="{start}")'

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Labeled) and other.labels is self.labels and other.start == self.start

    def __hash__(self) -> int:
        return hash((id(self.labels), self.start))

    def __str__(self) -> str:
        start = "" if self.start is None else f", start={self.start}"
        return f"tied(<labels of shape {tuple(self.labels.shape)}>{start})"


def _size(dim: int, shape: Sequence[int]) -> int:
    """Return the size of one dimension.

    Raises:
        RegionError: There is no such dimension.
    """
    if not -len(shape) <= dim < len(shape):
        raise RegionError(
            f"dimension {dim} is out of range for a tensor of {counted(len(shape), 'dimension', 'dimensions')}",
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
    """Tie each slice along a dimension to its mirror image: the first to the last, and so on.

    Args:
        dim: The dimension.
        start: What slices that differ from their image start from: "first" (the one at the lower position) or "mean".
            Left out: slices that differ are an error.

    Raises:
        SpecError: `dim` is not an integer.
        RegionError: `start` is neither "first" nor "mean".

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
    """Tie all slices of a tensor along a dimension, or all entries with the same label, so that they stay equal.

    The gradient at every copy is the sum over the copies, so that a plain depthwise convolution whose weight is
    ``tied(0)`` trains like a layer with one kernel, under every elementwise optimizer.

    Args:
        dim: The dimension along which the copies lie; or a tensor of integer labels in the parameter's shape, where
            entries with the same label are tied, and those labeled -1 are free.
        groups: How many equal groups of consecutive slices to split the dimension into; each group is tied by itself.
        start: What copies that differ start from: "first" (the first of them) or "mean". Left out: copies that
            differ are an error.

    Raises:
        SpecError: `dim` or `groups` is not an integer, or labels are no tensor.
        RegionError: `start` is neither "first" nor "mean", or `groups` is below 1 or given together with labels.

    Example:
        >>> from freezehooks import Rule, tied
        >>> str(Rule("conv.weight", value=tied(0, start="mean")))
        'conv.weight = tied(0, start=mean)'
    """
    if isinstance(dim, list | tuple):
        raise SpecError(
            f"labels must be a tensor of integers, found a {type(dim).__name__}", "give torch.tensor(labels)"
        )
    if isinstance(dim, int) or not hasattr(type(dim), "__array__"):
        return Tied(dim, groups=groups, start=start)  # type: ignore[arg-type]  # it rejects what is not an integer
    if groups != 1:
        raise RegionError("`groups` of `tied` is for slices along a dimension", "give each group labels of its own")
    return Labeled(dim, start=start)
