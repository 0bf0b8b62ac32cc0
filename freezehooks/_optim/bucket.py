"""Copies the free entries of many small parameters by one index into all of them, instead of one into each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Final

import torch
from torch import Tensor

from .._ranks.sharding import is_sharded
from .flat_parameter import FlatParameter

_LARGEST: Final = {"cpu": 1 << 13, "cuda": 1 << 18}
"""By kind of device, up to how many entries a parameter takes less time to copy whole than to be indexed alone."""

_MOST: Final = {"cpu": 1 << 16, "cuda": 1 << 24}
"""By kind of device, how many entries a bucket copies at once: what stays in a CPU's cache, and is little on a GPU."""


class Bucket:
    """Small parameters whose free entries are gathered and scattered together.

    Their flat tensors, and those of their gradients, lie one behind the other in memory.
    """

    def __init__(self, members: list[FlatParameter]) -> None:
        """Move the flat tensors together.

        Args:
            members: The parameters, which `fits_bucket` accepts, of one dtype on one device.
        """
        self._members = members
        self._rows = [each.free.in_one_row(each.parameter.detach()) for each in members]  # writes there are counted
        self._sizes = [len(row) for row in self._rows]
        self._flat = torch.cat([each.flat for each in members])
        self._gradient = torch.empty_like(self._flat)
        self._positions = torch.cat(list(self._positions_in_whole()))
        self._known_writes = [-1] * len(members)
        self._gradients = self._split(self._gradient)
        for each, flat, gradient in zip(members, self._split(self._flat), self._gradients, strict=True):
            each.move_to(flat, gradient)

    def _positions_in_whole(self) -> Iterator[Tensor]:
        start = 0
        for each, size in zip(self._members, self._sizes, strict=True):
            yield each.free.positions(size, self._flat.device) + start
            start += size

    def _split(self, joint: Tensor) -> list[Tensor]:
        return [part.data for part in joint.split([each.free.count for each in self._members])]

    @property
    def nbytes(self) -> int:
        """The memory used between steps, in bytes, that of the members included."""
        return self._positions.nbytes + sum(each.nbytes for each in self._members)

    @property
    def _writes(self) -> list[int]:
        return [each.parameter._version for each in self._members]

    @torch.no_grad()
    def gather(self) -> None:
        """Read the free entries and their gradients from the parameters."""
        torch.index_select(torch.cat(self._rows), 0, self._positions, out=self._flat)
        self._gather_gradient()

    @torch.no_grad()
    def _gather_gradient(self) -> None:
        """Read the gradients of the free entries from the parameters, one by one if some are unusual."""
        found = [each.parameter.grad for each in self._members]
        if not all(gradient is None or self._is_usual(gradient) for gradient in found):
            for each in self._members:
                each.gather_gradient()
            return
        sources = zip(self._members, self._rows, found, strict=True)  # the row itself has the place of a missing one
        rows = [row if gradient is None else each.free.in_one_row(gradient) for each, row, gradient in sources]
        torch.index_select(torch.cat(rows), 0, self._positions, out=self._gradient)
        for each, part, gradient in zip(self._members, self._gradients, found, strict=True):
            each.give(None if gradient is None else part)

    def _is_usual(self, gradient: Tensor) -> bool:
        return type(gradient) is Tensor and gradient.layout == torch.strided and gradient.dtype == self._flat.dtype

    @torch.no_grad()
    def scatter(self) -> None:
        """Write the flat tensors into the free entries, and impose where anything else wrote to a parameter."""
        writes = self._writes
        whole = torch.cat(self._rows)
        whole.scatter_(0, self._positions, self._flat)
        torch._foreach_copy_(self._rows, whole.split(self._sizes))
        for each, now, known in zip(self._members, writes, self._known_writes, strict=True):
            if now != known:
                each.impose()
        self._known_writes = self._writes


def in_buckets(flats: Iterable[FlatParameter]) -> list[FlatParameter | Bucket]:
    """Put small parameters into buckets, and return those beside the other parameters."""
    small: defaultdict[tuple[torch.device, torch.dtype], list[FlatParameter]] = defaultdict(list)
    alone: list[FlatParameter] = []
    for each in flats:
        (small[each.flat.device, each.flat.dtype] if fits_bucket(each) else alone).append(each)
    parts = [part for members in small.values() for part in _parts(members)]
    return [*alone, *(Bucket(part) if len(part) > 1 else part[0] for part in parts)]


def fits_bucket(each: FlatParameter) -> bool:
    """Return whether a parameter is small, and lies in one piece of memory in which its free entries are scattered."""
    parameter = each.parameter
    return (
        parameter.numel() <= _LARGEST.get(parameter.device.type, 0)
        and not each.is_view
        and not is_sharded(parameter)
        and each.free.in_one_row(parameter.data).data_ptr() == parameter.data_ptr()
    )


def _parts(members: list[FlatParameter]) -> Iterator[list[FlatParameter]]:
    """Divide small parameters into parts that are not too large."""
    most = _MOST[members[0].flat.device.type]
    part: list[FlatParameter] = []
    size = 0
    for each in members:
        if part and size + each.parameter.numel() > most:
            yield part
            part, size = [], 0
        part.append(each)
        size += each.parameter.numel()
    yield part
