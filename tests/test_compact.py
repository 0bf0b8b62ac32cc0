"""Compact mode: the optimizer holds only the free entries, and from outside nothing else changes."""

from __future__ import annotations

import copy
import gc
import importlib
import io
import pickle
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import Tensor, nn
from torch.optim import (
    ASGD,
    LBFGS,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    AdamW,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
    SparseAdam,
    lr_scheduler,
)

from freezehooks import (
    FrozenEntries,
    MaskedOptimizer,
    StateMismatchError,
    UnsupportedOptimizerError,
    UnsupportedParameterError,
    freeze_entries,
)

from .claims import FreeEntriesAlone, assert_training_holds, held_twice, largest_difference, same_bits
from .devices import default, on_cpu
from .draws import rand, randn
from .operations import Ops
from .test_optimizer_matrix import ELEMENTWISE, Case
from .zoo import IDS, ZOO, Animal

Maker = Callable[[list[Tensor]], Optimizer]

SPEC = "0.weight[:, 1::2] = 0.5\n2.weight[0] = 0\n2.weight[3, 2]"
"""A region of many runs, one that leaves a single block, and an entry inside it."""

MAKERS: dict[str, Maker] = {
    "sgd": partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam_amsgrad": partial(Adam, lr=0.05, amsgrad=True),
    "adamw": partial(AdamW, lr=0.05, weight_decay=0.1),
    "adamw_fused": partial(AdamW, lr=0.05, weight_decay=0.1, fused=True),
    "adagrad": partial(Adagrad, lr=0.1, initial_accumulator_value=0.25),
    "asgd": partial(ASGD, lr=0.1, t0=2),
    "rprop": partial(Rprop, lr=0.03),
    "rmsprop": partial(RMSprop, lr=0.03, centered=True, momentum=0.5),
}

makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def _net(seed: int = 2) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4))


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    return model.get_parameter(name)


def _backward(model: Callable[[Tensor], Tensor], seed: int) -> Tensor:
    batch = randn(6, 12, seed=seed)
    loss = torch.sum((model(batch) - 0.3) ** 2)
    loss.backward()
    return loss


def _train(model: nn.Module, optimizer: Optimizer, steps: int = 3, start: int = 0) -> None:
    for seed in range(start, start + steps):
        optimizer.zero_grad()
        _backward(model, seed)
        optimizer.step()


def _run(
    make: Maker, spec: Any = SPEC, *, compact: bool = True
) -> tuple[nn.Sequential, FrozenEntries, MaskedOptimizer]:
    model = _net()
    frozen = freeze_entries(model, spec)
    return model, frozen, MaskedOptimizer(make(list(model.parameters())), frozen, compact=compact)


def _adamw(*, compact: bool = True, **options: Any) -> tuple[nn.Sequential, FrozenEntries, MaskedOptimizer]:
    return _run(partial(AdamW, lr=0.05, weight_decay=0.1, **options), compact=compact)


def _same(first: nn.Module, second: nn.Module) -> bool:
    return all(same_bits(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def _both(**options: Any) -> list[tuple[nn.Sequential, FrozenEntries, MaskedOptimizer]]:
    return [_adamw(compact=compact, **options) for compact in (False, True)]


def _same_state(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two state dicts are equal bit for bit."""
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    return True


# --------------------------------------------------------------------------------------------------------------------
# Every elementwise optimizer of torch.optim

PAIRS: Final = [pytest.param(c, a, id=f"{c.name}-{a.name}") for c, a in ELEMENTWISE]


def _loss_of(animal: Animal, batch: tuple[Any, ...], model: nn.Module) -> Tensor:
    return animal.loss(model, batch)


@pytest.mark.parametrize(("case", "animal"), PAIRS)
def test_free_entries_follow_the_optimizer_that_holds_them_alone_bit_for_bit(case: Case, animal: Animal) -> None:
    """The fused kernels too: both hold the same flat tensors."""
    model = animal.model()
    held = animal.held(model)
    reference = FreeEntriesAlone(copy.deepcopy(model), held, case.make)
    masked = copy.deepcopy(model)
    optimizers = [
        (m, MaskedOptimizer(case.make(list(m.parameters())), freeze_entries(m, animal.spec), compact=m is model))
        for m in (model, masked)
    ]
    for _ in range(5):
        batch = animal.batch()
        for m, optimizer in optimizers:
            optimizer.zero_grad()
            animal.loss(m, batch).backward()
            optimizer.step()
        reference.step(partial(_loss_of, animal, batch))
    assert _same(model, reference.model), largest_difference(model, reference.model)
    if case.kernel != "fused":
        assert _same(model, masked), largest_difference(model, masked)
    else:  # the last few entries of each tensor are rounded by another kernel
        assert largest_difference(model, masked) < 1e-5


@pytest.mark.parametrize("animal", ZOO, ids=IDS)
def test_frozen_entries_hold_at_every_point_in_every_model_of_the_zoo(animal: Animal) -> None:
    model = animal.model()
    held = animal.held(model)
    masked = copy.deepcopy(model)
    optimizers = [
        MaskedOptimizer(
            AdamW(m.parameters(), lr=0.1, weight_decay=0.1), freeze_entries(m, animal.spec), compact=compact
        )
        for m, compact in ((model, True), (masked, False))
    ]
    for m, optimizer in zip((model, masked), optimizers, strict=True):
        torch.manual_seed(4)
        assert_training_holds(animal, m, held, optimizer, 4)
    assert _same(model, masked)


_MASK = rand(8, 12, seed=9) < 0.4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64], ids=str)
@makers
def test_other_dtypes_follow_the_masked_run(make: Maker, dtype: torch.dtype) -> None:
    tensors = []
    if dtype.is_complex and (make is MAKERS["adamw_fused"]):
        pytest.skip("torch's fused kernels take no complex numbers")
    for compact in (False, True):
        torch.manual_seed(1)
        weight = nn.Parameter(torch.randn(8, 12, dtype=dtype))
        optimizer = MaskedOptimizer(
            make([weight]), freeze_entries({"weight": weight}, {"weight": (_MASK, 0.5)}), compact=compact
        )
        for _ in range(4):
            weight.grad = torch.randn(8, 12, dtype=dtype)
            optimizer.step()
        assert same_bits(weight[_MASK], torch.full((int(_MASK.sum()),), 0.5, dtype=dtype))
        tensors.append(weight.detach())
    if make is MAKERS["adamw_fused"] or dtype is torch.bfloat16:  # the last few are rounded by other kernels
        torch.testing.assert_close(tensors[0], tensors[1], atol=0.01, rtol=0.01)
    else:
        assert same_bits(tensors[0], tensors[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [SGD, ASGD, RMSprop, RAdam, Adadelta], ids=lambda kind: kind.__name__)
def test_half_precision_follows_the_masked_run_up_to_roundings(kind: Any, dtype: torch.dtype) -> None:
    """Equal bit for bit to the optimizer that has only the free entries: the CPU's kernels round by position."""
    mask = rand(37, 29, seed=9) < 0.4
    make = partial(kind, lr=0.03, foreach=False, **({"momentum": 0.9} if kind in (SGD, RMSprop) else {}))
    runs = []
    for compact in (False, True, None):
        generator = torch.Generator().manual_seed(1)
        weight = nn.Parameter(randn(37, 29, seed=generator).to(dtype))
        free = nn.Parameter(weight.detach()[~mask].clone())
        if compact is None:
            optimizer = make([free])
        else:
            frozen = freeze_entries({"weight": weight}, {"weight": (mask, 0.5)})
            optimizer = MaskedOptimizer(make([weight]), frozen, compact=compact)
        for _ in range(4):
            weight.grad = randn(37, 29, seed=generator).to(dtype)
            free.grad = weight.grad[~mask].clone()
            optimizer.step()
        runs.append((free if compact is None else weight[~mask]).detach())
    assert same_bits(runs[1], runs[2])
    torch.testing.assert_close(runs[0], runs[1], rtol=0.05, atol=0.05)


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="a gradient has the parameter's dtype before torch 2.10")
def test_a_gradient_of_another_dtype_is_stepped() -> None:
    weights = []
    for compact in (False, True):
        weight: Any = nn.Parameter(torch.ones(4, 3, dtype=torch.bfloat16))
        weight.grad_dtype = torch.float32
        frozen = freeze_entries({"weight": weight}, "weight[:, 1] = 0")
        optimizer = MaskedOptimizer(SGD([weight], lr=0.1), frozen, compact=compact)
        for _ in range(2):
            weight.grad = torch.full((4, 3), 0.7)
            optimizer.step()
        weights.append(weight)
    assert same_bits(*weights)


@pytest.mark.parametrize("search", [None, "strong_wolfe"], ids=["fixed", "strong_wolfe"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_lbfgs_is_lbfgs_over_the_free_entries_alone_bit_for_bit(search: str | None, dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.randn(8, 12, dtype=dtype))
    batch = torch.randn(9, 12, dtype=dtype)
    free = weight.detach()[~_MASK].requires_grad_()
    frozen = freeze_entries({"weight": weight}, {"weight": (_MASK, 0.5)})
    make = partial(LBFGS, lr=0.1, max_iter=4, line_search_fn=search)
    optimizer, reference = MaskedOptimizer(make([weight]), frozen, compact=True), make([free])

    def loss_at(tensor: Tensor) -> Tensor:
        return torch.sum((torch.tanh(batch @ tensor.T) - 0.2).abs() ** 2)

    def closure() -> Tensor:
        assert same_bits(weight[_MASK], torch.full((int(_MASK.sum()),), 0.5, dtype=dtype))
        optimizer.zero_grad()
        loss = loss_at(weight)
        loss.backward()
        return loss

    def reference_closure() -> Tensor:
        reference.zero_grad()
        whole = torch.full_like(weight, 0.5).detach().masked_scatter(~_MASK, free)
        loss = loss_at(whole)
        loss.backward()
        return loss

    for _ in range(3):
        loss, expected = optimizer.step(closure), reference.step(reference_closure)
        assert same_bits(loss, torch.as_tensor(expected))
        assert same_bits(weight[~_MASK], free)
    vectors = optimizer.state[weight]["old_dirs"]
    assert {len(vector) for vector in vectors} == {free.numel() * (2 if dtype.is_complex else 1)}


def test_lbfgs_with_nothing_free_does_nothing() -> None:
    weight = nn.Parameter(torch.randn(3))
    optimizer = MaskedOptimizer(LBFGS([weight]), freeze_entries({"w": weight}, "w = 0.5"), compact=True)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    for _ in range(2):
        assert torch.as_tensor(optimizer.step(closure)).item() == 0.75


# --------------------------------------------------------------------------------------------------------------------
# What it holds


def _state_numbers(optimizer: Optimizer, parameter: Tensor) -> list[int]:
    return [v.numel() for name, v in optimizer.state[parameter].items() if isinstance(v, Tensor) and name != "step"]


def test_the_state_is_of_the_size_of_the_free_entries() -> None:
    model, frozen, optimizer = _adamw(amsgrad=True)
    _train(model, optimizer, 1)
    assert _state_numbers(optimizer, _parameter(model, "0.weight")) == [frozen["0.weight"].free_count] * 3
    assert _state_numbers(optimizer, _parameter(model, "2.weight")) == [frozen["2.weight"].free_count] * 3
    assert _state_numbers(optimizer, _parameter(model, "2.bias")) == [4] * 3


def _embedding(make: Maker = MAKERS["adamw"]) -> tuple[nn.Embedding, MaskedOptimizer]:
    embedding = nn.Embedding(1000, 16)
    return embedding, MaskedOptimizer(
        make(list(embedding.parameters())), freeze_entries(embedding, "weight[:-10]"), compact=True
    )


def _step_embedding(embedding: nn.Embedding, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    embedding(torch.tensor([3, 995, 999])).square().sum().backward()
    optimizer.step()


@makers
def test_last_rows_are_stepped_in_place_and_nothing_of_the_size_of_the_table_is_touched(make: Maker) -> None:
    embedding, optimizer = _embedding(make)
    _step_embedding(embedding, optimizer)
    address = embedding.weight.data_ptr()
    embedding(torch.tensor([3, 995, 999])).square().sum().backward()
    with Ops() as ops:
        optimizer.step()
    assert ops.largest in (0, 160)  # fused and foreach kernels return nothing
    assert not ops.counts["index_select"] + ops.counts["scatter_"] + ops.counts["cat"]
    assert embedding.weight.data_ptr() == address


@makers
def test_what_stands_in_frozen_entries_is_never_read_nor_written_by_a_step(make: Maker) -> None:
    runs = []
    for spoilt in (False, True):
        model, frozen, optimizer = _run(make)
        _train(model, optimizer)
        _backward(model, 7)
        for part, parameter in frozen.held():
            if spoilt:
                parameter.data[part.frozen] = torch.nan
                assert parameter.grad is not None
                parameter.grad.data[part.frozen] = torch.nan
        optimizer.step()
        for part, parameter in frozen.held():
            assert bool(parameter[part.frozen].isnan().all()) == spoilt
            assert all(bool(v.isfinite().all()) for v in optimizer.state[parameter].values() if isinstance(v, Tensor))
        model(torch.ones(1, 12))
        frozen.assert_frozen()
        runs.append(model)
    assert _same(*runs)


def test_a_stray_write_that_autograd_counts_is_put_right_by_the_step() -> None:
    model, frozen, optimizer = _adamw()
    _train(model, optimizer)
    _backward(model, 3)
    with torch.no_grad():
        _parameter(model, "0.weight").fill_(7)
        _parameter(model, "2.weight").mul_(2)
    optimizer.step()
    frozen.assert_frozen()


def test_a_parameter_that_is_frozen_entirely_keeps_its_count_of_steps_alone() -> None:
    model, frozen, optimizer = _run(MAKERS["adamw"], "0.weight = 0.25\n2.bias")
    _train(model, optimizer)
    frozen.assert_frozen()
    for name in ("0.weight", "2.bias"):
        assert _state_numbers(optimizer, _parameter(model, name)) == [0, 0]
        assert optimizer.state[_parameter(model, name)]["step"] == 3
    optimizer.load_state_dict(optimizer.state_dict())
    _train(model, optimizer)
    frozen.assert_frozen()


def test_a_parameter_of_no_dimensions_and_one_without_gradient_are_passed_over() -> None:
    tensors = {
        "scale": nn.Parameter(torch.tensor(2.0)),
        "idle": nn.Parameter(torch.ones(3)),
        "w": nn.Parameter(torch.ones(3)),
    }
    frozen = freeze_entries(tensors, "scale = 0.5\nidle[0] = 2\nw[0] = 2")
    optimizer = MaskedOptimizer(AdamW(tensors.values(), lr=0.1, weight_decay=0.1), frozen, compact=True)
    for _ in range(2):
        (tensors["w"] * tensors["scale"]).sum().backward()
        optimizer.step()
    assert tensors["scale"].item() == 0.5
    assert tensors["idle"].tolist() == [2, 1, 1]
    assert tensors["w"][0] == 2
    assert bool((tensors["w"][1:] != 1).all())
    assert set(optimizer.state) == {tensors["w"], tensors["scale"]}
    assert _state_numbers(optimizer, tensors["scale"]) == [0, 0]


@makers
@pytest.mark.parametrize("way", ["thaw", "remove"])
def test_a_parameter_that_was_frozen_whole_goes_on_as_without_compact(make: Maker, way: str) -> None:
    runs = []
    for compact in (False, True):
        model, frozen, optimizer = _run(make, "0.weight\n2.bias = 1", compact=compact)
        _train(model, optimizer)
        whole = copy.deepcopy(optimizer.state_dict())
        frozen.thaw("*") if way == "thaw" else frozen.remove()
        _train(model, optimizer, 3, 3)
        runs.append((model, whole, optimizer.state_dict()))
    if make is not MAKERS["adamw_fused"]:
        assert _same(runs[0][0], runs[1][0])
        assert _same_state(runs[0][1], runs[1][1])
        assert _same_state(runs[0][2], runs[1][2])
    assert largest_difference(runs[0][0], runs[1][0]) < 1e-5
    assert len(runs[1][1]["state"]) == 4


def test_a_tied_parameter_is_held_whole_beside_compact_ones() -> None:
    runs = []
    for compact in (False, True):
        model = _net()
        frozen = freeze_entries(model, "0 = tied(0, start=first)\n0.weight[:, 2] = 1\n2.weight[0] = 0")
        optimizer = MaskedOptimizer(AdamW(model.parameters(), lr=0.1), frozen, compact=compact)
        _train(model, optimizer)
        optimizer.load_state_dict(optimizer.state_dict(compact=compact))
        _train(model, optimizer)
        frozen.assert_frozen()
        runs.append((model, optimizer))
    assert _same(runs[0][0], runs[1][0])
    assert optimizer.state[_parameter(model, "0.weight")]["exp_avg"].shape == (8, 12)
    assert optimizer.state[_parameter(model, "2.weight")]["exp_avg"].shape == (24,)


# --------------------------------------------------------------------------------------------------------------------
# The hot path


_ALLOCATIONS: Final = {"empty", "empty_like", "empty_strided", "new_empty", "zeros", "zeros_like", "full", "full_like",
                       "clone", "ones_like", "_to_copy", "arange", "where", "nonzero", "scalar_tensor"}  # fmt: skip

_SPECS: Final[dict[str, Any]] = {
    "slice": "0.weight[:, 1] = 0",
    "slice_at_a_number": "0.weight[:, 1] = 0.5",
    "kept_slice": "0.weight[2]",
    "dense": {"0.weight": (_MASK, 0.0)},
    "dense_at_a_number": {"0.weight": (_MASK, 0.5)},
    "kept_dense": {"0.weight": _MASK},
    "scattered": "0.weight[[1, 5], [2, 7]] = 0.5",
}


def _ops_of_a_step(model: nn.Module, optimizer: Optimizer) -> Counter[str]:
    _train(model, optimizer, 2)
    optimizer.zero_grad()
    ops = Ops()
    with ops:
        _backward(model, 2)
        optimizer.step()
    return ops.counts


@pytest.mark.parametrize("spec", _SPECS.values(), ids=_SPECS)
def test_hooks_and_guard_allocate_nothing_and_ask_no_number_of_a_tensor(spec: Any) -> None:
    model, _, optimizer = _run(MAKERS["sgd"], spec, compact=False)
    plain = _net()
    extra = _ops_of_a_step(model, optimizer) - _ops_of_a_step(plain, MAKERS["sgd"](list(plain.parameters())))
    assert not set(extra) & _ALLOCATIONS
    assert not extra["_local_scalar_dense"]


@pytest.mark.parametrize("spec", _SPECS.values(), ids=_SPECS)
def test_a_compact_step_asks_no_number_of_a_tensor_and_reads_no_mask(spec: Any) -> None:
    model, _, optimizer = _run(MAKERS["sgd"], spec)
    plain = _net()
    extra = _ops_of_a_step(model, optimizer) - _ops_of_a_step(plain, MAKERS["sgd"](list(plain.parameters())))
    assert not extra["_local_scalar_dense"] + extra["nonzero"] + extra["equal"] + extra["where"] + extra["index"]


# --------------------------------------------------------------------------------------------------------------------
# Seen from outside


def test_groups_hold_the_model_s_own_parameters_wherever_anyone_looks() -> None:
    model, _, optimizer = _adamw()
    seen: list[list[int]] = []

    def look(opt: Optimizer, *args: Any) -> None:
        assert opt is optimizer.inner
        seen.append([id(parameter) for group in opt.param_groups for parameter in group["params"]])

    optimizer.register_step_pre_hook(look)
    optimizer.register_step_post_hook(look)
    _train(model, optimizer, 2)
    look(optimizer.inner)
    assert seen == [[id(parameter) for parameter in model.parameters()]] * 5
    assert set(optimizer.state) == set(model.parameters())


@pytest.mark.parametrize("before", [True, False], ids=["hooked_before_wrapping", "hooked_after"])
def test_what_step_hooks_do_to_gradients_and_weights_counts(before: bool) -> None:
    def double(opt: Optimizer, *args: Any) -> None:
        for group in opt.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(2)
                parameter.detach().mul_(0.9)

    def shrink(opt: Optimizer, *args: Any) -> None:
        for group in opt.param_groups:
            for parameter in group["params"]:
                parameter.detach().mul_(0.9)

    models = []
    for compact in (False, True):
        model = _net()
        frozen = freeze_entries(model, SPEC)
        optimizer: Optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        for wrap in (False, True) if before else (True, False):
            if wrap:
                optimizer = MaskedOptimizer(optimizer, frozen, compact=compact)
            else:
                optimizer.register_step_pre_hook(double)
                optimizer.register_step_post_hook(shrink)
        _train(model, optimizer)
        model(torch.ones(1, 12))
        frozen.assert_frozen()
        models.append(model)
    assert _same(*models)


def _pass_on(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
    return (optimizer, *args[1:]), kwargs


@makers
@pytest.mark.parametrize("others", [(_pass_on,), (_pass_on, lambda *args: None), (lambda *args: None, _pass_on)])
@pytest.mark.parametrize("before", [True, False], ids=["hooked_before_wrapping", "hooked_after"])
def test_a_step_hook_may_pass_on_the_optimizer(make: Maker, others: tuple[Any, ...], before: bool) -> None:
    expected, _, reference = _run(make)
    model = _net()
    inner = make(list(model.parameters()))
    for hook in others if before else ():
        inner.register_step_pre_hook(hook)
    frozen = freeze_entries(model, SPEC)
    optimizer = MaskedOptimizer(inner, frozen, compact=True)
    handles = [inner.register_step_pre_hook(hook) for hook in (() if before else others)]
    _train(expected, reference)
    _train(model, optimizer)
    frozen.assert_frozen()
    assert _same(model, expected)
    assert _same_state(optimizer.state_dict(), reference.state_dict())
    if not before:
        called = inner._optimizer_step_pre_hooks.values()  # type: ignore[attr-defined]
        assert list(called)[1:] == list(others)
    for handle in handles:
        handle.remove()
    _train(model, optimizer, 1)


def test_a_step_hook_that_raises_leaves_the_others_as_they_were() -> None:
    model, frozen, optimizer = _adamw()
    fails = [True]

    def fail(*args: Any) -> None:
        if fails[0]:
            raise ValueError("as told")

    optimizer.register_step_pre_hook(fail)
    optimizer.register_step_pre_hook(_pass_on)
    _backward(model, 0)
    with pytest.raises(ValueError, match="as told"):
        optimizer.step()
    fails[0] = False
    _train(model, optimizer)
    frozen.assert_frozen()
    assert list(optimizer.inner._optimizer_step_pre_hooks.values())[1:] == [fail, _pass_on]  # type: ignore[attr-defined]


@makers
@pytest.mark.parametrize("part", [slice(None), slice(2, 5)], ids=["all", "some_rows"])
@pytest.mark.parametrize("frozen_both", [False, True], ids=["one_frozen", "both_frozen"])
def test_two_parameters_on_one_storage_hold_as_without_compact(make: Maker, part: slice, frozen_both: bool) -> None:
    runs = []
    for compact in (False, True):
        torch.manual_seed(3)
        first, alone = nn.Parameter(torch.randn(8, 12)), nn.Parameter(torch.randn(4, 6))
        second = nn.Parameter(first.detach()[part])
        tensors = {"first": first, "second": second, "alone": alone}
        spec = "first[:, 1::2] = 0.5\nalone[:, 1] = 0" + ("\nsecond[:, 1::2] = 0.5" if frozen_both else "")
        frozen = freeze_entries(tensors, spec)
        optimizer = MaskedOptimizer(make(list(tensors.values())), frozen, compact=compact)
        for _ in range(4):
            for tensor in tensors.values():
                tensor.grad = torch.randn(tensor.shape)
            optimizer.step()
            frozen.assert_frozen()
        runs.append((first.detach(), alone.detach()))
        if compact:
            assert max(_state_numbers(optimizer, alone)) == 20
    if make is not MAKERS["adamw_fused"]:
        assert all(map(same_bits, *runs))


@pytest.mark.parametrize("compact", [False, True])
def test_a_parameter_may_move_to_the_memory_of_a_frozen_one_in_mid_training(compact: bool) -> None:
    first, second = nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(4, 4))
    frozen = freeze_entries({"first": first, "second": second}, {"first": rand(4, 4, seed=0) < 0.5})
    optimizer = MaskedOptimizer(SGD([first, second], lr=1.0), frozen, compact=compact)
    for step in range(4):
        if step == 2:
            second.data = first.data
        first.grad, second.grad = torch.ones(4, 4), torch.ones(4, 4)
        optimizer.step()
        frozen.assert_frozen()
    assert first.detach()[~frozen["first"].frozen].eq(-6).all()


def test_neighbors_in_one_storage_are_compact() -> None:
    """As the weights of a recurrent layer are on a GPU."""
    storage = torch.randn(40)
    parts = [nn.Parameter(storage[:20].view(4, 5)), nn.Parameter(storage[20:].view(4, 5))]
    frozen = freeze_entries(dict(zip("ab", parts, strict=True)), "a[0] = 0\nb[:, 1] = 0")
    optimizer = MaskedOptimizer(AdamW(parts), frozen, compact=True)
    for part in parts:
        part.grad = torch.ones(4, 5)
    optimizer.step()
    assert [_state_numbers(optimizer, part) for part in parts] == [[15] * 2, [16] * 2]


def test_clipping_sees_and_scales_the_gradients_that_are_stepped() -> None:
    models = []
    for model, _, optimizer in _both():
        for seed in range(3):
            optimizer.zero_grad()
            _backward(model, seed)
            norm = nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 0.1)
            assert norm > 0.1
            nn.utils.clip_grad_value_(model.parameters(), 0.01)
            optimizer.step()
        models.append(model)
    assert _same(*models)


@pytest.mark.parametrize("kind", [SGD, AdamW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_grad_scaler_unscales_and_skips_as_without_compact(kind: Any, fused: bool, device: torch.device) -> None:
    models = []
    for compact in (False, True):
        model, frozen, optimizer = _run(partial(kind, lr=0.05, fused=fused), compact=compact)
        scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
        for seed in range(4):
            optimizer.zero_grad()
            loss = torch.sum((model(randn(6, 12, seed=seed)) - 0.3) ** 2)
            scaler.scale(loss * (torch.inf if seed == 2 else 1)).backward()
            before = [parameter.clone() for parameter in model.parameters()]
            scaler.step(optimizer)
            scaler.update()
            moved = [not same_bits(a, b) for a, b in zip(model.parameters(), before, strict=True)]
            assert moved == [seed != 2] * 4
            frozen.assert_frozen()
        models.append(model)
    assert largest_difference(*models) < 1e-5
    assert fused or _same(*models)


SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=9),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "step": lambda o: lr_scheduler.StepLR(o, 1),
}


@pytest.mark.parametrize("first", [True, False], ids=["made_before_wrapping", "made_after"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_schedules_of_rate_and_momentum_are_followed(schedule: Callable[[Optimizer], Any], first: bool) -> None:
    models = []
    for compact in (False, True):
        model = _net()
        inner = AdamW(model.parameters(), lr=0.05)
        scheduler = schedule(inner) if first else None
        optimizer = MaskedOptimizer(inner, freeze_entries(model, SPEC), compact=compact)
        scheduler = scheduler or schedule(optimizer)
        for seed in range(5):
            _train(model, optimizer, 1, seed)
            scheduler.step()
        models.append(model)
    assert _same(*models)


@pytest.mark.parametrize("kind", [SGD, AdamW], ids=["sgd", "adamw"])
def test_a_tensor_as_rate_is_followed_when_it_is_written_to(kind: Any) -> None:
    models = []
    for compact in (False, True):
        rate = torch.tensor(0.1)
        model, _, optimizer = _run(partial(kind, lr=rate, foreach=False), compact=compact)
        _train(model, optimizer)
        rate.fill_(0.01)
        assert optimizer.param_groups[0]["lr"] is rate
        _train(model, optimizer)
        models.append(model)
    assert _same(*models)


def test_an_added_group_is_compact_from_the_next_step_on() -> None:
    models = []
    for compact in (False, True):
        model = _net()
        frozen = freeze_entries(model, SPEC)
        optimizer = MaskedOptimizer(AdamW(model[0].parameters(), lr=0.05), frozen, compact=compact)
        _train(model, optimizer)
        optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.01})
        optimizer.load_state_dict(optimizer.state_dict(compact=compact))
        _train(model, optimizer)
        frozen.assert_frozen()
        models.append(model)
    assert optimizer.state[_parameter(model, "2.weight")]["exp_avg"].numel() == frozen["2.weight"].free_count
    assert _same(*models)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_is_the_inner_ones(set_to_none: bool) -> None:
    models = []
    for model, _, optimizer in _both():
        for seed in range(3):
            optimizer.zero_grad(set_to_none=set_to_none)
            assert (_parameter(model, "0.weight").grad is None) == (set_to_none or seed == 0)
            _backward(model, seed)
            optimizer.step()
        models.append(model)
    assert _same(*models)


def _closure(model: nn.Module, optimizer: Optimizer, seed: int, fails: bool = False) -> Callable[[], Any]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _backward(model, seed)
        if fails:
            raise ArithmeticError("the batch is bad")
        return loss

    return closure


@makers
def test_closures_are_stepped_by_the_gradients_they_make(make: Maker) -> None:
    models = []
    for compact in (False, True):
        model, frozen, optimizer = _run(make, compact=compact)
        for seed in range(3):
            loss = optimizer.step(_closure(model, optimizer, seed))
            assert isinstance(loss, Tensor)
            frozen.assert_frozen()
        models.append(model)
    assert largest_difference(*models) < 1e-5
    assert make is MAKERS["adamw_fused"] or _same(*models)


def test_closures_count_also_where_the_step_asks_for_its_groups_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam does where there is a GPU, to see whether a graph is captured."""
    checks = ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")  # since torch 2.11; before
    for check in filter(partial(hasattr, AdamW), checks):
        monkeypatch.setattr(AdamW, check, lambda self: len(self.param_groups))
    models = []
    for model, frozen, optimizer in _both():
        for seed in range(4):
            closure = _closure(model, optimizer, seed)

            def scheduled(optimizer: Optimizer = optimizer, closure: Callable[[], Any] = closure) -> Any:
                optimizer.param_groups[0]["steps"] = optimizer.param_groups[0].get("steps", 0) + 1
                return closure()

            optimizer.step(scheduled)
            frozen.assert_frozen()
        assert optimizer.param_groups[0]["steps"] == 4
        models.append(model)
    assert _same(*models)


_LBFGS: Final[Maker] = partial(LBFGS, lr=0.1, max_iter=3, line_search_fn="strong_wolfe")


@pytest.mark.parametrize("make", [*MAKERS.values(), _LBFGS], ids=[*MAKERS, "lbfgs"])
def test_an_error_in_the_closure_leaves_the_optimizer_as_it_was(make: Maker) -> None:
    models = []
    for fails in (False, True):
        model, frozen, optimizer = _run(make)
        for seed in range(2):
            optimizer.step(_closure(model, optimizer, seed))
        if fails:
            before = copy.deepcopy(optimizer.state_dict()) if make is not _LBFGS else None
            with pytest.raises(ArithmeticError, match="the batch is bad"):
                optimizer.step(_closure(model, optimizer, 5, fails=True))
            assert before is None or _same_state(optimizer.state_dict(), before)
            frozen.assert_frozen()
        if make is not _LBFGS:  # which counts its steps before the closure, in torch as here
            optimizer.step(_closure(model, optimizer, 2))
        models.append(model)
    assert _same(*models)


def test_an_error_inside_the_step_leaves_an_optimizer_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model, frozen, optimizer = _run(partial(Adam, lr=0.05, foreach=False))
    _train(model, optimizer)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    _train(model, optimizer, 2, 3)
    expected = copy.deepcopy(model.state_dict())
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    _backward(model, 3)
    with monkeypatch.context() as broken:
        broken.setattr(
            importlib.import_module("torch.optim.adam"), "_single_tensor_adam", lambda *args, **kwargs: 1 / 0
        )
        with pytest.raises(ZeroDivisionError):
            optimizer.step()
    frozen.assert_frozen()
    assert [p for g in optimizer.param_groups for p in g["params"]] == list(model.parameters())
    optimizer.load_state_dict(saved[1])
    _train(model, optimizer, 2, 3)
    assert all(same_bits(model.state_dict()[name], value) for name, value in expected.items())


def test_autograd_counts_a_step_as_a_write() -> None:
    """A graph that was kept over it then fails in backward, as with a plain optimizer."""
    for spec in (SPEC, "0.weight[:4]\n2.weight[:2]"):
        model, _, optimizer = _run(MAKERS["adamw"], spec)
        versions = [parameter._version for parameter in model.parameters()]
        kept = model(torch.randn(2, 12)).tanh().sum()
        _backward(model, 0)
        optimizer.step()
        assert all(parameter._version > before for parameter, before in zip(model.parameters(), versions, strict=True))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            kept.backward()


# --------------------------------------------------------------------------------------------------------------------
# Several handles, thawing, freezing more


@held_twice
def test_two_handles_on_one_parameter_freeze_what_either_does() -> None:
    models = []
    for compact in (False, True):
        model = _net()
        handles = [freeze_entries(model, SPEC), freeze_entries(model, "0.weight[:4] = 0.5\n2.bias[1] = 1")]
        optimizer = MaskedOptimizer(AdamW(model.parameters(), lr=0.05), handles, compact=compact)
        _train(model, optimizer)
        for handle in handles:
            handle.assert_frozen()
        models.append(model)
    assert _same(*models)
    assert optimizer.state[_parameter(model, "0.weight")]["exp_avg"].numel() == 4 * 6


@pytest.mark.parametrize("compact_first", [True, False])
def test_one_compact_guard_makes_the_optimizer_compact_for_all(compact_first: bool) -> None:
    model = _net()
    optimizer = AdamW(model.parameters(), lr=0.05)
    first, second = freeze_entries(model, "0.weight[:, 1] = 0"), freeze_entries(model, "2.weight[0] = 0")
    first.guard(optimizer, compact=compact_first)
    second.guard(optimizer, compact=not compact_first)
    _train(model, optimizer)
    assert optimizer.state[_parameter(model, "0.weight")]["exp_avg"].shape == (88,)
    assert optimizer.state[_parameter(model, "2.weight")]["exp_avg"].shape == (24,)
    optimizer.load_state_dict(optimizer.state_dict())
    first.thaw("0.weight")
    optimizer.load_state_dict(optimizer.state_dict())
    _train(model, optimizer)
    assert optimizer.state[_parameter(model, "0.weight")]["exp_avg"].shape == (8, 12)
    second.assert_frozen()


@held_twice
@pytest.mark.parametrize("kind", ["adamw", "lbfgs"])
def test_a_handle_that_was_let_go_shares_on_its_return_with_those_that_came_meanwhile(kind: str) -> None:
    model = _net()
    make: Maker = MAKERS["adamw"] if kind == "adamw" else _LBFGS
    optimizer = make(list(model.parameters()))
    first, second = freeze_entries(model, "0.weight[:, 1] = 0"), freeze_entries(model, "0.weight[0] = 0")
    first.remove()
    first.guard(optimizer, compact=True)
    second.guard(optimizer)
    optimizer.step(_closure(model, optimizer, 0))
    first.attach()
    for seed in range(3):
        optimizer.step(_closure(model, optimizer, seed))
        optimizer.load_state_dict(optimizer.state_dict())
        first.assert_frozen()
        second.assert_frozen()
    if kind == "adamw":
        assert optimizer.state[_parameter(model, "0.weight")]["exp_avg"].shape == (77,)


def _change(what: str, model: nn.Module, frozen: FrozenEntries, optimizer: MaskedOptimizer) -> list[FrozenEntries]:
    """Change what is frozen in the middle of training; return the handles that hold entries then."""
    if what == "thaw_one":
        frozen.thaw("2.weight")
    elif what == "thaw_all":
        frozen.thaw("*")
    elif what == "remove":
        frozen.remove()
    elif what == "remove_and_attach":
        frozen.remove()
        frozen.attach()
    elif what == "freeze_more":
        more = freeze_entries(model, "0.weight[3:5] = 0.5\n2.bias[0] = 1")
        more.guard(optimizer.inner)
        return [frozen, more]
    elif what == "load_regions":
        frozen.load_state_dict(frozen.state_dict())
    elif what == "load_state":
        optimizer.load_state_dict(optimizer.state_dict())
    elif what == "channels_last":
        _parameter(model, "2.weight").data = _parameter(model, "2.weight").data.T.contiguous().T  # type: ignore[index]
    return [frozen] if frozen.attached else []


_CHANGES = [
    "thaw_one",
    "thaw_all",
    "remove",
    "remove_and_attach",
    "freeze_more",
    "load_regions",
    "load_state",
    "channels_last",
]


@held_twice
@makers
@pytest.mark.parametrize("what", _CHANGES)
def test_what_is_frozen_may_change_in_mid_training_as_without_compact(what: str, make: Maker) -> None:
    """Entries that stay free keep their state, and the others start with fresh state."""
    runs = []
    for compact in (False, True):
        model, frozen, optimizer = _run(make, compact=compact)
        _train(model, optimizer)
        handles = _change(what, model, frozen, optimizer)
        _train(model, optimizer, 3, 3)
        for handle in handles:
            handle.assert_frozen()
        runs.append((model, optimizer))
    if what == "channels_last" and make is MAKERS["adamw_fused"]:
        return  # torch's fused kernels misread a whole state that lies otherwise than its parameter
    (masked, masked_optimizer), (model, optimizer) = runs
    assert largest_difference(model, masked) < 1e-4
    if make is not MAKERS["adamw_fused"]:
        assert _same(model, masked)
        pairs = zip(
            optimizer.state_dict()["state"].values(), masked_optimizer.state_dict()["state"].values(), strict=True
        )
        names = [name for name, _ in model.named_parameters()]
        for name, (ours, theirs) in zip(names, pairs, strict=True):
            for handle in handles:
                for value in (*ours.values(), *theirs.values()):
                    if name in handle and value.ndim:
                        handle[name].zero_(value)  # of the frozen entries the masked run keeps what it never uses
            assert _same_state(ours, theirs)


@pytest.mark.parametrize(
    "make", [partial(Rprop, lr=0.03), partial(Adagrad, initial_accumulator_value=0.25)], ids=["rprop", "adagrad"]
)
@pytest.mark.parametrize("compact", [False, True], ids=["masked", "compact"])
def test_complex_entries_start_anew_as_torch_starts_them(make: Maker, compact: bool) -> None:
    weight = nn.Parameter(torch.randn(8, 12, dtype=torch.complex64))
    frozen = freeze_entries({"weight": weight}, {"weight": _MASK})
    optimizer = MaskedOptimizer(make([weight]), frozen, compact=compact)
    fresh = make([nn.Parameter(weight.detach().clone())])
    for opt in (optimizer, fresh):
        opt.param_groups[0]["params"][0].grad = torch.zeros(8, 12, dtype=torch.complex64)
        opt.step()
    name = "step_size" if isinstance(fresh, Rprop) else "sum"
    started = next(iter(fresh.state.values()))[name]
    assert same_bits(optimizer.state_dict()["state"][0][name], started)


@held_twice
@pytest.mark.parametrize("kind", ["adamw", "lbfgs"])
@pytest.mark.parametrize("change", ["freeze", "thaw", "remove", "load"])
def test_a_closure_may_change_what_is_frozen(kind: str, change: str) -> None:
    """As `training_step` may under Lightning, which calls it inside the optimizer's step."""
    make: Maker = MAKERS["adamw"] if kind == "adamw" else _LBFGS
    model, frozen, optimizer = _run(make)
    handles: list[FrozenEntries] = []

    def closure() -> Any:
        loss = _closure(model, optimizer, 1)()
        if not handles:
            if change == "freeze":
                handles.append(freeze_entries(model, "0.weight[3] = 0.5\n2.bias[0] = 1"))
                handles[0].guard(optimizer.inner)
            elif change == "load":
                optimizer.load_state_dict(optimizer.state_dict())
                handles.append(frozen)
            else:
                frozen.thaw("0.weight") if change == "thaw" else frozen.remove()
                handles.append(freeze_entries(model, ""))
        return loss

    optimizer.step(_closure(model, optimizer, 0))
    for seed in range(3):
        optimizer.step(closure)
        for handle in handles:
            handle.assert_frozen()
        optimizer.step(_closure(model, optimizer, seed))
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    optimizer.load_state_dict(optimizer.state_dict(compact=True))
    optimizer.step(_closure(model, optimizer, 0))


def test_guard_does_without_a_wrapper_what_the_wrapper_does() -> None:
    wrapped, _, outer = _adamw()
    _train(wrapped, outer)
    model = _net()
    optimizer = AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    guard = freeze_entries(model, SPEC).guard(optimizer, compact=True)
    _train(model, optimizer)
    assert _same(model, wrapped)
    assert _same_state(optimizer.state_dict(), outer.state_dict())
    guard.remove()
    assert optimizer.state[_parameter(model, "0.weight")]["exp_avg"].shape == (8, 12)
    hooks = [name for name in vars(optimizer) if name.endswith("_hooks") and vars(optimizer)[name]]
    assert hooks == []
    _train(model, optimizer)


# --------------------------------------------------------------------------------------------------------------------
# Copies and what is saved


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
@held_twice
def test_a_copy_steps_on_its_own_and_alike(make: Maker, copied: Callable[[Any], Any]) -> None:
    model, _, optimizer = _run(make)
    more = freeze_entries(model, "0.weight[3] = 0.5")
    more.guard(optimizer.inner)  # the wrapper does not know of it
    _train(model, optimizer)
    twin, twin_optimizer = copied((model, optimizer))
    before = copy.deepcopy(model.state_dict())
    assert type(twin_optimizer.inner) is type(optimizer.inner)
    _train(twin, twin_optimizer, 2, 5)
    assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())
    _train(model, optimizer, 2, 5)
    twin(torch.ones(1, 12))
    assert largest_difference(twin, model) < 1e-5
    twin_optimizer.frozen[0].assert_frozen()
    weights = _parameter(model, "2.weight"), _parameter(twin, "2.weight")
    assert _state_numbers(twin_optimizer, weights[1]) == _state_numbers(optimizer, weights[0])


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_copy_of_a_guarded_optimizer_is_a_plain_one_with_a_whole_state(
    copied: Callable[[Any], Any], fused: bool
) -> None:
    """A copied optimizer has lost its hooks: nothing would step flat tensors."""
    model = _net()
    optimizer = AdamW(model.parameters(), fused=fused)
    freeze_entries(model, SPEC).guard(optimizer, compact=True)
    _train(model, optimizer)
    twin, twin_optimizer = copied((model, optimizer))
    assert _same_state(twin_optimizer.state_dict(), optimizer.state_dict())
    assert type(twin_optimizer.state) is type(AdamW(model.parameters()).state)
    _train(twin, twin_optimizer)


def _saved(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


_OTHER_SPECS: Final[dict[str, Any]] = {
    "same_rules": SPEC,
    "more": f"{SPEC}\n0.weight[2:4] = 0.5\n0.bias[1:] = 1",
    "fewer": "0.weight[:, 1::2] = 0.5",
    "others": {"2.weight": rand(4, 8, seed=1) < 0.5},
}


@makers
@pytest.mark.parametrize("form", ["plain", "masked", "compact", "compact_dict"])
@pytest.mark.parametrize("spec", _OTHER_SPECS.values(), ids=_OTHER_SPECS)
@pytest.mark.parametrize("into", ["masked", "compact"])
def test_state_goes_from_any_run_into_any_other(make: Maker, form: str, spec: Any, into: str) -> None:
    """Under other rules too: entries that stay free keep their state, and others start with fresh state."""
    if form == "plain":
        source = _net()
        optimizer: Any = make(list(source.parameters()))
    else:
        source, _, optimizer = _run(make, compact=form.startswith("compact"))
    _train(source, optimizer)
    whole = copy.deepcopy(optimizer.state_dict())
    state = _saved(optimizer.state_dict(compact=True) if form == "compact_dict" else optimizer.state_dict())

    model, frozen, target = _run(make, spec, compact=into == "compact")
    expected, _, reference = _run(make, spec, compact=False)
    for m, o, s in ((model, target, state), (expected, reference, whole)):
        m.load_state_dict(source.state_dict())
        o.load_state_dict(s)
        _train(m, o, 2, 6)
    frozen.assert_frozen()
    assert largest_difference(model, expected) < 1e-4
    if make is not MAKERS["adamw_fused"]:
        assert _same(model, expected)


@makers
@pytest.mark.parametrize("form", ["masked", "compact"])
def test_a_plain_optimizer_loads_what_is_saved_by_default(make: Maker, form: str) -> None:
    source, _, optimizer = _run(make, compact=form == "compact")
    _train(source, optimizer)
    model = _net()
    plain = make(list(model.parameters()))
    plain.load_state_dict(_saved(optimizer.state_dict()))
    for index, parameter in enumerate(model.parameters()):
        shapes = {name: v.shape for name, v in plain.state[parameter].items() if isinstance(v, Tensor) and v.ndim}
        assert set(shapes.values()) == {parameter.shape}, index
    _train(model, plain)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_plain_optimizer_refuses_a_compact_state(fused: bool) -> None:
    """Otherwise its fused kernels would write beyond the ends of the flat tensors."""
    model, _, optimizer = _adamw(fused=fused)
    _train(model, optimizer)
    plain = AdamW(_net().parameters(), fused=fused)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        plain.load_state_dict(optimizer.state_dict(compact=True))
    assert not plain.state


def test_a_compact_state_is_as_small_as_it_is_in_memory_and_loads_with_weights_only() -> None:
    embedding, optimizer = _embedding()
    _step_embedding(embedding, optimizer)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(compact=True), buffer)
    assert buffer.tell() < 10_000
    again_embedding, again = _embedding()
    again.load_state_dict(_saved(optimizer.state_dict(compact=True)))
    assert again.state[again_embedding.weight]["exp_avg"].shape == (160,)
    assert _same_state(again.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("compact", [False, True], ids=["whole", "compact"])
def test_lbfgs_goes_on_from_what_it_saved(compact: bool) -> None:
    model, _, optimizer = _run(_LBFGS)
    for seed in range(3):
        optimizer.step(_closure(model, optimizer, seed))
    twin, _, again = _run(_LBFGS)
    twin.load_state_dict(model.state_dict())
    again.load_state_dict(_saved(optimizer.state_dict(compact=compact)))
    for m, o in ((model, optimizer), (twin, again)):
        assert o.state[_parameter(m, "0.weight")]["old_dirs"]
        o.step(_closure(m, o, 4))
    assert _same(model, twin)


def test_a_state_that_is_set_by_hand_is_a_whole_one_and_a_flat_one_is_refused() -> None:
    model, _, optimizer = _adamw()
    _train(model, optimizer)
    weight, flat = _parameter(model, "0.weight"), dict(optimizer.state)
    optimizer.state = {
        weight: {"step": torch.tensor(1.0), "exp_avg": torch.ones(8, 12), "exp_avg_sq": torch.ones(8, 12)}
    }
    _train(model, optimizer, 1)
    assert _state_numbers(optimizer, weight) == [48, 48]
    assert optimizer.state[weight]["step"] == 2
    optimizer.state = flat
    with pytest.raises(StateMismatchError, match=r"`exp_avg` has shape \(48,\) for a parameter of shape \(8, 12\)"):
        optimizer.step()


def test_saving_changes_nothing() -> None:
    models = []
    for saves in (False, True):
        model, _, optimizer = _adamw()
        for seed in range(3):
            _train(model, optimizer, 1, seed)
            if saves:
                optimizer.state_dict()
                optimizer.state_dict(compact=True)
        models.append(model)
    assert _same(*models)


def test_compact_is_the_default_form_where_nothing_is_compact() -> None:
    model, _, optimizer = _adamw(compact=False)
    _train(model, optimizer)
    assert _same_state(optimizer.state_dict(compact=True), optimizer.state_dict())
    assert _same_state(
        MaskedOptimizer(AdamW(model.parameters()), ()).state_dict(compact=True), AdamW(model.parameters()).state_dict()
    )


def test_user_s_own_hooks_see_the_state_whole() -> None:
    model = _net()
    inner = AdamW(model.parameters())
    seen: list[torch.Size] = []
    inner.register_state_dict_post_hook(lambda o, s: seen.append(s["state"][0]["exp_avg"].shape))
    optimizer = MaskedOptimizer(inner, freeze_entries(model, SPEC), compact=True)
    _train(model, optimizer, 1)
    optimizer.register_state_dict_post_hook(lambda o, s: seen.append(s["state"][0]["exp_avg"].shape))
    optimizer.state_dict()
    assert seen == [(8, 12)] * 2


def _reverse(state: dict[str, Any]) -> None:
    state["state"] = {3 - index: item for index, item in state["state"].items()}
    description = state["freezehooks"]
    description["parameters"] = {3 - index: item for index, item in description["parameters"].items()}


def _corrupt(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        state["freezehooks"][key] = value

    return change


def _cut(state: dict[str, Any]) -> None:
    state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"][:-1]


_UNREADABLE: Final = (
    r"the compact optimizer state cannot be read \(.*\); pass what MaskedOptimizer.state_dict\(compact=T"
)


@pytest.mark.parametrize(("change", "message"), [
    (_reverse, r"the compact optimizer state is of a parameter of shape \(8, 12\), found \(4,\) in its place; give"),
    (_corrupt("format", 3), "the compact optimizer state has format 3, expected 2; load it with the version of"),
    (_corrupt("parameters", {0: {"shape": [8, 12]}}), _UNREADABLE),
    (_corrupt("parameters", {9: {}}), _UNREADABLE),
    (_corrupt("parameters", None), _UNREADABLE),
    (_corrupt("parameters", {0: {"shape": [8, 12], "frozen": [{}]}}), _UNREADABLE),
    (_corrupt("parameters", {}), r"the optimizer's `exp_avg` has shape \(48,\) for a parameter of shape \(8, 12\)"),
    (_cut, r"the optimizer's `exp_avg` has shape \(47,\) for a parameter of shape \(8, 12\), expected \(48,\); use"),
], ids=["order", "format", "half", "no_such_parameter", "none", "no_region", "not_described", "cut"])  # fmt: skip
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(
    change: Callable[[dict[str, Any]], None], message: str
) -> None:
    model, _, optimizer = _adamw()
    _train(model, optimizer)
    state = copy.deepcopy(optimizer.state_dict(compact=True))
    before = copy.deepcopy(optimizer.state_dict())
    change(state)
    with pytest.raises(StateMismatchError, match=message):
        optimizer.load_state_dict(state)
    assert _same_state(optimizer.state_dict(), before)
    _train(model, optimizer)


def test_a_flat_state_without_its_description_is_refused_when_compact_begins() -> None:
    model, frozen, optimizer = _adamw()
    _train(model, optimizer)
    plain = AdamW(model.parameters())
    for parameter in model.parameters():
        plain.state[parameter] = dict(optimizer.state[parameter])
    with pytest.raises(
        StateMismatchError, match=r"the optimizer's `exp_avg` has shape \(48,\) for a parameter of shape"
    ):
        frozen.guard(plain, compact=True)
    assert not any(value for name, value in vars(plain).items() if name.endswith("_hooks"))


# --------------------------------------------------------------------------------------------------------------------
# What is refused


class _OwnStep(SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class _Renamed(AdamW):
    """Changes nothing of the step."""


_REFUSED: dict[str, tuple[Maker, str]] = {
    "adafactor": (
        Adafactor,
        "`Adafactor` cannot be compacted to the free entries: it keeps one number for each row and col",
    ),
    "sparse_adam": (SparseAdam, "`SparseAdam` cannot be compacted to the free entries: it takes sparse gradients"),
    "own_step": (
        _OwnStep,
        "`_OwnStep` cannot be compacted to the free entries: it is not known to work entry by entry; leave",
    ),
    "differentiable": (
        partial(Adam, differentiable=True),
        r"`Adam\(differentiable=True\)` cannot be compacted to the free entries: its step is in a graph; leave out",
    ),
}
if hasattr(torch.optim, "Muon"):  # torch 2.9
    _REFUSED["muon"] = (
        torch.optim.Muon,
        "`Muon` cannot be compacted to the free entries: it orthogonalizes the update of a whole",
    )


@pytest.mark.parametrize(("make", "message"), _REFUSED.values(), ids=_REFUSED)
@pytest.mark.parametrize("way", ["wrap", "guard"])
def test_an_optimizer_that_cannot_be_compact_is_refused_before_anything_is_installed(
    make: Maker, message: str, way: str
) -> None:
    model = nn.Linear(4, 3, bias=False)
    frozen = freeze_entries(model, "weight[0] = 0")
    optimizer = make(list(model.parameters()))
    with pytest.raises(UnsupportedOptimizerError, match=message):
        MaskedOptimizer(optimizer, frozen, compact=True) if way == "wrap" else frozen.guard(optimizer, compact=True)
    assert not any(value for name, value in vars(optimizer).items() if name.endswith("_hooks"))
    frozen.remove()
    frozen.attach()
    assert not any(value for name, value in vars(optimizer).items() if name.endswith("_hooks"))


def test_the_refusal_names_every_optimizer_that_is_taken() -> None:
    model = nn.Linear(4, 3)
    with pytest.raises(UnsupportedOptimizerError, match=r"SGD, Adam, AdamW, .*, Rprop, LBFGS"):
        MaskedOptimizer(Adafactor(model.parameters()), freeze_entries(model, "weight[0]"), compact=True)


def test_a_subclass_that_steps_alike_is_taken() -> None:
    model, frozen, optimizer = _run(partial(_Renamed, lr=0.05, weight_decay=0.1))
    other, _, reference = _adamw()
    _train(model, optimizer)
    _train(other, reference)
    assert _same(model, other)
    assert optimizer.state[_parameter(model, "0.weight")]["exp_avg"].numel() == frozen["0.weight"].free_count


def test_a_sparse_gradient_is_refused_and_the_optimizer_goes_on_with_a_dense_one() -> None:
    embedding = nn.Embedding(10, 3, sparse=True)
    frozen = freeze_entries(embedding, "weight[:6]")
    optimizer = MaskedOptimizer(SGD(embedding.parameters(), lr=0.1), frozen, compact=True)
    embedding(torch.tensor([1, 7])).sum().backward()
    message = "`weight` has a gradient of layout torch.sparse_coo, and compact=True needs dense ones; make the layer"
    with pytest.raises(UnsupportedParameterError, match=message):
        optimizer.step()
    embedding.weight.grad = torch.ones(10, 3)
    before = embedding.weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(embedding.weight[6:], before[6:] - 0.1)
    frozen.assert_frozen()


# --------------------------------------------------------------------------------------------------------------------
# Beside other tools


@pytest.fixture
def _no_warning_of_others() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.usefixtures("_no_warning_of_others")
@pytest.mark.parametrize("what", ["step", "model"])
def test_a_compiled_step_or_model_trains_alike(what: str) -> None:
    torch.compiler.reset()
    reference, _, plain = _adamw()
    model, frozen, optimizer = _adamw()
    forward = torch.compile(model, backend="aot_eager") if what == "model" else model
    step = torch.compile(optimizer.step, backend="aot_eager") if what == "step" else optimizer.step
    for seed in range(3):
        optimizer.zero_grad()
        _backward(forward, seed)
        step()
        frozen.assert_frozen()
    _train(reference, plain)
    assert largest_difference(model, reference) < 1e-5
    assert optimizer.state[_parameter(model, "0.weight")]["exp_avg"].ndim == 1


def test_two_threads_train_a_model_each(device: torch.device) -> None:
    results: dict[int, nn.Module] = {}

    def train(number: int) -> None:
        model, _, optimizer = runs[number]
        with default(device):
            _train(model, optimizer, 20)
        results[number] = model

    runs = [_adamw(), _adamw()]
    threads = [threading.Thread(target=train, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert _same(results[0], results[1])


def test_an_optimizer_is_collected_with_its_state_while_the_handle_lives() -> None:
    model = _net()
    frozen = freeze_entries(model, SPEC)
    optimizer = AdamW(model.parameters())
    frozen.guard(optimizer, compact=True)
    _train(model, optimizer)
    watched = [weakref.ref(optimizer), weakref.ref(optimizer.state[_parameter(model, "0.weight")]["exp_avg"])]
    del optimizer
    gc.collect()
    assert [reference() for reference in watched] == [None, None]
    frozen.assert_frozen(guarded=False)


def test_steps_leave_no_tensors_behind() -> None:
    model, _, optimizer = _adamw()
    _train(model, optimizer)

    def tensors() -> list[Any]:
        optimizer.zero_grad()
        gc.collect()
        return [found for found in gc.get_objects() if type(found) in (Tensor, nn.Parameter)]

    before = tensors()  # which are kept, so that none of another test's goes meanwhile
    _train(model, optimizer, 5)
    assert len(tensors()) == len(before)


def test_averaged_models_of_swa_utils_hold() -> None:
    model, frozen, optimizer = _adamw()
    average = torch.optim.swa_utils.AveragedModel(model)
    schedule = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.01)
    for seed in range(3):
        _train(model, optimizer, 1, seed)
        average.update_parameters(model)
        schedule.step()
    for name, part in frozen.items():
        assert same_bits(average.module.get_parameter(name)[part.frozen], model.get_parameter(name)[part.frozen])


@pytest.mark.usefixtures("_no_warning_of_others")
@pytest.mark.parametrize("from_compact", [False, True], ids=["from_masked", "from_compact"])
def test_distributed_checkpoints_carry_the_state_in_either_direction(from_compact: bool) -> None:
    dcp = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    source, _, saving = _adamw(compact=from_compact)
    _train(source, saving)
    state = copy.deepcopy(dcp.get_optimizer_state_dict(source, saving))
    assert state["state"]["0.weight"]["exp_avg"].shape == (8, 12)
    model, frozen, optimizer = _adamw(compact=not from_compact)
    model.load_state_dict(source.state_dict())
    dcp.set_optimizer_state_dict(model, optimizer, state)
    for m, o in ((source, saving), (model, optimizer)):
        _train(m, o, 2, 5)
    assert _same(source, model)
    frozen.assert_frozen()


@pytest.mark.usefixtures("_no_warning_of_others")
@on_cpu("Accelerate chooses the device")
def test_accelerate_prepares_it() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    models = []
    for model, frozen, optimizer in _both():
        prepared, outer = accelerator.prepare(model, optimizer)
        for seed in range(3):
            outer.zero_grad()
            batch = randn(6, 12, seed=seed)
            accelerator.backward(torch.sum((prepared(batch) - 0.3) ** 2))
            accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            outer.step()
            frozen.assert_frozen()
        models.append(model)
    assert _same(*models)
    assert optimizer.state[_parameter(model, "0.weight")]["exp_avg"].ndim == 1


class _Batches(torch.utils.data.Dataset[Tensor]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        return randn(12, seed=index)


def _fit(
    directory: Path, epochs: int, checkpoint: Path | None = None, *, compact: bool = True
) -> tuple[nn.Module, Any]:
    lightning: Any = pytest.importorskip("lightning.pytorch")
    callbacks = pytest.importorskip("freezehooks.integrations.lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]  # untyped
        def __init__(self) -> None:
            super().__init__()
            self.net = _net()

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return torch.sum((self.net(batch) - 0.3) ** 2)

        def configure_optimizers(self) -> Any:
            optimizer = AdamW(self.parameters(), lr=0.05, weight_decay=0.1)
            return [optimizer], [lr_scheduler.StepLR(optimizer, 1, 0.5)]

    module = Module()
    callback = callbacks.FreezeEntries([f"net.{rule}" for rule in SPEC.split("\n")], compact=compact)
    trainer = lightning.Trainer(
        max_epochs=epochs, callbacks=[callback], default_root_dir=directory, accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(_Batches(), batch_size=4), ckpt_path=checkpoint)
    return module.net, trainer


@pytest.mark.usefixtures("_no_warning_of_others")
def test_a_lightning_fit_that_is_resumed_equals_one_that_was_not_interrupted(tmp_path: Path) -> None:
    whole, _ = _fit(tmp_path, 4)
    masked, _ = _fit(tmp_path, 4, compact=False)
    _, trainer = _fit(tmp_path, 2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    state = torch.load(tmp_path / "half.ckpt", weights_only=True)["optimizer_states"][0]
    assert state["state"][0]["exp_avg"].shape == (8, 12)
    resumed, _ = _fit(tmp_path, 4, tmp_path / "half.ckpt")
    assert _same(whole, resumed)
    assert _same(whole, masked)


def test_a_parameter_that_was_replaced_is_stepped_whole_after_a_load() -> None:
    model: Any = nn.Linear(3, 2)
    frozen = freeze_entries(model, "weight[:, -1] = 0")
    optimizer = AdamW(model.parameters())
    frozen.guard(optimizer, compact=True)
    before = model.weight
    for _ in range(2):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        model.weight = nn.Parameter(torch.rand(2, 3) * torch.tensor([1.0, 1.0, 0.0]))
        optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[before]["exp_avg"].shape == (2, 3)


def test_a_guard_that_is_asked_for_while_nothing_is_held_is_compact_afterwards() -> None:
    model = nn.Linear(3, 2)
    frozen = freeze_entries(model, "weight[:, -1] = 0")
    frozen.remove()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    MaskedOptimizer(optimizer, frozen)
    frozen.guard(optimizer, compact=True)
    frozen.attach()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert optimizer.state[model.weight]["momentum_buffer"].shape == (4,)
