"""Patterns that choose entries by what they contain. Does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from ..._errors import RegionError
from .matrices import check_matrix
from .pattern import Fraction, FractionPattern, Pattern, PositiveInteger, Selector, Tensor


@dataclass(frozen=True, slots=True)
class Zeros(Pattern):
    """The entries that are exactly 0 at the moment of freezing."""

    name = "zeros"
    depends_on_numbers = True

    def select(self, parameter: Tensor, selector: Selector) -> Tensor:
        """Return True where an entry is 0, of either sign."""
        return parameter.eq(0)

    def in_words(self, outside: bool = False) -> str:
        """Return ``that is exactly 0``."""
        return f"that is {'not ' if outside else ''}exactly 0"


class MagnitudePattern(FractionPattern):
    """A fraction of a parameter's entries, chosen by magnitude."""

    __slots__ = ()
    depends_on_numbers = True
    largest: ClassVar[bool]
    extreme: ClassVar[str]

    def select(self, parameter: Tensor, selector: Selector) -> Tensor:
        """Return True at the entries of least or of largest magnitude."""
        return selector.of_least_magnitude(parameter, self.count(parameter.numel()), largest=self.largest)

    def in_words(self, outside: bool = False) -> str:
        """Return ``among the 50 % of least magnitude``."""
        return f"{'outside' if outside else 'among'} the {self.percent} of {self.extreme} magnitude"


@dataclass(frozen=True, slots=True)
class Smallest(MagnitudePattern):
    """The entries of least magnitude. Made by `smallest`."""

    name = "smallest"
    largest = False
    extreme = "least"
    fraction: Fraction


@dataclass(frozen=True, slots=True)
class Largest(MagnitudePattern):
    """The entries of largest magnitude. Made by `largest`."""

    name = "largest"
    largest = True
    extreme = "largest"
    fraction: Fraction


@dataclass(frozen=True, slots=True)
class NM(Pattern):
    """All but the n entries of largest magnitude in every m consecutive ones along dimension 1. Made by `nm`."""

    name = "nm"
    depends_on_numbers = True
    n: PositiveInteger
    m: PositiveInteger

    def __post_init__(self) -> None:
        Pattern.__post_init__(self)
        if self.n >= self.m:
            raise RegionError(f"pattern `{self}` freezes nothing: {self.n} of every {self.m} stay free", "give n < m")

    def check(self, shape: Sequence[int]) -> None:
        """Raise RegionError if dimension 1 is missing, or is not a multiple of the group size."""
        check_matrix(self, shape)
        if shape[1] % self.m:
            raise RegionError(
                f"pattern `{self}` needs dimension 1 to be a multiple of {self.m}, found {shape[1]}",
                "choose a group size that divides it, or name layers in which it does, such as `*(Linear)`",
            )

    def select(self, parameter: Tensor, selector: Selector) -> Tensor:
        """Return True at the m - n entries of least magnitude in each group."""
        return selector.by_rows(parameter, self._of_least_rank)

    def _of_least_rank(self, rows: Tensor) -> Tensor:
        groups = rows.abs().movedim(1, -1).unflatten(-1, (rows.shape[1] // self.m, self.m))
        rank = groups.argsort(dim=-1, stable=True).argsort(dim=-1)
        return (rank < self.m - self.n).flatten(-2).movedim(-1, 1)

    def count(self, entries: int) -> int:
        """Return how many entries are selected in all groups together: m - n in each."""
        return entries // self.m * (self.m - self.n)

    def in_words(self, outside: bool = False) -> str:
        """Return ``that is not one of the 2 entries of largest magnitude in its group of 4 along dimension 1``."""
        largest = "the entry" if self.n == 1 else f"one of the {self.n} entries"
        group = f"its group of {self.m} along dimension 1"
        return f"that is {'' if outside else 'not '}{largest} of largest magnitude in {group}"


zeros: Final = Zeros()


def smallest(fraction: float) -> Smallest:
    """Select the entries of least magnitude.

    Args:
        fraction: How many of the parameter's entries, as a fraction above 0 and at most 1; rounded to whole entries.

    Raises:
        RegionError: The fraction is outside that range.

    Example:
        >>> from freezehooks import smallest
        >>> smallest(0.5)
        Smallest(fraction=0.5)
    """
    return Smallest(fraction)


def largest(fraction: float) -> Largest:
    """Select the entries of largest magnitude.

    Args:
        fraction: How many of the parameter's entries, as a fraction above 0 and at most 1; rounded to whole entries.

    Raises:
        RegionError: The fraction is outside that range.

    Example:
        >>> from freezehooks import largest
        >>> largest(0.1)
        Largest(fraction=0.1)
    """
    return Largest(fraction)


def nm(n: int, m: int) -> NM:
    """Select all but the n entries of largest magnitude in every m consecutive ones along dimension 1 (n:m sparsity).

    Args:
        n: How many entries of a group stay free.
        m: The size of a group, larger than n; it must divide the size of dimension 1.

    Shape:
        For a weight ``(out, in)`` or ``(out, in/groups, *kernel)``; groups run along the inputs.

    Raises:
        RegionError: `n` or `m` is not a positive integer, or n is not below m.

    References:
        Mishra et al., Accelerating Sparse Deep Neural Networks, 2021, https://arxiv.org/abs/2104.08378
    """
    return NM(n, m)
