"""Batches writes into many tensors: one call for each kind of write and dtype."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

_Grouped: TypeAlias = "defaultdict[torch.dtype, list[Tensor]]"


class Writes:
    """A batch of writes that is collected once and can be run any number of times.

    torch's `_foreach` functions take many tensors in one call, and run as one kernel on a GPU if all have one dtype.
    Writes without such a function run after them, in one call each.
    """

    __slots__ = ("_calls", "_copied", "_masks", "_multiplied", "_values", "_zeroed")

    def __init__(self) -> None:
        self._zeroed: list[Tensor] = []
        self._copied: _Grouped = defaultdict(list)
        self._values: _Grouped = defaultdict(list)
        self._multiplied: _Grouped = defaultdict(list)
        self._masks: _Grouped = defaultdict(list)
        self._calls: list[Callable[[], object]] = []

    def zero(self, view: Tensor) -> None:
        """Add a write of +0.0 into a whole tensor."""
        self._zeroed.append(view)

    def copy(self, view: Tensor, values: Tensor) -> None:
        """Add a write of values into a whole tensor of their shape."""
        self._copied[view.dtype].append(view)
        self._values[view.dtype].append(values)

    def multiply(self, integers: Tensor, mask: Tensor) -> None:
        """Add a multiplication of integers by a mask of 0 and 1: exact for any number whose bits they are."""
        self._multiplied[integers.dtype].append(integers)
        self._masks[integers.dtype].append(mask)

    def call(self, write: Callable[[], object]) -> None:
        """Add a function that writes."""
        self._calls.append(write)

    def run(self) -> None:
        """Run all writes."""
        if self._zeroed:
            torch._foreach_zero_(self._zeroed)
        for dtype, tensors in self._copied.items():
            torch._foreach_copy_(tensors, self._values[dtype])
        for dtype, tensors in self._multiplied.items():
            torch._foreach_mul_(tensors, self._masks[dtype])
        for write in self._calls:
            write()
