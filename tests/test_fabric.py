"""Freezing in Lightning Fabric: names, the plain loop bit for bit, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from freezehooks import FrozenEntries, MaskedOptimizer, TargetError, freeze_entries, train_only

from .claims import assert_entries_hold, assert_gradients_clean, assert_model_holds, same_bits
from .plain_loop import PLAIN, SPEC, adamw, batch, net
from .zoo import Held

fabric_module = pytest.importorskip("lightning.fabric")

PREFIXES = ("", "_forward_module.", "_original_module.")


def _fabric(**options: Any) -> Any:
    return fabric_module.Fabric(accelerator="cpu", devices=1, **options)


def _held(frozen: FrozenEntries) -> dict[str, Held]:
    held = {}
    for name, part in frozen.items():
        values = torch.zeros(part.shape)
        values[part.frozen] = part.values
        held[name.removeprefix(PREFIXES[1])] = Held(part.frozen, values)
    return held


def _wrapped_before(fabric: Any, plain: nn.Module, spec: str, *, compact: bool) -> tuple[Any, Any, FrozenEntries]:
    frozen = freeze_entries(plain, spec)
    return *fabric.setup(plain, MaskedOptimizer(adamw(plain), frozen, compact=compact)), frozen


def _guarded_after(fabric: Any, plain: nn.Module, spec: str, *, compact: bool) -> tuple[Any, Any, FrozenEntries]:
    model, optimizer = fabric.setup(plain, adamw(plain))
    frozen = freeze_entries(model, spec)
    frozen.guard(optimizer, compact=compact)
    return model, optimizer, frozen


def _wrapped_after(fabric: Any, plain: nn.Module, spec: str, *, compact: bool) -> tuple[Any, Any, FrozenEntries]:
    model = fabric.setup_module(plain)
    frozen = freeze_entries(model, spec)
    return model, fabric.setup_optimizers(MaskedOptimizer(adamw(plain), frozen, compact=compact)), frozen


Way = Callable[..., tuple[Any, Any, FrozenEntries]]
ways = pytest.mark.parametrize("way", [_wrapped_before, _guarded_after, _wrapped_after])
compactness = pytest.mark.parametrize("compact", [False, True], ids=["masked", "compact"])


def _train(fabric: Any, model: Any, optimizer: Any, steps: range) -> None:
    for step in steps:
        for half in (0, 1):
            with fabric.no_backward_sync(model, enabled=half == 0):
                fabric.backward(model(batch(2 * step + half)).square().mean())
        fabric.clip_gradients(model, optimizer, max_norm=0.5, error_if_nonfinite=False)
        optimizer.step()
        optimizer.zero_grad()


def _trained_plainly(steps: int, spec: str, *, compact: bool) -> nn.Module:
    model = net()
    optimizer = MaskedOptimizer(adamw(model), freeze_entries(model, spec), compact=compact)
    for step in range(steps):
        for half in (0, 1):
            model(batch(2 * step + half)).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return model


def _equal(first: nn.Module, second: nn.Module) -> bool:
    return all(same_bits(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@ways
@compactness
def test_it_trains_as_the_plain_loop_bit_for_bit(way: Way, compact: bool) -> None:
    fabric = _fabric()
    model, optimizer, frozen = way(fabric, net(), SPEC, compact=compact)
    held = _held(frozen)
    for step in range(4):
        _train(fabric, model, optimizer, range(step, step + 1))
        assert_model_holds(model.module, held, "after the step")
        assert_entries_hold(model.state_dict(), held, "in state_dict()")
        frozen.assert_frozen()
    assert _equal(model, _trained_plainly(4, SPEC, compact=compact))
    fabric.backward(model(batch(0)).sum())
    assert_gradients_clean(model.module, held)


@ways
@compactness
@pytest.mark.parametrize(
    ("order", "spec"),
    [(("frozen", "model", "optimizer"), SPEC), (("model", "optimizer", "frozen"), PLAIN)],
    ids=["frozen_first", "frozen_last"],
)
def test_a_handle_in_the_checkpoint_resumes_bit_for_bit(
    way: Way, compact: bool, order: tuple[str, ...], spec: str, tmp_path: Path
) -> None:
    fabric = _fabric()

    def state(seed: int) -> dict[str, Any]:
        model, optimizer, frozen = way(fabric, net(seed), spec, compact=compact)
        parts = {"model": model, "optimizer": optimizer, "frozen": frozen}
        return {**{name: parts[name] for name in order}, "step": 0}

    first, second = state(3), state(4)
    _train(fabric, first["model"], first["optimizer"], range(2))
    fabric.save(tmp_path / "run.ckpt", {**first, "step": 2})
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert list(saved["model"]) == list(net().state_dict())
    assert not _equal(second["model"], first["model"])
    assert fabric.load(tmp_path / "run.ckpt", second) == {}
    assert second["step"] == 2
    assert _equal(second["model"], first["model"])
    _train(fabric, second["model"], second["optimizer"], range(2, 4))
    assert _equal(second["model"], _trained_plainly(4, spec, compact=compact))


@pytest.mark.parametrize("prefix", PREFIXES)
def test_names_may_have_those_of_fabric_or_not(prefix: str) -> None:
    model = _fabric().setup_module(net())
    rules = f"{prefix}0.weight[0] = 1\n{prefix}2 = 1\n{prefix}*.bias\n{prefix}*(Linear).weight[0, 0] = 1"
    frozen = freeze_entries(model, rules)
    assert len(frozen) == 4
    for name in PREFIXES:
        assert f"{name}0.weight" in frozen
        assert frozen[f"{name}2.weight"].frozen.all()
    assert model.module[0].weight[0].tolist() == [1] * 4
    frozen.thaw(f"{prefix}0.bias")
    assert len(frozen) == 3


def test_a_name_that_is_none_is_refused() -> None:
    with pytest.raises(TargetError, match=r"`_forward_module\.7\.weight` is not a parameter of the model"):
        freeze_entries(_fabric().setup_module(net()), "_forward_module.7.weight")


@contextmanager
def _process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        dist.destroy_process_group()


def _data_parallel(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def _compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize(
    ("wrap", "inside"), [(_data_parallel, "module."), (_compiled, "_orig_mod.")], ids=["ddp", "compiled"]
)
@pytest.mark.parametrize("written", [True, False], ids=["written", "left_out"])
def test_wrappers_below_fabric_s_may_be_left_out_too(
    wrap: Callable[[nn.Module], Any], inside: str, written: bool, tmp_path: Path
) -> None:
    with _process_group():
        fabric, plain = _fabric(), net()
        model, optimizer = fabric.setup(wrap(plain), adamw(plain))
        name = f"_forward_module.{inside}0.weight"
        assert name in dict(model.named_parameters(remove_duplicate=False))
        frozen = freeze_entries(model, f"{name if written else '0.weight'}[0] = 0.5")
        frozen.guard(optimizer)
        fabric.backward(model(batch(0)).sum())
        optimizer.step()
        frozen.assert_frozen()
        assert plain[0].weight[0].tolist() == [0.5] * 4  # type: ignore[index]
        fabric.save(tmp_path / "run.ckpt", {"frozen": frozen})
    other = net()
    state = torch.load(tmp_path / "run.ckpt", weights_only=True)["frozen"]
    again = freeze_entries(other, "0.weight[0] = 0.5", state=state)  # in a plain model
    again.load_state_dict(state)
    assert list(again) == ["0.weight"]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_entries_hold_in_other_precisions(precision: str) -> None:
    fabric, plain = _fabric(precision=precision), net()
    frozen = freeze_entries(plain, SPEC)
    model, optimizer = fabric.setup(plain, MaskedOptimizer(adamw(plain), frozen))
    for step in range(3):
        fabric.backward(model(batch(step).to(model.module[0].weight.dtype)).sum())
        optimizer.step()
        frozen.assert_frozen()


def test_what_trains_alone_is_named_without_fabric_s_names() -> None:
    model = _fabric().setup_module(net())
    frozen = train_only(model, "2.weight[0]")
    assert [name for name, each in model.module.named_parameters() if each.requires_grad] == ["2.weight"]
    assert frozen["2.weight"].free_count == 6
