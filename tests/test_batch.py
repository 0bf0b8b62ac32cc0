"""Batched writes: how many calls a step makes, what a running forward covers, and what ends that."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from freezehooks import FrozenEntries, MaskedOptimizer, freeze_entries
from freezehooks._entries.writes import Writes
from freezehooks._hooks.batch import Plan

from .devices import on_cpu
from .draws import rand
from .operations import Ops

_MASK = rand(8, 8, seed=1) < 0.5

SPECS: dict[str, Any] = {
    "slice": "*.weight[:, 1] = 0",
    "slice_at_a_number": "*.weight[:, 1] = 0.5",
    "kept_slice": "*.weight[2]",
    "dense": {"*.weight": (_MASK, 0.0)},
}


def _chain(length: int, spec: Any = "*.weight[0] = 1") -> tuple[Any, FrozenEntries, MaskedOptimizer]:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(length)))
    frozen = freeze_entries(model, spec)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, foreach=True)
    return model, frozen, MaskedOptimizer(optimizer, frozen)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 8)).square().mean().backward()
        optimizer.step()


@contextmanager
def _counted_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Writes]]:
    runs: list[Writes] = []
    run = Writes.run

    def counted(writes: Writes) -> None:
        runs.append(writes)
        run(writes)

    with monkeypatch.context() as patch:
        patch.setattr(Writes, "run", counted)
        yield runs


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_writes_of_a_step_do_not_grow_with_the_number_of_parameters(
    spec: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, kernels = [], []
    for length in (2, 12):
        model, _, optimizer = _chain(length, spec)
        _train(model, optimizer, 2)
        with _counted_runs(monkeypatch) as counted, Ops() as ops:
            _train(model, optimizer)
        runs.append(len(counted))
        kernels.append({name: count for name, count in ops.counts.items() if name.startswith("_foreach")})
    assert runs[0] == runs[1] == 4  # before the forward, after the backward, before and after the step
    assert kernels[0] == kernels[1]


def test_nothing_is_planned_from_step_to_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, frozen, optimizer = _chain(5)
    _train(model, optimizer, 2)
    made: list[Plan] = []
    init: Any = Plan.__init__

    def counted(plan: Plan) -> None:
        made.append(plan)
        init(plan)

    monkeypatch.setattr(Plan, "__init__", counted)
    _train(model, optimizer, 3)
    assert made == []
    model[2].weight = nn.Parameter(torch.ones(8, 8))
    model(torch.ones(2, 8))
    assert made
    frozen.assert_frozen(guarded=False)


def test_each_of_many_optimizers_looks_at_its_own_parameters_alone() -> None:
    model, frozen, _ = _chain(6)
    optimizers = [torch.optim.SGD([layer.weight], lr=0.1, weight_decay=0.5) for layer in model]
    for optimizer in optimizers:
        frozen.guard(optimizer)
    model(torch.ones(2, 8)).sum().backward()
    for optimizer, layer in zip(optimizers, model, strict=True):
        before = [each.weight.detach().clone() for each in model]
        optimizer.step()
        hooks = next(iter(optimizer._optimizer_step_pre_hooks.values())).__self__  # type: ignore[attr-defined]
        assert [held.name for held, _ in hooks.pairs(optimizer)] == [f"{list(model).index(layer)}.weight"]
        changed = [not torch.equal(a, b.weight) for a, b in zip(before, model, strict=True)]
        assert changed.index(True) == list(model).index(layer)
    frozen.assert_frozen()


# --------------------------------------------------------------------------------------------------------------------
# Inside a running forward


class _Meddling(nn.Module):
    """Writes into the second layer's weight between the two."""

    def __init__(self, through_data: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.through_data = through_data
        self.seen: Tensor | None = None

    def forward(self, rows: Tensor) -> Any:
        rows = self.first(rows)
        if self.through_data:
            self.second.weight.data.fill_(7)
        else:
            with torch.no_grad():
                self.second.weight.fill_(7)
        output = self.second(rows)
        self.seen = self.second.weight.detach().clone()
        return output


def test_a_counted_write_inside_a_running_forward_is_undone_before_the_module_computes() -> None:
    model = _Meddling(through_data=False)
    freeze_entries(model, "second.weight[0] = 1")
    model(torch.ones(2, 8))
    assert model.seen is not None
    assert model.seen[0].tolist() == [1] * 8
    assert model.seen[1].tolist() == [7] * 8


def test_a_write_through_data_inside_a_running_forward_waits_for_the_next() -> None:
    model = _Meddling(through_data=True)
    frozen = freeze_entries(model, "second.weight[0] = 1")
    model(torch.ones(2, 8))
    model.second(torch.ones(2, 8))  # called by itself, as the outermost forward
    frozen.assert_frozen(guarded=False)
    model(torch.ones(2, 8))
    assert model.state_dict()["second.weight"][0].tolist() == [1] * 8


def test_a_parameter_that_is_replaced_inside_a_running_forward_is_held() -> None:
    model = _Meddling(through_data=False)
    frozen = freeze_entries(model, "second.weight[0] = 1")

    def replace(module: nn.Module, args: Any, output: Any) -> None:
        model.second.weight = nn.Parameter(torch.zeros(8, 8))

    model.first.register_forward_hook(replace)
    with pytest.warns(UserWarning, match=r"`second\.weight` was replaced"):
        model(torch.ones(2, 8)).sum().backward()
    frozen.assert_frozen(guarded=False)
    assert model.second.weight.grad is not None
    assert not model.second.weight.grad[0].any()


class _Failing(nn.Module):
    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.error: type[BaseException] | None = error

    def forward(self, rows: Tensor) -> Any:
        rows = self.first(rows)
        if self.error is not None:
            raise self.error("on purpose")
        return self.second(rows)


def test_an_error_inside_a_forward_leaves_every_module_to_itself() -> None:
    model = _Failing(ValueError)
    frozen = freeze_entries(model, "second.weight[0] = 1")
    with pytest.raises(ValueError, match="on purpose"):
        model(torch.ones(2, 8))
    model.second.weight.data.fill_(7)
    model.second(torch.ones(2, 8))
    frozen.assert_frozen(guarded=False)


def test_a_forward_that_was_broken_off_by_a_key_ends_with_the_next_forward_or_step() -> None:
    for end in ("forward", "step"):
        model = _Failing(KeyboardInterrupt)
        frozen = freeze_entries(model, "*.weight[0] = 1")
        optimizer = MaskedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), frozen)
        with pytest.raises(KeyboardInterrupt):
            model(torch.ones(2, 8))
        model.error = None
        model(torch.ones(2, 8)) if end == "forward" else optimizer.step()
        model.second.weight.data.fill_(7)
        model.second(torch.ones(2, 8))
        frozen.assert_frozen()


def test_another_thread_is_not_covered_by_a_forward_that_runs_in_this_one() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    frozen = freeze_entries(model, "1.weight[0] = 1")

    rows = torch.ones(2, 8)

    def meanwhile(module: nn.Module, args: Any) -> None:
        model[1].weight.data.fill_(7)
        thread = threading.Thread(target=lambda: model[1](rows))
        thread.start()
        thread.join()
        frozen.assert_frozen(guarded=False)

    model[0].register_forward_pre_hook(meanwhile)
    model(rows)


class _Recursive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, rows: Tensor, depth: int) -> Any:
        if depth:
            rows = self(rows, depth - 1)
        self.layer.weight.data.fill_(7)
        return self.layer(rows)


def test_a_module_that_calls_itself_holds_its_entries() -> None:
    model = _Recursive()
    frozen = freeze_entries(model, "layer.weight[0] = 1")
    model(torch.ones(2, 8), 3).sum().backward()
    frozen.impose()
    assert model.layer.weight.grad is not None
    assert not model.layer.weight.grad[0].any()
    frozen.assert_frozen(guarded=False)


def test_a_child_that_is_called_by_itself_writes_for_all_below_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = nn.ModuleDict({"body": nn.Sequential(*(nn.Linear(8, 8) for _ in range(5))), "head": nn.Linear(8, 8)})
    frozen = freeze_entries(model, "*.weight[0] = 1")
    model["body"](torch.ones(2, 8))
    for parameter in model.parameters():
        parameter.data.fill_(7)
    with _counted_runs(monkeypatch) as runs:
        model["body"](torch.ones(2, 8))
    assert len(runs) == 1
    assert all((layer.weight[0] == 1).all() for layer in model["body"])
    model["head"](torch.ones(2, 8))
    frozen.assert_frozen(guarded=False)


def test_a_child_inside_the_call_of_the_model_writes_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Linear(8, 8))
    freeze_entries(model, "*.weight[0] = 1")
    model(torch.ones(2, 8))
    with _counted_runs(monkeypatch) as runs:
        model(torch.ones(2, 8))
        model.state_dict()
    assert len(runs) == 2


def test_saving_writes_for_all_modules_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, frozen, _ = _chain(5)
    for parameter in model.parameters():
        parameter.data.fill_(7)
    with _counted_runs(monkeypatch) as runs:
        state = model.state_dict()
    assert len(runs) == 1
    assert all((state[f"{n}.weight"][0] == 1).all() for n in range(5))
    frozen.assert_frozen(guarded=False)
    model[3].weight.data.fill_(7)
    assert (model[3].state_dict()["weight"][0] == 1).all()


# --------------------------------------------------------------------------------------------------------------------
# Gradients


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise ValueError("on purpose")


def test_a_backward_pass_that_fails_leaves_clean_gradients_to_the_step() -> None:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    model = nn.Sequential(first, second)
    frozen = freeze_entries(model, "*.weight[0] = 1")
    optimizer = MaskedOptimizer(torch.optim.Adam(model.parameters()), frozen)
    with pytest.raises(ValueError, match="on purpose"):
        second(_Fails.apply(first(torch.ones(2, 8)))).sum().backward()
    optimizer.step()
    assert not optimizer.state[second.weight]["exp_avg"][0].any()
    _train(model, optimizer)
    assert first.weight.grad is not None
    assert not first.weight.grad[0].any()


def test_a_backward_pass_that_fails_keeps_no_parameter_alive() -> None:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    freeze_entries(nn.Sequential(first, second), "1.weight[0] = 1")
    with pytest.raises(ValueError, match="on purpose"):
        second(_Fails.apply(first(torch.ones(2, 8)))).sum().backward()
    alive = weakref.ref(second.weight)
    del second
    gc.collect()
    assert alive() is None


def test_a_hook_that_steps_in_backward_gets_a_clean_gradient() -> None:
    model = nn.Linear(8, 8)
    frozen = freeze_entries(model, "weight[0] = 1")
    optimizer = MaskedOptimizer(torch.optim.Adam([model.weight]), frozen)

    def step(parameter: Tensor) -> None:
        assert parameter.grad is not None
        assert not parameter.grad[0].any()
        optimizer.step()
        optimizer.zero_grad()

    model.weight.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        model(torch.ones(2, 8)).sum().backward()
        frozen.assert_frozen()


def test_two_threads_that_run_backward_through_one_model_both_leave_clean_gradients() -> None:
    model, frozen, _ = _chain(20)
    rows = torch.ones(2, 8)
    wrong: list[str] = []

    def work() -> None:
        for _ in range(20):
            model(rows).sum().backward()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and parameter.grad is not None and bool(parameter.grad[0].any()):
            wrong.append(name)
    assert wrong == []
    frozen.assert_frozen(guarded=False)


def test_a_gradient_that_was_dropped_leaves_memory_with_the_next_forward() -> None:
    model, _, optimizer = _chain(1)
    model(torch.ones(2, 8)).sum().backward()
    assert model[0].weight.grad is not None
    storage = model[0].weight.grad.untyped_storage()
    alive = weakref.ref(storage)
    del storage
    optimizer.zero_grad()
    model(torch.ones(2, 8))
    assert alive() is None or model[0].weight.grad is None


# --------------------------------------------------------------------------------------------------------------------
# Reference cycles and lifetimes


@pytest.mark.parametrize("compact", [False, True], ids=["masked", "compact"])
def test_a_guarded_model_is_freed_at_once_when_it_is_dropped(compact: bool) -> None:
    gc.collect()
    gc.disable()
    try:
        model: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        frozen = freeze_entries(model, "*.weight[0] = 1\n1.bias[:2]")
        optimizer = MaskedOptimizer(torch.optim.AdamW(model.parameters()), frozen, compact=compact)
        _train(model, optimizer, 2)
        model.state_dict()
        optimizer.state_dict()
        alive = [weakref.ref(model[0]), weakref.ref(optimizer.inner), weakref.ref(frozen)]
        del model, frozen, optimizer
        assert [each() for each in alive] == [None] * 3
    finally:
        gc.enable()


def test_a_submodule_that_outlives_its_model_keeps_nothing_else_of_it_alive() -> None:
    model, frozen, optimizer = _chain(3)
    _train(model, optimizer, 2)
    last, first = model[2], weakref.ref(model[0].weight)
    del model, frozen, optimizer
    gc.collect()
    assert first() is None
    last(torch.ones(2, 8))
    assert last.weight[0].tolist() == [1] * 8


@on_cpu("a process that talks by gloo")
def test_gradients_are_clean_behind_the_reducer_of_a_single_process(tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)  # type: ignore[attr-defined]  # undeclared
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model, frozen, optimizer = _chain(3)
        wrapped = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            optimizer.zero_grad()
            wrapped(torch.ones(2, 8)).sum().backward()
            assert not any(bool(layer.weight.grad[0].any()) for layer in model)
            optimizer.step()
            frozen.assert_frozen()
    finally:
        torch.distributed.destroy_process_group()


def test_another_handle_of_a_model_releases_the_optimizers_too() -> None:
    model, frozen, optimizer = _chain(2)
    (again,) = FrozenEntries.of(model)
    again.remove()
    assert not optimizer.inner._optimizer_step_post_hooks  # type: ignore[attr-defined]  # undeclared
    _train(model, optimizer)
    assert bool((model[0].weight[0] != 1).all())
    frozen.attach()
    _train(model, optimizer)
    frozen.assert_frozen()


def test_what_another_handle_released_and_holds_again_is_held_by_an_optimizer_of_its_own() -> None:
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "head": nn.Linear(8, 8)})
    frozen = freeze_entries(model, "*.weight[0] = 1")
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1, weight_decay=0.5) for each in model.values()]
    for optimizer in optimizers:
        frozen.guard(optimizer)
        optimizer.step()
    (head,) = FrozenEntries.of(model["head"])
    head.remove()
    for optimizer in optimizers:
        optimizer.step()
    head.attach()
    for optimizer in optimizers:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert frozen.violations() == ()
    head.assert_frozen()


def test_gradient_hooks_that_somebody_cleared_are_back_with_the_next_forward() -> None:
    model, frozen, optimizer = _chain(2)
    _train(model, optimizer)
    model[0].weight._post_accumulate_grad_hooks.clear()
    optimizer.zero_grad()
    model(torch.ones(2, 8)).square().sum().backward()
    assert not model[0].weight.grad[0].any()
    frozen.assert_frozen()
