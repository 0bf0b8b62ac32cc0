"""What a monitor logs: the norms of a gradient over frozen and free entries, and the drift; no framework is needed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from freezehooks import freeze_entries
from freezehooks._report.monitor import drift, gradient_norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_the_norms_split_the_gradient_at_the_frozen_entries(dtype: torch.dtype) -> None:
    weight = torch.ones(2, 2, dtype=dtype, requires_grad=True)
    frozen = freeze_entries({"w": weight}, "w[0] = 1")
    weight.grad = torch.tensor([[3, 4], [5, 12]]).to(dtype)  # set by hand: not yet zeroed
    norms = gradient_norms([frozen["w"]], weight)
    assert norms is not None
    assert (norms.frozen, norms.free) == (5, 13)


def test_inf_at_a_free_entry_does_not_reach_the_norm_of_the_frozen_ones() -> None:
    weight = torch.ones(3, requires_grad=True)
    frozen = freeze_entries({"w": weight}, "w[0] = 1")
    weight.grad = torch.tensor([2.0, torch.inf, torch.nan])
    norms = gradient_norms([frozen["w"]], weight)
    assert norms is not None
    assert norms.frozen == 2


def test_sparse_gradients_count_an_entry_that_stands_there_twice_once() -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    frozen = freeze_entries(embedding, "weight[:2] = 0")
    embedding(torch.tensor([1, 3, 3])).sum().backward()
    norms = gradient_norms([frozen["weight"]], embedding.weight)
    assert norms is not None
    assert norms.frozen == 0
    assert norms.free == pytest.approx(8**0.5)  # a row of twos


def test_drift_is_the_largest_distance_and_inf_for_nan() -> None:
    weight = torch.ones(4, requires_grad=True)
    frozen = freeze_entries({"w": weight}, "w[:3] = 1")
    assert drift([frozen["w"]], weight) == 0
    weight.data[:] = torch.tensor([1.25, 0.5, 1.0, 9.0])
    assert drift([frozen["w"]], weight) == 0.5
    weight.data[1] = torch.nan
    assert drift([frozen["w"]], weight) == torch.inf
