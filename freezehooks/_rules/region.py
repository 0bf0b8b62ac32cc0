"""Regions as expressions: indices and patterns, combined with ``~ | &``. Plain Python, no tensors."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, ClassVar, Final, NamedTuple, TypeAlias

from .._errors import RegionError


class Region:
    """Which entries of a tensor: combine with ``~`` (the others), ``|`` (either) and ``&`` (both)."""

    __slots__ = ()
    binding: ClassVar[int] = 4
    """How tightly the outermost operator of the text form binds: 1 ``|``, 2 ``&``, 3 ``~``, 4 none."""

    def __invert__(self) -> Not:
        return Not(self)

    def __or__(self, other: object) -> Or:
        return Or(self, other) if isinstance(other, Region) else NotImplemented

    def __and__(self, other: object) -> And:
        return And(self, other) if isinstance(other, Region) else NotImplemented

    def as_operand(self, binding: int) -> str:
        """Return the text form, in parentheses where an operator that binds as given would tear it apart."""
        return str(self) if self.binding >= binding else f"({self})"


@dataclass(frozen=True, slots=True)
class Slice:
    """A slice that can be hashed on every supported Python, and never equals a list of integers."""

    start: int | None
    stop: int | None
    step: int | None

    def __str__(self) -> str:
        start, stop, step = ("" if part is None else str(part) for part in (self.start, self.stop, self.step))
        return f"{start}:{stop}:{step}" if step else f"{start}:{stop}"


IndexItem: TypeAlias = "int | Slice | EllipsisType | tuple[int, ...]"


@dataclass(frozen=True, slots=True)
class Index(Region):
    """An index as Python writes it: integers, slices, ``...`` and lists of integers, one a dimension."""

    items: tuple[IndexItem, ...]

    def __post_init__(self) -> None:
        if self.items.count(...) > 1:
            raise RegionError("an index takes one `...` at most", "write the other dimensions out as `:`")
        if any(isinstance(item, Slice) and item.step == 0 for item in self.items):
            raise RegionError("a slice step must not be 0", "leave it out to take every position")

    def as_operand(self, binding: int) -> str:
        """Return the text form, in parentheses where a comma would tear it apart."""
        return str(self) if len(self.items) == 1 else f"({self})"

    def __str__(self) -> str:
        return ", ".join(map(_item_text, self.items))


def _item_text(item: IndexItem) -> str:
    if isinstance(item, Slice | int):
        return str(item)
    return "..." if item is ... else str(list(item))


WHOLE: Final = Index((...,))


@dataclass(frozen=True, slots=True)
class Not(Region):
    """The entries outside a region."""

    operand: Region
    binding: ClassVar[int] = 3

    def __str__(self) -> str:
        return f"~{self.operand.as_operand(3)}"


@dataclass(frozen=True, slots=True)
class _Pair(Region):
    left: Region
    right: Region
    sign: ClassVar[str]

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
    """What is left of a region that a function chose, once its rule was copied or pickled: a name to show."""

    text: str

    def __str__(self) -> str:
        return self.text


class _Argument(NamedTuple):
    """What one argument of a pattern may be; without a default it must be given."""

    name: str
    kind: str
    default: int | None = None


_PATTERNS: Final[dict[str, tuple[_Argument, ...]]] = {
    "center": (),
    "cross": (_Argument("dims", "a positive integer", 2),),
    "border": (),
    "diagonal": (_Argument("k", "an integer", 0),),
    "triu": (_Argument("k", "an integer", 0),),
    "tril": (_Argument("k", "an integer", 0),),
    "zeros": (),
    "smallest": (_Argument("fraction", "a number above 0, at most 1"),),
    "nm": (_Argument("n", "a positive integer"), _Argument("m", "a positive integer")),
}

_KINDS: Final = {
    "an integer": lambda value: isinstance(value, int),
    "a positive integer": lambda value: isinstance(value, int) and value > 0,
    "a number above 0, at most 1": lambda value: isinstance(value, int | float) and 0 < value <= 1,
}


@dataclass(frozen=True, slots=True)
class Pattern(Region):
    """A region with a name: ``center``, ``cross``, ``border``, ``diagonal``, ``triu``, ``tril``, ``zeros``, ..."""

    name: str
    arguments: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        signature = _PATTERNS.get(self.name)
        if signature is None:
            raise RegionError(f"unknown pattern `{self.name}`", f"use one of {', '.join(_PATTERNS)}, or an index")
        required = sum(argument.default is None for argument in signature)
        if not required <= len(self.arguments) <= len(signature):
            raise RegionError(
                f"pattern `{self.name}` got {len(self.arguments)} arguments", f"write `{_signature_text(self.name)}`"
            )
        defaults = tuple(argument.default for argument in signature[len(self.arguments) :])
        object.__setattr__(self, "arguments", (*self.arguments, *defaults))
        self._check_arguments(signature)

    def _check_arguments(self, signature: tuple[_Argument, ...]) -> None:
        for argument, value in zip(signature, self.arguments, strict=True):
            if isinstance(value, bool) or not _KINDS[argument.kind](value):
                found = value if isinstance(value, int | float) else type(value).__name__
                raise RegionError(
                    f"`{argument.name}` of `{self.name}` must be {argument.kind}, found {found}",
                    f"write `{_signature_text(self.name)}`",
                )
        if self.name == "nm" and self.arguments[0] >= self.arguments[1]:
            n, m = self.arguments
            raise RegionError(f"pattern `nm({n}, {m})` freezes nothing: {n} of every {m} stay free", "give n < m")

    def __call__(self, *arguments: float) -> Pattern:
        """Return the pattern of the same name with other arguments, as in ``cross(3)``."""
        return Pattern(self.name, arguments)

    def __str__(self) -> str:
        if self.arguments == tuple(argument.default for argument in _PATTERNS[self.name]):
            return self.name
        return f"{self.name}({', '.join(map(str, self.arguments))})"


def _signature_text(name: str) -> str:
    arguments = [a.name if a.default is None else f"{a.name}={a.default}" for a in _PATTERNS[name]]
    return f"{name}({', '.join(arguments)})" if arguments else name


center: Final = Pattern("center")
"""The middle of a convolution kernel, over all its spatial dimensions (which must be odd)."""

cross: Final = Pattern("cross")
"""The axes through the middle of a kernel's last two spatial dimensions; ``cross(3)``: of its last three."""

border: Final = Pattern("border")
"""The outermost taps of a convolution kernel, over all its spatial dimensions."""

zeros: Final = Pattern("zeros")
"""The entries that are exactly 0 at the moment of freezing."""


diagonal: Final = Pattern("diagonal")
"""The main diagonal of the last two dimensions; ``diagonal(k)``: the k-th above it, as `torch.diagonal` counts."""

triu: Final = Pattern("triu")
"""The main diagonal of the last two dimensions and all above; ``triu(k)``: from the k-th on, as `torch.triu`."""

tril: Final = Pattern("tril")
"""The main diagonal of the last two dimensions and all below; ``tril(k)``: up to the k-th, as `torch.tril`."""


def smallest(fraction: float) -> Pattern:
    """Select the entries of least magnitude.

    Args:
        fraction: How many of the parameter's entries, as a fraction above 0 and at most 1; rounded to whole entries.

    Raises:
        RegionError: The fraction is outside that range.

    Example:
        >>> from freezehooks import smallest
        >>> smallest(0.5)
        Pattern(name='smallest', arguments=(0.5,))
    """
    return Pattern("smallest", (fraction,))


def nm(n: int, m: int) -> Pattern:
    """Select all but the n largest magnitudes of every m consecutive entries along dimension 1 (n:m sparsity).

    Args:
        n: How many of a group stay free.
        m: The size of a group, larger than n; it must divide the size of dimension 1.

    Shape:
        For a weight ``(out, in)`` or ``(out, in/groups, *kernel)``; groups run along the inputs.

    Raises:
        RegionError: The numbers are no positive integers, or n is not below m.

    References:
        Mishra et al., Accelerating Sparse Deep Neural Networks, 2021, https://arxiv.org/abs/2104.08378
    """
    return Pattern("nm", (n, m))


class Entries:
    """``entries[...]`` is a region written as an index: ``entries[:, :, 1, 1]`` or ``entries[[0, 2]]``."""

    __slots__ = ()

    def __getitem__(self, key: Any) -> Index:
        items = tuple(map(_index_item, key if isinstance(key, tuple) else (key,)))
        return Index(items) if items else WHOLE


entries: Final = Entries()


def _index_item(item: Any) -> IndexItem:
    if item is ...:
        return item
    if isinstance(item, slice):
        return Slice(*(None if part is None else _integer(part) for part in (item.start, item.stop, item.step)))
    item = item.tolist() if hasattr(item, "tolist") else item
    return tuple(map(_integer, item)) if isinstance(item, list | range) else _integer(item)


def _integer(item: Any) -> int:
    if not isinstance(item, bool) and hasattr(item, "__index__"):
        return operator.index(item)
    raise RegionError(
        f"an index holds integers, slices, `...` and lists of integers, found {item!r}",
        "pass a bool mask as the region itself, without `entries[...]`",
    )
