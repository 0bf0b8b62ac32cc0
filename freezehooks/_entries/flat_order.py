"""Gathers some entries of a tensor into a flat one, and scatters them back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Final

import torch
from torch import Tensor

from .bits import count_true

_FEW: Final = 4
"""Up to this many runs in each row, copying them is faster than an index, and needs no memory of its own."""


class FlatOrder(ABC):
    """Some entries of a tensor in memory order, so that copies in either direction read memory sequentially.

    Attributes:
        count: How many entries there are.
        dims: The tensor's dimensions in the order of its memory.
    """

    def __init__(self, count: int, dims: tuple[int, ...]) -> None:
        self.count = count
        self.dims = dims
        self._is_row_major = dims == tuple(range(len(dims)))

    @staticmethod
    def of(mask: Tensor, dims: tuple[int, ...]) -> FlatOrder:
        """Return the True entries of a mask in the cheapest form, for tensors with the given memory order."""
        ordered = mask.permute(dims).contiguous()
        return _Runs.found_in(ordered, dims) or _Positions(ordered, dims)

    @staticmethod
    def in_rows(mask: Tensor) -> FlatOrder:
        """Return the True entries of a mask row by row, an order that does not depend on memory and so can be saved."""
        return FlatOrder.of(mask, tuple(range(mask.ndim)))

    def gather(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the entries of a tensor as a flat one.

        Args:
            tensor: The tensor, in any memory order.
            out: Where to write them, of shape ``(count,)``. Left out: a view if they are contiguous, else a copy.
        """
        return self._gather(self._in_order(tensor).contiguous(), out)

    def scatter_(self, tensor: Tensor, flat: Tensor) -> None:
        """Write what `gather` returned, or another ``(count,)`` tensor, into the entries of a tensor."""
        block = self._in_order(tensor)
        if block.is_contiguous():
            self._scatter_(block, flat)
        else:
            whole = block.contiguous()
            self._scatter_(whole, flat)
            block.copy_(whole)

    def in_one_row(self, tensor: Tensor) -> Tensor:
        """Return a tensor as a one-dimensional one in memory order: a view if it lies in one piece, else a copy."""
        return self._in_order(tensor).reshape(-1)

    def positions(self, size: int, device: torch.device) -> Tensor:
        """Return where the entries are in what `in_one_row` returns, of the given size, as a ``(count,)`` tensor."""
        return self._gather(torch.arange(size, device=device), None)

    def _in_order(self, tensor: Tensor) -> Tensor:
        return tensor if self._is_row_major else tensor.permute(self.dims)

    @property
    def nbytes(self) -> int:
        """The memory used by this object's tensors, in bytes."""
        return 0

    @abstractmethod
    def _gather(self, block: Tensor, out: Tensor | None) -> Tensor:
        """Return the entries of a contiguous tensor."""

    @abstractmethod
    def _scatter_(self, block: Tensor, flat: Tensor) -> None:
        """Write the entries of a contiguous tensor."""


class _Runs(FlatOrder):
    """Entries that form a few runs, the same in every row of the tensor viewed as a matrix; it stores no tensors."""

    def __init__(self, runs: list[tuple[int, int]], width: int, count: int, dims: tuple[int, ...]) -> None:
        super().__init__(count, dims)
        self._runs = runs
        self._width = width

    @staticmethod
    def found_in(mask: Tensor, dims: tuple[int, ...]) -> _Runs | None:
        """View the mask as the widest rows that are all alike and have few runs, and return those, or None."""
        width = mask.numel()
        for size in (1, *mask.shape) if width else ():
            width //= size
            rows = mask.view(-1, width)
            if bool((rows == rows[0]).all()):
                end = rows.new_zeros(1)
                edges = torch.cat([end, rows[0], end]).to(torch.int8).diff().nonzero().flatten().tolist()
                if len(edges) <= 2 * _FEW:
                    runs = list(zip(edges[::2], edges[1::2], strict=True))
                    return _Runs(runs, width, count_true(mask), dims)
        return None

    def _views(self, block: Tensor) -> list[Tensor]:
        rows = block.view(-1, self._width)
        return [rows[:, start:stop] for start, stop in self._runs]

    def _gather(self, block: Tensor, out: Tensor | None) -> Tensor:
        views = self._views(block)
        if out is not None:
            self._copy(self._flat_views(out), views)
            return out
        if len(views) == 1:
            return views[0].reshape(-1)
        return torch.cat(views, dim=1).view(-1) if views else block.new_empty(0)

    def _scatter_(self, block: Tensor, flat: Tensor) -> None:
        views = self._views(block)
        if views and views[0].data_ptr() != flat.data_ptr():  # else `flat` is a view of the block itself
            self._copy(views, self._flat_views(flat))

    def _flat_views(self, flat: Tensor) -> list[Tensor]:
        sizes = [stop - start for start, stop in self._runs]
        return list(flat.view(-1, sum(sizes)).split(sizes, dim=1)) if sizes else []

    @staticmethod
    def _copy(views: list[Tensor], sources: list[Tensor]) -> None:
        for view, source in zip(views, sources, strict=True):
            view.copy_(source)


class _Positions(FlatOrder):
    """Scattered entries by their positions, of eight bytes each: with four, torch takes half as long again."""

    def __init__(self, mask: Tensor, dims: tuple[int, ...]) -> None:
        positions = mask.flatten().nonzero().flatten()
        super().__init__(len(positions), dims)
        self._positions = positions

    def _gather(self, block: Tensor, out: Tensor | None) -> Tensor:
        return torch.index_select(block.view(-1), 0, self._on(block.device), out=out)

    def _scatter_(self, block: Tensor, flat: Tensor) -> None:
        block.view(-1).scatter_(0, self._on(block.device), flat)

    def _on(self, device: torch.device) -> Tensor:
        if self._positions.device != device:
            self._positions = self._positions.to(device)
        return self._positions

    @property
    def nbytes(self) -> int:
        return self._positions.nbytes


def memory_order(tensor: Tensor) -> tuple[int, ...]:
    """Return the dimensions of a tensor by descending stride."""
    strides = tensor.stride()
    return tuple(sorted(range(tensor.ndim), key=lambda dim: (-strides[dim], dim)))
