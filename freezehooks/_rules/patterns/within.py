"""A pattern within each of several equal chunks of a parameter. Does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..._errors import RegionError
from ..region import Index, Region
from .pattern import Pattern, PositiveInteger, Selector, SomeRegion, Tensor, depends_on_numbers, patterns_in


@dataclass(frozen=True, slots=True)
class Each(Pattern):
    """A region within each of k equal chunks along dimension 0. Made by `each`."""

    name = "each"
    k: PositiveInteger
    region: SomeRegion

    def __post_init__(self) -> None:
        if isinstance(self.region, int) and not isinstance(self.region, bool):
            object.__setattr__(self, "region", Index((self.region,)))
        Pattern.__post_init__(self)

    @property
    def depends_on_numbers(self) -> bool:  # type: ignore[override]  # a constant in every other pattern
        """Whether the selection depends on what the parameter contains."""
        return depends_on_numbers(self.region)

    def check(self, shape: Sequence[int]) -> None:
        """Raise RegionError if k does not divide dimension 0, or a pattern does not fit a chunk."""
        if not shape:
            raise RegionError(f"pattern `{self}` needs a tensor with dimensions, found none", "leave it out")
        size = shape[0]
        if size % self.k:
            raise RegionError(
                f"pattern `{self}` needs dimension 0 to be a multiple of {self.k}, found {size}",
                "choose a number of chunks that divides it",
            )
        for pattern in patterns_in(self.region):
            pattern.check((size // self.k, *shape[1:]))

    def select(self, parameter: Tensor, selector: Selector) -> Tensor:
        """Return True at the entries that the region selects in each chunk."""
        selected = parameter.new_zeros(parameter.shape).bool()
        for mask, chunk in zip(selected.chunk(self.k), parameter.chunk(self.k), strict=True):
            mask.copy_(selector.select(self.region, chunk))
        return selected

    def in_words(self, outside: bool = False) -> str:
        """Return ``that is inside `triu(1)` of its chunk, one of 4 equal ones along dimension 0``."""
        side = "outside" if outside else "inside"
        return f"that is {side} `{self.region}` of its chunk, one of {self.k} equal ones along dimension 0"

    def __str__(self) -> str:
        return f"{self.name}({self.k}, {self.region.as_operand(0)})"


def each(k: int, region: Region) -> Each:
    """Select a region within each of k equal chunks along dimension 0.

    Examples of chunks are the gates of an LSTM (4: input, forget, cell, output) or a GRU (3), and the query, key and
    value weights of `nn.MultiheadAttention` (3).

    Args:
        k: How many chunks; it must divide the size of dimension 0.
        region: A pattern or an index, applied to each chunk.

    Raises:
        RegionError: `k` is not a positive integer, or `region` is not a region.

    Example:
        >>> from freezehooks import Rule, diagonal, each
        >>> str(Rule("lstm.weight_hh_l0", each(4, ~diagonal), 0))
        'lstm.weight_hh_l0[each(4, ~diagonal)] = 0'
    """
    return Each(k, region)
