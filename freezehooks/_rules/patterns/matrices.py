"""Patterns of the last two dimensions, those of a matrix. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ..._counted import ordinal
from ..._errors import RegionError
from .pattern import Coordinates, Integer, Pattern, Tensor


def check_matrix(pattern: Pattern, shape: Sequence[int]) -> None:
    if len(shape) < 2:
        raise RegionError(
            f"pattern `{pattern.name}` needs a tensor of 2 or more dimensions, found {len(shape)}",
            "name the matrices alone, or write an index",
        )


class MatrixPattern(Pattern):
    """A pattern of the last two dimensions, those of a matrix."""

    __slots__ = ()

    def check(self, shape: Sequence[int]) -> None:
        """Raise RegionError where the shape has fewer than two dimensions."""
        check_matrix(self, shape)


def _columns_and_diagonal(parameter: Tensor, k: int, coordinates: Coordinates) -> tuple[Tensor, Tensor]:
    """Return the columns of a matrix, and for each row the column in which its k-th diagonal lies."""
    rows, columns = coordinates(parameter, 2)
    height, width = parameter.shape[-2:]
    nearest = max(-height, min(k, width))  # torch compares with no integer of over 64 bits; past the corner all is one
    return columns, rows + nearest


def _side_in_words(k: int, beyond_main: bool, side: str, other: str, outside: bool) -> str:
    """Return on which side of a diagonal: `triu(1)` is above the main one, which says more than "from the 1st on"."""
    words = (side, f"on or {other}") if beyond_main else (f"on or {side}", other)
    return f"{words[outside]} {_diagonal_in_words(0 if beyond_main else k)} of the last two dimensions"


def _diagonal_in_words(k: int) -> str:
    if k == 0:
        return "the main diagonal"
    return f"the {ordinal(abs(k))} diagonal {'above' if k > 0 else 'below'} the main one"


@dataclass(frozen=True, slots=True)
class Diagonal(MatrixPattern):
    """The main diagonal of the last two dimensions; ``diagonal(k)``: the k-th above it, as `torch.diagonal` counts."""

    name = "diagonal"
    k: Integer = 0

    def select(self, parameter: Tensor, coordinates: Coordinates) -> Tensor:
        """Return True on the k-th diagonal."""
        columns, diagonal = _columns_and_diagonal(parameter, self.k, coordinates)
        return columns == diagonal

    def in_words(self, outside: bool = False) -> str:
        """Return ``on the main diagonal of the last two dimensions``."""
        return f"{'off' if outside else 'on'} {_diagonal_in_words(self.k)} of the last two dimensions"


@dataclass(frozen=True, slots=True)
class Triu(MatrixPattern):
    """The main diagonal of the last two dimensions and all above; ``triu(k)``: from the k-th on, as `torch.triu`."""

    name = "triu"
    k: Integer = 0

    def select(self, parameter: Tensor, coordinates: Coordinates) -> Tensor:
        """Return True from the k-th diagonal on."""
        columns, diagonal = _columns_and_diagonal(parameter, self.k, coordinates)
        return columns >= diagonal

    def in_words(self, outside: bool = False) -> str:
        """Return ``on or above the main diagonal of the last two dimensions``."""
        return _side_in_words(self.k, self.k == 1, "above", "below", outside)


@dataclass(frozen=True, slots=True)
class Tril(MatrixPattern):
    """The main diagonal of the last two dimensions and all below; ``tril(k)``: up to the k-th, as `torch.tril`."""

    name = "tril"
    k: Integer = 0

    def select(self, parameter: Tensor, coordinates: Coordinates) -> Tensor:
        """Return True up to the k-th diagonal."""
        columns, diagonal = _columns_and_diagonal(parameter, self.k, coordinates)
        return columns <= diagonal

    def in_words(self, outside: bool = False) -> str:
        """Return ``on or below the main diagonal of the last two dimensions``."""
        return _side_in_words(self.k, self.k == -1, "below", "above", outside)


diagonal: Final = Diagonal()
triu: Final = Triu()
tril: Final = Tril()
