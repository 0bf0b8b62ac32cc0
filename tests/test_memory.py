"""The peak memory of freezing, in multiples of the weight, whose entries have 16 bits or more."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from freezehooks import MaskedOptimizer, freeze_entries, keep, train_only
from freezehooks._entries import least, select

ROWS, COLUMNS = 1024, 1024


class Peak(TorchDispatchMode):
    """Adds up the bytes of all that torch allocates inside the block and has not freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        made = function(*args, **kwargs or {})
        for tensor in (each for each in tree_leaves(made) if isinstance(each, Tensor) and not each.is_meta):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.live and storage._cdata not in given:
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata, None)
        self.bytes = max(self.bytes, sum(self.live.values()))
        return made

    @property
    def weights(self) -> float:
        found: float = self.bytes / (2 * ROWS * COLUMNS)
        return found


def some(fraction: float) -> Tensor:
    return torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) < fraction


@pytest.mark.parametrize(("spec", "most"), [
    ("weight[:-16] = 0", 1.1),
    ("weight[~-16:] = keep", 1.6),
    ({"weight": (some(0.05), 0)}, 2.6),
    ({"weight": (some(0.5), 0)}, 2.6),
    ({"weight": (some(0.5), keep)}, 3.1),
    ("weight[zeros] = 0", 2.6),
    ("weight[triu(1)] = 0", 2.6),
    ("weight[smallest(0.5)] = 0", 3.1),
    ("weight[largest(0.01)] = 0", 3.1),
    ("weight[random(0.5, seed=1)] = 0", 3.5),
    ("weight[nm(2, 4)] = 0", 3.1),
    ("weight[:100] = 0\nweight[100:, 1:-1] = keep", 3.1),
], ids=str)  # fmt: skip
def test_installing_takes_a_few_times_the_weight_at_most(
    spec: Any, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(least, "_CHUNK", 1 << 12)  # as many small chunks
    monkeypatch.setattr(select, "_SELECTED_AT_ONCE", 1 << 12)
    layer = nn.Linear(COLUMNS, ROWS, bias=False, dtype=torch.bfloat16)
    layer.weight.data[some(0.5)] = 0
    with Peak() as peak:
        frozen = freeze_entries(layer, spec)
    assert peak.weights <= most
    assert frozen.nbytes <= 2.1 * 2 * ROWS * COLUMNS


@pytest.mark.parametrize("freeze", [
    lambda layer: freeze_entries(layer, {"weight": (some(0.5), 0)}),
    lambda layer: train_only(layer, "weight[-16:]"),
], ids=["half at 0", "16 rows train"])  # fmt: skip
def test_a_step_takes_no_more_than_a_plain_one(freeze: Callable[[nn.Module], Any]) -> None:
    def peak_of_a_step(frozen: bool) -> float:
        layer = nn.Linear(COLUMNS, ROWS, bias=False, dtype=torch.bfloat16)
        handles = [freeze(layer)] if frozen else []
        optimizer = MaskedOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1), handles)
        layer(torch.ones(1, COLUMNS, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()  # everything is planned
        with Peak() as peak:
            layer(torch.ones(1, COLUMNS, dtype=torch.bfloat16)).sum().backward()
            optimizer.step()
        return float(peak.weights)

    assert peak_of_a_step(True) <= peak_of_a_step(False) + 0.01
