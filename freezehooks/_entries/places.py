"""Where in a tensor the frozen entries lie, in the cheapest form that is exact.

A strided box is reached through a view, few scattered entries by their positions, many by their bits. Every form
leaves the free entries as they are at any moment, also for another thread that reads them, and never computes with
numbers: inf, nan and -0.0 come and go unchanged.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Final

import torch
from torch import Tensor

_FEW: Final = 0.05
"""Up to this fraction of a tensor, writing by position beats a pass over all of its bits."""

_BITS: Final = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)

_INTEGERS: Final = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """Return a view of the tensor as integers of the same width; a complex number counts as its two parts."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.view(_INTEGERS[real.element_size()])


class Places(ABC):
    """The frozen entries of one tensor shape: a box, positions or bits.

    What `read` returns, and `write_` takes, is in the form's own shape: the box without dimensions of one position,
    ``(count,)`` for positions, or the tensor's shape with zeros at the free entries.
    """

    @staticmethod
    def of(frozen: Tensor) -> Places:
        """Return the cheapest form of what is True in the bool tensor `frozen`."""
        if not bool(frozen.any()):
            return Nothing()
        box = Box.around(frozen)
        if box is not None:
            return box
        few = int(frozen.sum()) <= _FEW * frozen.numel()
        return Scattered(frozen) if few else Dense(frozen)

    @staticmethod
    def from_state(state: dict[str, Any], parameter: Tensor) -> Places:
        """Return what `state` wrote down, laid out like the parameter."""
        frozen = torch.zeros(parameter.shape, dtype=torch.bool)
        if "box" in state:
            frozen[tuple(slice(*span) for span in state["box"])] = True
        elif "positions" in state:
            frozen.view(-1)[state["positions"].cpu()] = True
        else:
            frozen |= _unpacked(state["packed"].cpu(), frozen.numel()).view(frozen.shape)
        return Places.like(parameter, frozen)

    @staticmethod
    def like(parameter: Tensor, frozen: Tensor) -> Places:
        """Return the cheapest form of what is True in `frozen`, laid out like the parameter."""
        return Places.of(torch.empty_like(parameter, dtype=torch.bool, requires_grad=False).copy_(frozen))

    @abstractmethod
    def zero_(self, tensor: Tensor) -> None:
        """Write +0.0 into the frozen entries."""

    @abstractmethod
    def fill_(self, tensor: Tensor, number: float) -> None:
        """Write one number into the frozen entries."""

    @abstractmethod
    def write_(self, tensor: Tensor, values: Tensor) -> None:
        """Write values, in this form's shape and the tensor's dtype, into the frozen entries."""

    @abstractmethod
    def read(self, tensor: Tensor) -> Tensor:
        """Return a copy of the frozen entries, in this form's shape."""

    def frozen(self, shape: torch.Size, device: torch.device) -> Tensor:
        """Return the bool tensor that is True at the frozen entries."""
        number = torch.zeros(shape, dtype=torch.int8, device=device)
        self.fill_(number, 1)
        return number.view(torch.bool)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors that this form holds in memory."""
        return ()

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return plain tensors and builtins from which `from_state` makes the same places."""


class Nothing(Places):
    """No entry at all: what a rank may hold of a region that lies on others."""

    def zero_(self, tensor: Tensor) -> None:
        pass

    def fill_(self, tensor: Tensor, number: float) -> None:
        pass

    def write_(self, tensor: Tensor, values: Tensor) -> None:
        pass

    def read(self, tensor: Tensor) -> Tensor:
        return tensor.new_empty(0)

    def state(self) -> dict[str, Any]:
        return {"positions": torch.empty(0, dtype=torch.int64)}


class Box(Places):
    """Entries that form a strided box: reached through a view, at no memory."""

    def __init__(self, spans: tuple[slice, ...], shape: torch.Size) -> None:
        self._spans = spans
        # the quickest key: full dimensions before the first other one are an ellipsis, those after the last left out,
        # one position is a number
        full = [span == slice(0, size, 1) for span, size in zip(spans, shape, strict=True)]
        first, last = (full.index(False), len(full) - full[::-1].index(False)) if not all(full) else (0, 0)
        terse = tuple(span.start if span.stop == span.start + 1 else span for span in spans)
        self._key: tuple[Any, ...] = (..., *terse[first:]) if last == len(full) and first else terse[:last]

    @staticmethod
    def around(frozen: Tensor) -> Box | None:
        """Return the box that holds exactly the entries that are True, or None where they form no box."""
        spans: list[slice] = []
        volume = 1
        for dimension in range(frozen.ndim):
            others = tuple(d for d in range(frozen.ndim) if d != dimension)
            hits = (frozen.any(dim=others) if others else frozen).nonzero().flatten()
            steps = hits.diff()
            step = int(steps[0]) if len(steps) else 1
            if not bool((steps == step).all()):
                return None
            volume *= len(hits)
            spans.append(slice(int(hits[0]), int(hits[-1]) + 1, step))
        return Box(tuple(spans), frozen.shape) if volume == int(frozen.sum()) else None

    def view(self, tensor: Tensor) -> Tensor:
        """Return the entries themselves, as a view of the tensor."""
        return tensor[self._key]

    def zero_(self, tensor: Tensor) -> None:
        tensor[self._key].zero_()

    def fill_(self, tensor: Tensor, number: float) -> None:
        self.view(tensor).fill_(number)

    def write_(self, tensor: Tensor, values: Tensor) -> None:
        self.view(tensor).copy_(values)

    def read(self, tensor: Tensor) -> Tensor:
        return self.view(tensor).clone(memory_format=torch.contiguous_format)

    def state(self) -> dict[str, Any]:
        return {"box": [[span.start, span.stop, span.step] for span in self._spans]}


class Scattered(Places):
    """Few entries, by their positions in the flattened tensor."""

    def __init__(self, frozen: Tensor) -> None:
        self._positions = frozen.flatten().nonzero().flatten()
        self._index: tuple[Tensor, ...] | None = None

    def _flat(self, tensor: Tensor) -> Tensor:
        """Return the positions, on the tensor's device."""
        if self._positions.device != tensor.device:
            self._positions, self._index = self._positions.to(tensor.device), None
        return self._positions

    def _by_dimension(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return the positions along each dimension: what a tensor that is not contiguous can be indexed by."""
        flat = self._flat(tensor)
        if self._index is None:
            self._index = torch.unravel_index(flat, tensor.shape)
        return self._index

    # Not by `put_`, which refuses to run under torch.use_deterministic_algorithms.

    def zero_(self, tensor: Tensor) -> None:
        self.fill_(tensor, 0.0)

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


class Dense(Places):
    """Many entries anywhere, as bits: 0 where frozen and all ones where free, one integer for every entry."""

    def __init__(self, frozen: Tensor) -> None:
        self._free = ~frozen
        self._filled: tuple[float, Tensor] | None = None

    def _free_bits(self, tensor: Tensor) -> Tensor:
        """Return the bits of the free entries, as wide as the tensor's numbers and broadcast to `bits(tensor)`."""
        dtype, device = bits(tensor).dtype, tensor.device
        if self._free.dtype != dtype or self._free.device != device:
            self._free = (self._free != 0).to(device, dtype).neg_()
        return self._free.unsqueeze(-1) if tensor.is_complex() else self._free

    def zero_(self, tensor: Tensor) -> None:
        bits(tensor).bitwise_and_(self._free_bits(tensor))

    def fill_(self, tensor: Tensor, number: float) -> None:
        if number == 0 and math.copysign(1, number) > 0:
            self.zero_(tensor)
            return
        self.write_(tensor, self._full_of(number, tensor))

    def _full_of(self, number: float, tensor: Tensor) -> Tensor:
        """Return the number at the frozen entries and zeros elsewhere, in the tensor's dtype."""
        filled = self._filled
        if filled is None or (filled[0], filled[1].dtype, filled[1].device) != (number, tensor.dtype, tensor.device):
            values = torch.full_like(tensor, number, requires_grad=False)
            bits(values).bitwise_and_(~self._free_bits(tensor))
            self._filled = filled = number, values
        return filled[1]

    def write_(self, tensor: Tensor, values: Tensor) -> None:
        # values - free * own with free -1 or 0, in integers: exact. One pass, nothing allocated, and one store of the
        # final bits: the forward of another thread never sees anything in between.
        own = bits(tensor)
        torch.addcmul(bits(values), self._free_bits(tensor), own, value=-1, out=own)

    def read(self, tensor: Tensor) -> Tensor:
        values = tensor.clone()
        bits(values).bitwise_and_(~self._free_bits(tensor))
        return values

    def frozen(self, shape: torch.Size, device: torch.device) -> Tensor:
        return (self._free == 0).to(device)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self._free,) if self._filled is None else (self._free, self._filled[1])

    def state(self) -> dict[str, Any]:
        return {"packed": _packed(self._free == 0)}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_filled": None}


def _packed(mask: Tensor) -> Tensor:
    """Return a bool tensor as bytes, eight entries each, row by row."""
    flat = mask.flatten()
    padded = torch.cat([flat, flat.new_zeros(-len(flat) % 8)]).view(-1, 8)
    return (padded * _BITS.to(mask.device)).sum(dim=1, dtype=torch.uint8)


def _unpacked(packed: Tensor, count: int) -> Tensor:
    return (packed.unsqueeze(1) & _BITS).ne(0).flatten()[:count]
