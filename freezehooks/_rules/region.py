"""Regions as expressions: indices, and regions combined with ``~ | &``. Does not import torch."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from types import EllipsisType
from typing import Any, ClassVar, Final, TypeAlias

from .._errors import RegionError, SpecError, shown

MOST_DIGITS: Final = 1000
"""The most digits of an integer in a region: Python itself prints and reads no more than a few thousand."""

_TOO_LARGE: Final[int] = 10**MOST_DIGITS


def is_printable(number: int) -> bool:
    """Return whether an integer is short enough to be printed."""
    return abs(number) < _TOO_LARGE


class Region:
    """Which entries of a tensor; combine regions with ``~`` (all others), ``|`` (either) and ``&`` (both)."""

    __slots__ = ()
    __array_ufunc__: ClassVar[None] = None  # so that NumPy leaves `array | region` to the methods below
    binding: ClassVar[int] = 4
    """The precedence of the outermost operator in the text form: 1 ``|``, 2 ``&``, 3 ``~``, 4 none."""

    def __invert__(self) -> Not:
        return Not(self)

    def __or__(self, other: object) -> Or:
        return Or(self, _operand(other))

    def __and__(self, other: object) -> And:
        return And(self, _operand(other))

    def __ror__(self, other: object) -> Or:
        return Or(_operand(other), self)

    def __rand__(self, other: object) -> And:
        return And(_operand(other), self)

    def leaves(self) -> Iterator[Region]:
        """Yield the indices and patterns that the region is made of."""
        yield self

    def as_operand(self, binding: int) -> str:
        """Return the text form, in parentheses if it is to stand beside an operator of higher precedence."""
        return str(self) if self.binding >= binding else f"({self})"


def _operand(other: object) -> Region:
    if isinstance(other, Region):
        return other
    raise SpecError(
        f"a region is combined with a region by `|` and `&`, found {type(other).__name__}",
        "write an index as `entries[...]`; to combine masks, give a function from the parameter to one mask",
    )


@dataclass(frozen=True, slots=True)
class Slice:
    """A slice that is hashable on every supported Python, and never equals a list of integers."""

    start: int | None
    stop: int | None
    step: int | None

    def __str__(self) -> str:
        start, stop, step = ("" if part is None else str(part) for part in (self.start, self.stop, self.step))
        return f"{start}:{stop}:{step}" if step else f"{start}:{stop}"


@dataclass(frozen=True, slots=True)
class Union:
    """The positions of several integers and slices along one dimension, each once, in the order given."""

    parts: tuple[int | Slice, ...]

    def __str__(self) -> str:
        return " | ".join(map(str, self.parts))


IndexItem: TypeAlias = "int | Slice | EllipsisType | tuple[int, ...] | Union"


@dataclass(frozen=True, slots=True)
class Index(Region):
    """An index in Python's notation: an integer, a slice, ``...`` or a list of integers for each dimension.

    Unlike in Python, an item may be a union of integers and slices, as in ``:, 0:4 | 8:12``.
    """

    items: tuple[IndexItem, ...]

    def __post_init__(self) -> None:
        if self.items.count(...) > 1:
            raise RegionError("an index takes at most one `...`", "write the other dimensions out as `:`")
        spans = [part for item in self.items for part in (item.parts if isinstance(item, Union) else (item,))]
        if any(isinstance(span, Slice) and span.step == 0 for span in spans):
            raise RegionError("a slice step must not be 0", "leave it out to take every position")

    def as_operand(self, binding: int) -> str:
        """Return the text form, in parentheses if it has commas."""
        return str(self) if len(self.items) == 1 else f"({self})"

    def __str__(self) -> str:
        return ", ".join(map(_item_text, self.items))


def _item_text(item: IndexItem) -> str:
    if isinstance(item, Slice | int | Union):
        return str(item)
    return "..." if item is ... else str(list(item))


WHOLE: Final = Index((...,))


@dataclass(frozen=True, slots=True)
class Not(Region):
    """The entries outside a region."""

    operand: Region
    binding: ClassVar[int] = 3

    def leaves(self) -> Iterator[Region]:
        """Yield the indices and patterns that the region is made of."""
        return self.operand.leaves()

    def __str__(self) -> str:
        return f"~{self.operand.as_operand(3)}"


@dataclass(frozen=True, slots=True)
class _Pair(Region):
    left: Region
    right: Region
    sign: ClassVar[str]

    def leaves(self) -> Iterator[Region]:
        """Yield the indices and patterns that the region is made of."""
        yield from self.left.leaves()
        yield from self.right.leaves()

    def __str__(self) -> str:
        return f"{self.left.as_operand(self.binding)} {self.sign} {self.right.as_operand(self.binding + 1)}"


class And(_Pair):
    """The entries inside both regions."""

    __slots__ = ()
    sign = "&"
    binding = 2


class Or(_Pair):
    """The entries inside at least one of two regions."""

    __slots__ = ()
    sign = "|"
    binding = 1


@dataclass(frozen=True, slots=True)
class Described(Region):
    """The text of a region that was given as a function: all that is kept of it when its rule is copied or pickled."""

    text: str

    def __str__(self) -> str:
        return self.text


def indexed(items: tuple[IndexItem, ...]) -> Region:
    """Return the index with the given items; if its only item is a union, join an index for each with ``|``."""
    if len(items) == 1 and isinstance(items[0], Union):
        parts: list[Region] = [Index((part,)) for part in items[0].parts]
        return reduce(Or, parts)
    return Index(items) if items else WHOLE


class Entries:
    """``entries[...]`` is a region written as an index: ``entries[:, :, 1, 1]`` or ``entries[[0, 2]]``.

    A list with slices in it is a union along its dimension: ``entries[:, [slice(0, 4), slice(8, 12)]]``.
    """

    __slots__ = ()

    def __getitem__(self, key: Any) -> Region:
        return indexed(tuple(map(_index_item, key if isinstance(key, tuple) else (key,))))


entries: Final = Entries()


def _index_item(item: Any) -> IndexItem:
    if item is ...:
        return item
    if isinstance(item, slice):
        return _slice(item)
    listed = _listed(item)
    if isinstance(listed, list) and any(isinstance(part, slice) for part in listed):
        return Union(tuple(_slice(part) if isinstance(part, slice) else _integer(part) for part in listed))
    return tuple(map(_integer, listed)) if isinstance(listed, list | range) else _integer(listed)


def _listed(item: Any) -> Any:
    """Return an array as a list of its numbers, and anything else unchanged."""
    try:
        return item.tolist()
    except Exception:  # sparse, quantized, nested and meta tensors each raise an error of their own
        return item


def _slice(item: slice) -> Slice:
    return Slice(*(None if part is None else _integer(part) for part in (item.start, item.stop, item.step)))


def _integer(item: Any) -> int:
    try:
        number = None if isinstance(item, bool) else operator.index(item)
    except Exception:  # the `__index__` of a third-party class may raise anything
        number = None
    if number is None:
        raise RegionError(
            f"an index holds integers, slices, `...` and lists of integers, found {shown(item)}",
            "pass a bool mask as the region itself, without `entries[...]`",
        )
    if not is_printable(number):
        raise RegionError(f"an integer of more than {MOST_DIGITS} digits is not a position in a tensor", "correct it")
    return number
