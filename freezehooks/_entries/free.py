"""The free entries of one parameter, as one flat tensor: what an optimizer holds in compact mode."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Final

import torch
from torch import Tensor

_FEW: Final = 4
"""Up to this many runs of free entries a row, copying them beats an index, and needs no memory of its own."""


class FreeEntries(ABC):
    """Which entries of a parameter are free, and how they go to a flat tensor and back.

    They lie in the flat tensor in the order of the parameter's memory, so that a copy in either direction goes
    through both from the first entry to the last.

    Attributes:
        count: How many entries are free.
        order: The parameter's dimensions in the order of its memory.
    """

    def __init__(self, count: int, order: tuple[int, ...]) -> None:
        self.count = count
        self.order = order

    @staticmethod
    def of(frozen: Tensor, parameter: Tensor) -> FreeEntries:
        """Return the cheapest form of what is False in the bool tensor `frozen`, laid out like the parameter."""
        return FreeEntries._in_order(frozen, _memory_order(parameter))

    @staticmethod
    def in_rows(frozen: Tensor) -> FreeEntries:
        """Return the free entries row by row, whatever the memory of their parameter: an order to be saved in."""
        return FreeEntries._in_order(frozen, tuple(range(frozen.ndim)))

    @staticmethod
    def _in_order(frozen: Tensor, order: tuple[int, ...]) -> FreeEntries:
        free = ~frozen.permute(order).contiguous()
        return _Runs.found_in(free, order) or _Scattered(free, order)

    def take(self, tensor: Tensor) -> Tensor:
        """Return the free entries of a tensor of the parameter's shape.

        Shape:
            ``(count,)``; a view of the tensor where they lie in one piece, else a copy.
        """
        return self._take(tensor.permute(self.order).contiguous())

    def put_(self, tensor: Tensor, flat: Tensor) -> None:
        """Write what `take` returned, or another ``(count,)`` tensor, into the free entries of a tensor."""
        block = tensor.permute(self.order)
        if block.is_contiguous():
            self._put_(block, flat)
        else:
            whole = block.contiguous()
            self._put_(whole, flat)
            block.copy_(whole)

    @property
    def nbytes(self) -> int:
        """The memory that it holds, in bytes."""
        return 0

    @abstractmethod
    def _take(self, block: Tensor) -> Tensor:
        """Return the free entries of a contiguous tensor."""

    @abstractmethod
    def _put_(self, block: Tensor, flat: Tensor) -> None:
        """Write the free entries of a contiguous tensor."""


class _Runs(FreeEntries):
    """Free entries in a few runs, the same in every row of a matrix that the parameter is seen as: no memory."""

    def __init__(self, runs: list[tuple[int, int]], width: int, count: int, order: tuple[int, ...]) -> None:
        super().__init__(count, order)
        self._runs = runs
        self._width = width

    @staticmethod
    def found_in(free: Tensor, order: tuple[int, ...]) -> _Runs | None:
        """Return the runs in the widest rows that are all alike and have few of them, or None."""
        width = free.numel()
        for size in (1, *free.shape) if width else ():
            width //= size
            rows = free.view(-1, width)
            if bool((rows == rows[0]).all()):
                end = rows.new_zeros(1)
                edges = torch.cat([end, rows[0], end]).to(torch.int8).diff().nonzero().flatten().tolist()
                if len(edges) <= 2 * _FEW:
                    runs = list(zip(edges[::2], edges[1::2], strict=True))
                    return _Runs(runs, width, int(free.sum()), order)
        return None

    def _pieces(self, block: Tensor) -> list[Tensor]:
        rows = block.view(-1, self._width)
        return [rows[:, start:stop] for start, stop in self._runs]

    def _take(self, block: Tensor) -> Tensor:
        pieces = self._pieces(block)
        if len(pieces) == 1:
            return pieces[0].reshape(-1)
        return torch.cat(pieces, dim=1).view(-1) if pieces else block.new_empty(0)

    def _put_(self, block: Tensor, flat: Tensor) -> None:
        pieces = self._pieces(block)
        if pieces and pieces[0].data_ptr() != flat.data_ptr():  # else a view: what was written to it stands here
            sizes = [stop - start for start, stop in self._runs]
            for piece, part in zip(pieces, flat.view(len(pieces[0]), -1).split(sizes, dim=1), strict=True):
                piece.copy_(part)


class _Scattered(FreeEntries):
    """Free entries anywhere, by their positions, of eight bytes: in four, torch takes half as much time again."""

    def __init__(self, free: Tensor, order: tuple[int, ...]) -> None:
        positions = free.flatten().nonzero().flatten()
        super().__init__(len(positions), order)
        self._positions = positions

    def _take(self, block: Tensor) -> Tensor:
        return block.view(-1).index_select(0, self._on(block.device))

    def _put_(self, block: Tensor, flat: Tensor) -> None:
        block.view(-1).scatter_(0, self._on(block.device), flat)

    def _on(self, device: torch.device) -> Tensor:
        if self._positions.device != device:
            self._positions = self._positions.to(device)
        return self._positions

    @property
    def nbytes(self) -> int:
        return self._positions.nbytes


def _memory_order(tensor: Tensor) -> tuple[int, ...]:
    """Return the dimensions from the one with the longest stride to the one with the shortest."""
    strides = tensor.stride()
    return tuple(sorted(range(tensor.ndim), key=lambda dim: (-strides[dim], dim)))
