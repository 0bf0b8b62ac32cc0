"""Writes into the entries of many tensors, carried out together: one call for each kind and dtype."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

_Grouped: TypeAlias = "defaultdict[torch.dtype, list[Tensor]]"


class Writes:
    """What is to be written where. Collected once, it may be run any number of times.

    torch's `_foreach` functions take many tensors in one call, and on a GPU, where all are of one dtype, in one kernel.
    Whatever has no such function is carried out after them, one call each.
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
        """Write +0.0 into all of a tensor."""
        self._zeroed.append(view)

    def copy(self, view: Tensor, values: Tensor) -> None:
        """Write values into all of a tensor of their shape."""
        self._copied[view.dtype].append(view)
        self._values[view.dtype].append(values)

    def multiply(self, integers: Tensor, mask: Tensor) -> None:
        """Multiply integers by a mask of 0 and 1 of their dtype: exact for the numbers whose bits they are."""
        self._multiplied[integers.dtype].append(integers)
        self._masks[integers.dtype].append(mask)

    def call(self, write: Callable[[], object]) -> None:
        """Call a function that writes."""
        self._calls.append(write)

    def run(self) -> None:
        """Write all of it."""
        if self._zeroed:
            torch._foreach_zero_(self._zeroed)
        for dtype, tensors in self._copied.items():
            torch._foreach_copy_(tensors, self._values[dtype])
        for dtype, tensors in self._multiplied.items():
            torch._foreach_mul_(tensors, self._masks[dtype])
        for write in self._calls:
            write()
