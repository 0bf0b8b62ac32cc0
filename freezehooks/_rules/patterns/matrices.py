"""Patterns of the last two dimensions, those of a matrix. Does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ..._counted import counted, ordinal
from ..._errors import RegionError
from .pattern import Count, Integer, Pattern, PositiveInteger, Selector, Tensor


def check_matrix(pattern: Pattern, shape: Sequence[int]) -> None:
    if len(shape) < 2:
        raise RegionError(
            f"pattern `{pattern.name}` needs a tensor of 2 or more dimensions, found {len(shape)}",
            "name only the matrices, or write an index",
        )


class MatrixPattern(Pattern):
    """A pattern of the last two dimensions, those of a matrix."""

    __slots__ = ()

    def check(self, shape: Sequence[int]) -> None:
        """Raise RegionError if the shape has fewer than two dimensions."""
        check_matrix(self, shape)


def _columns_and_diagonal(parameter: Tensor, k: int, selector: Selector) -> tuple[Tensor, Tensor]:
    """Return the columns of a matrix, and for each row the column in which its k-th diagonal lies."""
    rows, columns = selector.coordinates(parameter, 2)
    height, width = parameter.shape[-2:]
    nearest = max(-height, min(k, width))  # torch rejects integers of over 64 bits; past the corner nothing changes
    return columns, rows + nearest


def _side_in_words(k: int, beyond_main: bool, side: str, other: str, outside: bool) -> str:
    """Describe a side of a diagonal: `triu(1)` as "above the main diagonal", not as "on or above the 1st one"."""
    words = (side, f"on or {other}") if beyond_main else (f"on or {side}", other)
    return f"{words[outside]} {_diagonal_in_words(0 if beyond_main else k)} of the last two dimensions"


def _diagonal_in_words(k: int) -> str:
    if k == 0:
        return "the main diagonal"
    return f"the {ordinal(abs(k))} diagonal {'above' if k > 0 else 'below'} the main one"


@dataclass(frozen=True, slots=True)
class Diagonal(MatrixPattern):
    """The main diagonal of the last two dimensions; ``diagonal(k)``: the k-th above it, as in `torch.diagonal`."""

    name = "diagonal"
    k: Integer = 0

    def select(self, parameter: Tensor, selector: Selector) -> Tensor:
        """Return True on the k-th diagonal."""
        columns, diagonal = _columns_and_diagonal(parameter, self.k, selector)
        return columns == diagonal

    def in_words(self, outside: bool = False) -> str:
        """Return ``on the main diagonal of the last two dimensions``."""
        return f"{'off' if outside else 'on'} {_diagonal_in_words(self.k)} of the last two dimensions"


@dataclass(frozen=True, slots=True)
class Triu(MatrixPattern):
    """The last two dimensions on and above the main diagonal, or with ``triu(k)`` the k-th one, as in `torch.triu`."""

    name = "triu"
    k: Integer = 0

    def select(self, parameter: Tensor, selector: Selector) -> Tensor:
        """Return True on and above the k-th diagonal."""
        columns, diagonal = _columns_and_diagonal(parameter, self.k, selector)
        return columns >= diagonal

    def in_words(self, outside: bool = False) -> str:
        """Return ``on or above the main diagonal of the last two dimensions``."""
        return _side_in_words(self.k, self.k == 1, "above", "below", outside)


@dataclass(frozen=True, slots=True)
class Tril(MatrixPattern):
    """The last two dimensions on and below the main diagonal, or with ``tril(k)`` the k-th one, as in `torch.tril`."""

    name = "tril"
    k: Integer = 0

    def select(self, parameter: Tensor, selector: Selector) -> Tensor:
        """Return True on and below the k-th diagonal."""
        columns, diagonal = _columns_and_diagonal(parameter, self.k, selector)
        return columns <= diagonal

    def in_words(self, outside: bool = False) -> str:
        """Return ``on or below the main diagonal of the last two dimensions``."""
        return _side_in_words(self.k, self.k == -1, "below", "above", outside)


@dataclass(frozen=True, slots=True)
class Band(MatrixPattern):
    """The diagonals of the last two dimensions from the `lower`-th below the main one to the `upper`-th above it."""

    name = "band"
    lower: Count
    upper: Count

    def select(self, parameter: Tensor, selector: Selector) -> Tensor:
        """Return True on the main diagonal and on the given number of diagonals on either side."""
        columns, lowest = _columns_and_diagonal(parameter, -self.lower, selector)
        columns, highest = _columns_and_diagonal(parameter, self.upper, selector)
        return (columns >= lowest) & (columns <= highest)

    def in_words(self, outside: bool = False) -> str:
        """Return ``in the band from 1 diagonal below the main one to 2 above it, of the last two dimensions``."""
        below = counted(self.lower, "diagonal", "diagonals")
        side = "outside" if outside else "in"
        return f"{side} the band from {below} below the main one to {self.upper} above it, of the last two dimensions"


@dataclass(frozen=True, slots=True)
class BlockDiagonal(MatrixPattern):
    """The n equal blocks along the diagonal of the last two dimensions, as `torch.block_diag` places them."""

    name = "block_diagonal"
    n: PositiveInteger

    def check(self, shape: Sequence[int]) -> None:
        """Raise RegionError if n does not divide both of the last two dimensions."""
        check_matrix(self, shape)
        if any(size % self.n for size in shape[-2:]):
            raise RegionError(
                f"pattern `{self}` needs last two dimensions that {self.n} divides, found {shape[-2]} x {shape[-1]}",
                "choose a number of blocks that divides both",
            )

    def select(self, parameter: Tensor, selector: Selector) -> Tensor:
        """Return True where row and column are in the same block."""
        rows, columns = selector.coordinates(parameter, 2)
        height, width = (max(size // self.n, 1) for size in parameter.shape[-2:])
        return rows // height == columns // width

    def in_words(self, outside: bool = False) -> str:
        """Return ``inside the 4 equal blocks along the diagonal of the last two dimensions``."""
        side = "outside" if outside else "inside"
        return f"{side} the {self.n} equal blocks along the diagonal of the last two dimensions"


diagonal: Final = Diagonal()
triu: Final = Triu()
tril: Final = Tril()


def band(lower: int, upper: int) -> Band:
    """Select the main diagonal of the last two dimensions and the given number of diagonals on either side.

    Args:
        lower: How many diagonals below the main one.
        upper: How many above it.

    Raises:
        RegionError: One of them is negative or not an integer.

    Example:
        >>> from freezehooks import Rule, band
        >>> str(Rule("mixer.weight", ~band(1, 1), 0))  # tridiagonal
        'mixer.weight[~band(1, 1)] = 0'
    """
    return Band(lower, upper)


def block_diagonal(n: int) -> BlockDiagonal:
    """Select n equal blocks along the diagonal of the last two dimensions.

    Args:
        n: How many blocks; it must divide the sizes of both dimensions.

    Raises:
        RegionError: `n` is not a positive integer.

    Example:
        >>> from freezehooks import Rule, block_diagonal
        >>> str(Rule("mixer.weight", ~block_diagonal(4), 0))  # four groups that do not mix
        'mixer.weight[~block_diagonal(4)] = 0'
    """
    return BlockDiagonal(n)
