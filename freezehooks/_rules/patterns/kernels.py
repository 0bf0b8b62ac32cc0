"""Patterns of the taps of a convolution kernel. Does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Final

from ..._counted import counted
from ..._errors import RegionError
from ..region import Index
from .pattern import Pattern, PositiveInteger, Selector, Tensor


class KernelPattern(Pattern):
    """A pattern of the taps of a convolution kernel."""

    __slots__ = ()

    def check(self, shape: Sequence[int]) -> None:
        """Raise RegionError if the shape is not that of a convolution weight."""
        if len(shape) < 3:
            found = counted(len(shape), "dimension", "dimensions")
            raise RegionError(
                f"pattern `{self.name}` needs a convolution weight (out, in/groups, *kernel), found {found}",
                "name only the convolutions, or write an index",
            )

    def _check_odd(self, kernel: Sequence[int]) -> None:
        if not all(size % 2 for size in kernel):
            raise RegionError(
                f"pattern `{self.name}` needs a kernel of odd size, found {'x'.join(map(str, kernel))}",
                "write the entries as an index",
            )


def _off_middle(parameter: Tensor, dims: int, selector: Selector) -> Tensor:
    """Count for each tap the dimensions, among the last `dims`, in which it is not in the middle."""
    sizes = parameter.shape[-dims:]
    return sum(along != size // 2 for along, size in zip(selector.coordinates(parameter, dims), sizes, strict=True))


@dataclass(frozen=True, slots=True)
class Center(KernelPattern):
    """The middle of a convolution kernel, over all its spatial dimensions (which must be odd)."""

    name = "center"

    def check(self, shape: Sequence[int]) -> None:
        """Raise RegionError if the tensor has no kernel, or the kernel has no middle."""
        KernelPattern.check(self, shape)
        self._check_odd(shape[2:])

    def index(self, shape: Sequence[int]) -> Index:
        """Return the index that selects the same entries of a tensor of the given shape."""
        self.check(shape)
        return Index((..., *(size // 2 for size in shape[2:])))

    def select(self, parameter: Tensor, selector: Selector) -> Tensor:
        """Return True at the middle tap."""
        return _off_middle(parameter, parameter.ndim - 2, selector) == 0

    def in_words(self, outside: bool = False) -> str:
        """Return ``in the middle of the kernel``."""
        return f"{'outside' if outside else 'in'} the middle of the kernel"


@dataclass(frozen=True, slots=True)
class Cross(KernelPattern):
    """The axes through the middle of a kernel, in its last two spatial dimensions; with ``cross(3)`` its last three."""

    name = "cross"
    dims: PositiveInteger = 2

    def check(self, shape: Sequence[int]) -> None:
        """Raise RegionError if the tensor has no kernel, or the kernel has too few dimensions or no middle."""
        KernelPattern.check(self, shape)
        spatial = len(shape) - 2
        if self.dims > spatial:
            raise RegionError(
                f"pattern `cross({self.dims})` needs a kernel of {self.dims} spatial dimensions, found {spatial}",
                f"write `cross({spatial})`",
            )
        self._check_odd(shape[-self.dims :])

    def select(self, parameter: Tensor, selector: Selector) -> Tensor:
        """Return True at the taps that are off the middle in at most one dimension."""
        return _off_middle(parameter, self.dims, selector) <= 1

    def in_words(self, outside: bool = False) -> str:
        """Return ``on the cross through the middle of the kernel's last two dimensions``."""
        several = {2: "two dimensions", 3: "three dimensions"}.get(self.dims, f"{self.dims} dimensions")
        last = several if self.dims > 1 else "dimension (which is all of it)"
        return f"{'outside' if outside else 'on'} the cross through the middle of the kernel's last {last}"


@dataclass(frozen=True, slots=True)
class Border(KernelPattern):
    """The outermost taps of a convolution kernel, over all its spatial dimensions."""

    name = "border"

    def select(self, parameter: Tensor, selector: Selector) -> Tensor:
        """Return True at the taps that are at either end of at least one dimension."""
        along_each = zip(selector.coordinates(parameter, parameter.ndim - 2), parameter.shape[2:], strict=True)
        return reduce(or_, ((along == 0) | (along == size - 1) for along, size in along_each))

    def in_words(self, outside: bool = False) -> str:
        """Return ``on the border of the kernel``."""
        return f"{'inside' if outside else 'on'} the border of the kernel"


center: Final = Center()
cross: Final = Cross()
border: Final = Border()
