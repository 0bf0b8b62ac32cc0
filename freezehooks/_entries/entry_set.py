"""Sets of entries of a tensor, each in the cheapest form that reads and writes them exactly.

A strided box uses a view, a few scattered entries use their positions, many use a mask. No form ever changes the other
entries, not even for a moment that another thread could see, and none computes with floating-point numbers: inf, nan
and -0.0 are read and written unchanged.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cached_property, partial
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from .bits import bits, count_true, packed, unpacked
from .flat_order import FlatOrder, memory_order
from .writes import Writes

_FEW: Final = 0.05
"""Up to this fraction of a tensor, writing by position is faster than a pass over all of it."""

_MOST_IN_ONE_KERNEL: Final = 1 << 18
"""On a GPU, tensors of so many entries are written one at a time by a bool mask, and smaller ones all in one kernel.

One kernel for all saves launches, for masks that are as wide as the numbers. That pays where a launch takes as long as
the write itself, and there the masks are small.
"""


class EntrySet(ABC):
    """An immutable set of entries, for tensors of one shape and memory order.

    The values that `read` returns and `write_` takes have a shape that depends on the form: that of the box without
    its dimensions of one position, ``(count,)`` for positions, or the tensor's shape with zeros at the other entries.

    Attributes:
        shape: The tensor's shape.
        dims: The tensor's dimensions in the order of its memory.
        count: How many entries are in the set.
    """

    def __init__(self, mask: Tensor) -> None:
        self.shape = mask.shape
        self.dims = memory_order(mask)
        self.count = count_true(mask)

    @staticmethod
    def of(mask: Tensor) -> EntrySet:
        """Return the True entries of a mask in the cheapest form; the mask has the memory layout of the tensor."""
        if not bool(mask.any()):
            return Empty(mask)
        box = Strided.around(mask)
        if box is not None:
            return box
        few = count_true(mask) <= _FEW * mask.numel()
        return Sparse(mask) if few else Masked(mask)

    @staticmethod
    def like(parameter: Tensor, mask: Tensor) -> EntrySet:
        """Return the True entries of a mask in the cheapest form, for the memory layout of a parameter."""
        return EntrySet.of(torch.empty_like(parameter, dtype=torch.bool, requires_grad=False).copy_(mask))

    @staticmethod
    def from_state(state: dict[str, Any], parameter: Tensor) -> EntrySet:
        """Restore the set that `state` returned, for the memory layout of a parameter."""
        mask = torch.zeros(parameter.shape, dtype=torch.bool, device="cpu")
        if "box" in state:
            mask[tuple(slice(*span) for span in state["box"])] = True
        elif "positions" in state:
            mask.view(-1)[state["positions"].cpu()] = True
        else:
            packed_mask = state["packed"].cpu()
            if 8 * packed_mask.numel() not in range(mask.numel(), mask.numel() + 8):
                raise ValueError(f"{packed_mask.numel()} bytes for a mask of {mask.numel()} entries")
            mask |= unpacked(packed_mask, mask.numel()).view(mask.shape)
        return EntrySet.like(parameter, mask)

    def mask(self, device: torch.device | None = None) -> Tensor:
        """Return the bool tensor that is True at the entries, in the memory layout of the tensor."""
        ordered = torch.zeros([self.shape[dim] for dim in self.dims], dtype=torch.int8, device=device or "cpu")
        numbers = ordered.permute([self.dims.index(dim) for dim in range(len(self.dims))])
        self.fill_(numbers, 1)
        return numbers.view(torch.bool)

    def complement(self) -> EntrySet:
        """Return the set of all other entries."""
        return EntrySet.of(~self.mask())

    def check_values(self, values: Tensor) -> None:
        """Raise a ValueError if values do not have the shape that this form writes."""
        if values.shape != self.values_shape:
            raise ValueError(f"values of shape {tuple(values.shape)}, expected {tuple(self.values_shape)}")

    @property
    def values_shape(self) -> torch.Size:
        """The shape of what `read` returns."""
        return torch.Size([self.count])

    @abstractmethod
    def fill_(self, tensor: Tensor, number: float) -> None:
        """Write the same number into all entries."""

    @abstractmethod
    def write_(self, tensor: Tensor, values: Tensor) -> None:
        """Write values, in this form's shape and the tensor's dtype, into the entries."""

    @abstractmethod
    def read(self, tensor: Tensor) -> Tensor:
        """Return a copy of the entries, in this form's shape."""

    def zero_(self, tensor: Tensor) -> None:
        """Write +0.0 into the entries."""
        self.fill_(tensor, 0.0)

    # The same writes, collected to be run together with others.

    def add_fill(self, writes: Writes, tensor: Tensor, number: float) -> None:
        """Add to `writes` what `fill_` does."""
        writes.call(partial(self.fill_, tensor, number))

    def add_write(self, writes: Writes, tensor: Tensor, values: Tensor) -> None:
        """Add to `writes` what `write_` does."""
        writes.call(partial(self.write_, tensor, values))

    def add_zero(self, writes: Writes, tensor: Tensor) -> None:
        """Add to `writes` what `zero_` does."""
        writes.call(partial(self.zero_, tensor))

    # The entries as a flat tensor, in memory order

    @cached_property
    def order(self) -> FlatOrder:
        """How the entries are gathered into a flat tensor and scattered back."""
        return FlatOrder.of(self.mask(), self.dims)

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the entries of a tensor as a flat one of shape ``(count,)``."""
        return self.order.gather(tensor)

    def scatter_(self, tensor: Tensor, flat: Tensor) -> None:
        """Write what `gather` returned into the entries of a tensor."""
        self.order.scatter_(tensor, flat)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors that this form holds in memory."""
        return ()

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return the set as plain tensors and builtins, for `from_state`."""


class Empty(EntrySet):
    """No entries: on a rank whose shard has none of the region."""

    def fill_(self, tensor: Tensor, number: float) -> None:
        pass

    def write_(self, tensor: Tensor, values: Tensor) -> None:
        pass

    def read(self, tensor: Tensor) -> Tensor:
        return tensor.new_empty(0)

    def add_fill(self, writes: Writes, tensor: Tensor, number: float) -> None:
        pass

    def add_write(self, writes: Writes, tensor: Tensor, values: Tensor) -> None:
        pass

    def add_zero(self, writes: Writes, tensor: Tensor) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {"positions": torch.empty(0, dtype=torch.int64, device="cpu")}


_Geometry: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]
"""The strides of a tensor, and the shape, strides and offset of a box of its entries."""


class Strided(EntrySet):
    """Entries that form a strided box: read and written through a view, without memory of its own.

    Attributes:
        key: The index that returns the view.
    """

    def __init__(self, mask: Tensor, spans: tuple[slice, ...]) -> None:
        super().__init__(mask)
        self._spans = spans
        # the quickest key: full dimensions at the front become an ellipsis, those at the end are left out, and a single
        # position becomes an integer
        full = [span == slice(0, size, 1) for span, size in zip(spans, self.shape, strict=True)]
        first, last = (full.index(False), len(full) - full[::-1].index(False)) if not all(full) else (0, 0)
        terse = tuple(span.start if span.stop == span.start + 1 else span for span in spans)
        self.key: tuple[Any, ...] = (..., *terse[first:]) if last == len(full) and first else terse[:last]
        self._geometry: _Geometry = (), (), (), 0

    @staticmethod
    def around(mask: Tensor) -> Strided | None:
        """Return the box that contains exactly the True entries, or None if they do not form a box."""
        spans: list[slice] = []
        volume = 1
        for dimension in range(mask.ndim):
            others = tuple(d for d in range(mask.ndim) if d != dimension)
            hits = (mask.any(dim=others) if others else mask).nonzero().flatten()
            span = evenly_spaced(hits)
            if span is None:
                return None
            volume *= len(hits)
            spans.append(span)
        return Strided(mask, tuple(spans)) if volume == count_true(mask) else None

    @property
    def values_shape(self) -> torch.Size:
        return torch.empty((), device="meta").expand(self.shape)[self.key].shape

    def fill_(self, tensor: Tensor, number: float) -> None:
        tensor[self.key].fill_(number)

    def write_(self, tensor: Tensor, values: Tensor) -> None:
        tensor[self.key].copy_(values)

    def read(self, tensor: Tensor) -> Tensor:
        return tensor[self.key].clone(memory_format=torch.contiguous_format)

    def add_fill(self, writes: Writes, tensor: Tensor, number: float) -> None:
        view = tensor[self.key]
        writes.copy(view, torch.full((), number, dtype=tensor.dtype, device=tensor.device).expand(view.shape))

    def add_write(self, writes: Writes, tensor: Tensor, values: Tensor) -> None:
        writes.copy(tensor[self.key], values)

    def add_zero(self, writes: Writes, tensor: Tensor) -> None:
        writes.zero(tensor[self.key])

    def view(self, tensor: Tensor) -> Tensor:
        """Return the view `tensor[key]` of a plain tensor, in less time; not for compiled code."""
        strides = tensor.stride()
        if strides != self._geometry[0]:
            view = torch.empty_strided(self.shape, strides, device="meta")[self.key]
            self._geometry = strides, view.shape, view.stride(), int(view.storage_offset())
        _, shape, view_strides, offset = self._geometry
        return tensor.as_strided(shape, view_strides, tensor.storage_offset() + offset)

    def state(self) -> dict[str, Any]:
        return {"box": [[span.start, span.stop, span.step] for span in self._spans]}


class Sparse(EntrySet):
    """A few scattered entries, by their positions in the flat tensor."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask)
        self._positions = mask.flatten().nonzero().flatten()
        self._index: tuple[Tensor, ...] | None = None

    def _flat(self, tensor: Tensor) -> Tensor:
        """Return the positions, on the tensor's device."""
        if self._positions.device != tensor.device:
            self._positions, self._index = self._positions.to(tensor.device), None
        return self._positions

    def _by_dimension(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return the positions along each dimension, to index a tensor that is not contiguous."""
        flat = self._flat(tensor)
        if self._index is None:
            self._index = torch.unravel_index(flat, tensor.shape)
        return self._index

    # `put_` would not do: it refuses to run under torch.use_deterministic_algorithms.

    def fill_(self, tensor: Tensor, number: float) -> None:
        if tensor.is_contiguous():
            tensor.view(-1).index_fill_(0, self._flat(tensor), number)
        else:
            tensor[self._by_dimension(tensor)] = torch.full((), number, dtype=tensor.dtype, device=tensor.device)

    def write_(self, tensor: Tensor, values: Tensor) -> None:
        if tensor.is_contiguous():
            tensor.view(-1).index_copy_(0, self._flat(tensor), values)
        else:
            tensor[self._by_dimension(tensor)] = values

    def read(self, tensor: Tensor) -> Tensor:
        return tensor.take(self._flat(tensor))

    def tensors(self) -> tuple[Tensor, ...]:
        return self._positions, *(self._index or ())

    def state(self) -> dict[str, Any]:
        return {"positions": self._positions.clone()}


class Masked(EntrySet):
    """Many scattered entries, by a mask in the form that is fastest on the tensor's device.

    The mask is made of integers as wide as the tensor's dtype, with 1 at all *other* entries. For a large tensor on a
    GPU it is a bool mask of the entries themselves, which moves fewer bytes and takes a quarter of the memory.
    """

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask)
        self._mask = mask
        self._filled: tuple[float, Tensor] | None = None

    def _mask_for(self, tensor: Tensor) -> Tensor:
        """Return the mask in the form that a tensor needs, and keep only that form."""
        is_wide = tensor.device.type == "cpu" or tensor.numel() < _MOST_IN_ONE_KERNEL
        dtype, kept = bits(tensor).dtype if is_wide else torch.bool, self._mask
        if kept.dtype != dtype or kept.device != tensor.device:
            mask = self.mask(tensor.device)
            self._mask = kept = (~mask).to(dtype) if is_wide else mask
        return kept.unsqueeze(-1) if is_wide and tensor.is_complex() else kept  # for the real and imaginary components

    @property
    def values_shape(self) -> torch.Size:
        return self.shape

    def fill_(self, tensor: Tensor, number: float) -> None:
        if is_plus_zero(number):
            self.zero_(tensor)
        else:
            self.write_(tensor, self._full_of(number, tensor))

    def _full_of(self, number: float, tensor: Tensor) -> Tensor:
        """Return the number at the entries and zeros elsewhere, in the tensor's dtype."""
        filled = self._filled
        if filled is None or (filled[0], filled[1].dtype, filled[1].device) != (number, tensor.dtype, tensor.device):
            self._filled = filled = number, self.read(torch.full_like(tensor, number, requires_grad=False))
        return filled[1]

    def zero_(self, tensor: Tensor) -> None:
        mask = self._mask_for(tensor)
        if mask.dtype == torch.bool:
            tensor.masked_fill_(mask, 0)
        else:
            bits(tensor).mul_(mask)

    def write_(self, tensor: Tensor, values: Tensor) -> None:
        mask = self._mask_for(tensor)
        if mask.dtype == torch.bool:
            torch.where(mask, values, tensor, out=tensor)
        else:
            # values + others * own, in integers: exact. It is one pass that allocates nothing and stores the final bits
            # at once, so that the forward of another thread never sees anything in between.
            own = bits(tensor)
            torch.addcmul(bits(values), mask, own, out=own)

    def read(self, tensor: Tensor) -> Tensor:
        mask = self._mask_for(tensor)
        if mask.dtype == torch.bool:
            return torch.where(mask, tensor, tensor.new_zeros(()))
        values = torch.empty_like(tensor)
        torch.mul(bits(tensor), mask, out=bits(values))  # first the other entries,
        torch.sub(bits(tensor), bits(values), out=bits(values))  # then all but those, with no further allocation
        return values

    def add_fill(self, writes: Writes, tensor: Tensor, number: float) -> None:
        if is_plus_zero(number):
            self.add_zero(writes, tensor)
        else:
            self.add_write(writes, tensor, self._full_of(number, tensor))

    def add_zero(self, writes: Writes, tensor: Tensor) -> None:
        mask = self._mask_for(tensor)
        if mask.dtype == torch.bool:
            writes.call(partial(tensor.masked_fill_, mask, 0))
        else:
            writes.multiply(bits(tensor), mask)

    def mask(self, device: torch.device | None = None) -> Tensor:
        kept = self._mask  # read once: another thread may change its form meanwhile
        mask = kept if kept.dtype == torch.bool else kept == 0
        return mask.to(device or mask.device, copy=mask is kept)

    def tensors(self) -> tuple[Tensor, ...]:
        filled = self._filled
        return (self._mask,) if filled is None else (self._mask, filled[1])

    def state(self) -> dict[str, Any]:
        return {"packed": packed(self.mask())}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_filled": None}


def is_plus_zero(number: float) -> bool:
    """Return whether a number is 0 and not -0."""
    return number == 0 and math.copysign(1, number) > 0


def evenly_spaced(positions: Tensor) -> slice | None:
    """Return the slice that selects some ascending positions, or None if they are not evenly spaced."""
    first, second, last = positions[[0, min(1, len(positions) - 1), -1]].tolist()
    step = max(second - first, 1)
    if len(positions) != (last - first) // step + 1 or not bool((positions.diff() == step).all()):
        return None
    return slice(first, last + 1, step)
