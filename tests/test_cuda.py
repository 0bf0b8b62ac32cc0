"""On a CUDA device: a step never waits for it, runs on any stream, and can be captured in a graph; else skipped."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from freezehooks import FrozenEntries, MaskedOptimizer, Rule, freeze_entries

from .claims import same_bits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

_HALF = torch.rand(16, 32, generator=torch.Generator().manual_seed(0)) < 0.5
_FEW = torch.rand(16, 32, generator=torch.Generator().manual_seed(1)) < 0.03

SPECS: dict[str, Any] = {
    "box at 0": "0.weight[:, 3] = 0",
    "box at 1": "0.weight[:, 3] = 1",
    "kept rows": "0.weight[2:]",
    "few": {"0.weight": (_FEW, 0.5)},
    "half at 0": {"0.weight": (_HALF, 0.0)},
    "half at 1": {"0.weight": (_HALF, 1.0)},
    "tied": "0.weight = tied(0, start=mean)",
    "half at numbers": Rule("0.weight", _HALF, torch.randn(16, 32, generator=torch.Generator().manual_seed(2))),
}

specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
modes = pytest.mark.parametrize("compact", [False, True], ids=["masked", "compact"])


def _training(spec: Any, compact: bool) -> tuple[nn.Module, FrozenEntries, Callable[[], Tensor]]:
    """Return a model on the device, its frozen entries, and a function that takes one training step on fixed data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 4)).cuda()
    frozen = freeze_entries(model, spec)
    optimizer = MaskedOptimizer(torch.optim.AdamW(model.parameters(), capturable=True), frozen, compact=compact)
    rows = torch.randn(8, 32, device="cuda")

    def step() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(rows).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return model, frozen, step


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")  # torch says so once
        try:
            torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _assert_alike(model: nn.Module, expected: nn.Module) -> None:
    for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        assert same_bits(found.cpu(), wanted.cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_mask_takes_a_byte_an_entry(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.randn(512, 512, device="cuda", dtype=dtype))
    frozen = freeze_entries({"weight": weight}, {"weight": (torch.rand(512, 512) < 0.5, 0)})
    frozen.impose()
    assert frozen.nbytes == weight.numel()


@specs
@modes
def test_a_step_never_waits_for_the_device(spec: Any, compact: bool) -> None:
    _, frozen, step = _training(spec, compact)
    step()
    step()  # by now every mask and value is on the device
    torch.cuda.synchronize()
    with _waiting_is_an_error():
        step()
    frozen.assert_frozen()


@specs
@modes
def test_a_step_captured_in_a_graph_trains_as_one_that_is_not(spec: Any, compact: bool) -> None:
    model, frozen, step = _training(spec, compact)
    expected, _, plain_step = _training(spec, compact)
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
            plain_step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(4):  # capturing runs nothing
        graph.replay()
        plain_step()
    frozen.assert_frozen()
    _assert_alike(model, expected)


@specs
@modes
def test_steps_on_a_side_stream_train_as_those_on_the_usual_one(spec: Any, compact: bool) -> None:
    model, frozen, step = _training(spec, compact)
    expected, _, usual_step = _training(spec, compact)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(4):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    for _ in range(4):
        usual_step()
    frozen.assert_frozen()
    _assert_alike(model, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@modes
def test_entries_hold_in_graphs_that_the_compiler_captures(compact: bool) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 4)).cuda()
    frozen = freeze_entries(model, "0.weight[:, 3] = 0\n2.weight[0]")
    optimizer = MaskedOptimizer(torch.optim.AdamW(model.parameters(), weight_decay=0.1), frozen, compact=compact)
    compiled = torch.compile(model, mode="reduce-overhead")
    kept, rows = model[2].weight[0].detach().clone(), torch.randn(8, 32, device="cuda")
    for _ in range(5):  # the first calls warm up and record, the later ones replay
        torch.compiler.cudagraph_mark_step_begin()
        optimizer.zero_grad()
        compiled(rows).square().mean().backward()
        assert not model[0].weight.grad[:, 3].any()
        optimizer.step()
        assert same_bits(model[2].weight[0].cpu(), kept.cpu())
    frozen.assert_frozen()


def test_a_graphed_callable_that_is_frozen_afterwards_trains_as_one_that_is_not_graphed() -> None:
    finals = []
    for is_graphed in (True, False):
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 4)).cuda()
        rows = torch.randn(8, 32, device="cuda")
        if is_graphed:
            model = torch.cuda.make_graphed_callables(model, (rows,))
        frozen = freeze_entries(model, "0.weight[:, 3] = 0\n2.weight[0]")
        optimizer = MaskedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1), frozen)
        for _ in range(3):
            model[0].weight.data[:, 3] = 7
            optimizer.zero_grad()
            model(rows).square().mean().backward()
            assert not model[0].weight.grad[:, 3].any()
            optimizer.step()
        frozen.assert_frozen()
        finals.append([parameter.detach().cpu() for parameter in model.parameters()])
    assert all(torch.allclose(a, b) for a, b in zip(*finals, strict=True))
