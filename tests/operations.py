"""Counts what torch computes inside a block."""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_WITHOUT_KERNEL: Final = {"detach", "alias", "view", "select", "slice", "as_strided", "permute", "transpose", "t",
                          "expand", "unsqueeze", "squeeze", "view_as_real", "split", "split_with_sizes",
                          "is_set_to"}  # fmt: skip


class Ops(TorchDispatchMode):
    """Counts operations, and records the size of the largest tensor that any of them made or wrote to.

    Attributes:
        counts: How often each was called, by name.
        kernels: The same without those for which a GPU runs nothing: views, questions of where a tensor lies, and
            results that have no entries.
        collectives: The same for those of torch.distributed alone.
        largest: How many entries the largest tensor has.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        name = func.overloadpacket.__name__
        self.counts[name] += 1
        if "c10d" in func.namespace:
            self.collectives[name] += 1
        if name not in _WITHOUT_KERNEL and not (isinstance(result, Tensor) and not result.numel()):
            self.kernels[name] += 1
        if name not in _WITHOUT_KERNEL and isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result
