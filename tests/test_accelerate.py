"""Freezing with Accelerate: its loaders, a handle in its checkpoints, and equality with the plain loop."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from freezehooks import FrozenEntries, MaskedOptimizer, ParameterChangedError, UnguardedError, freeze_entries

from .claims import assert_gradients_clean, assert_model_holds, same_bits
from .plain_loop import PLAIN, SPEC, adamw, batch, net
from .zoo import Held

accelerate = pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def _equal(first: nn.Module, second: nn.Module) -> bool:
    return all(same_bits(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


# --------------------------------------------------------------------------------------------------------------------
# Its loop and its checkpoints

Run = tuple[Any, Any, Any, FrozenEntries]


def _wrapped(spec: str, seed: int, state: Any, *, compact: bool) -> Run:
    accelerator, model = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2), net(seed)
    frozen = freeze_entries(model, spec, state=state)
    accelerator.register_for_checkpointing(frozen)
    return accelerator, *accelerator.prepare(model, MaskedOptimizer(adamw(model), frozen, compact=compact)), frozen


def _guarded(spec: str, seed: int, state: Any, *, compact: bool) -> Run:
    accelerator, model = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2), net(seed)
    model, optimizer = accelerator.prepare(model, adamw(model))
    frozen = freeze_entries(model, spec, state=state)
    frozen.guard(optimizer, compact=compact)
    accelerator.register_for_checkpointing(frozen)
    return accelerator, model, optimizer, frozen


Way = Callable[..., Run]
ways = pytest.mark.parametrize("way", [_wrapped, _guarded])
compactness = pytest.mark.parametrize("compact", [False, True], ids=["masked", "compact"])


def _train(run: Run, steps: range) -> None:
    accelerator, model, optimizer, frozen = run
    for step in steps:
        for half in (0, 1):
            with accelerator.accumulate(model):
                accelerator.backward(model(batch(2 * step + half)).square().mean())
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
                frozen.assert_frozen()


def _trained_plainly(steps: int, spec: str, *, compact: bool) -> nn.Module:
    model = net()
    optimizer = MaskedOptimizer(adamw(model), freeze_entries(model, spec), compact=compact)
    for step in range(steps):
        for half in (0, 1):
            (model(batch(2 * step + half)).square().mean() / 2).backward()
            if half == 1:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return model


@ways
@compactness
@pytest.mark.parametrize("chosen", [False, True], ids=["written", "chosen_by_numbers"])
def test_a_registered_handle_resumes_as_the_plain_loop_bit_for_bit(
    way: Way, compact: bool, chosen: bool, tmp_path: Path
) -> None:
    spec = SPEC if chosen else PLAIN
    first = way(spec, 3, None, compact=compact)
    _train(first, range(2))
    first[0].save_state(str(tmp_path))
    state = torch.load(tmp_path / "custom_checkpoint_0.pkl", weights_only=True)
    _train(first, range(2, 4))
    assert _equal(first[1], _trained_plainly(4, spec, compact=compact))

    second = way(spec, 4, state if chosen else None, compact=compact)
    assert not _equal(second[1], first[1])
    second[0].load_state(str(tmp_path))
    _train(second, range(2, 4))
    assert _equal(second[1], first[1])
    second[0].backward(second[1](batch(0)).sum())
    held = {name: Held(part.frozen, second[1].get_parameter(name).detach().clone()) for name, part in second[3].items()}
    assert_gradients_clean(second[1], held)


# --------------------------------------------------------------------------------------------------------------------
# Big models: loading with a device map


def _tied(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 6, bias=False))
    model[3].weight = model[0].weight
    nn.init.normal_(model[2].running_mean)  # type: ignore[arg-type]
    return model


def _as_bin(model: nn.Module, folder: Path) -> Path:
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def _as_safetensors(model: nn.Module, folder: Path) -> Path:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return folder / "model.safetensors"


def _in_shards(model: nn.Module, folder: Path) -> Path:
    items = list(model.state_dict().items())
    shards = {"1.bin": dict(items[:2]), "2.bin": dict(items[2:])}
    for name, tensors in shards.items():
        torch.save(tensors, folder / name)
    weights = {key: name for name, tensors in shards.items() for key in tensors}
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    return index


RULES = "0.weight[0]\n0.weight[1] = 0.5\n1.weight[0] = 0.25\n1.bias\n2.running_mean[:2]\n2.running_mean[2] = 3"


@pytest.mark.filterwarnings("ignore:.* was replaced by another parameter")  # said where a rule holds a number
@pytest.mark.parametrize("save", [_as_bin, _as_safetensors, _in_shards])
@pytest.mark.parametrize(
    "device_map", [None, {"": "cpu"}, dict.fromkeys("0123", "cpu")], ids=["no_map", "whole", "by_module"]
)
def test_loading_with_a_device_map_is_followed_as_a_load_is(
    save: Callable[[nn.Module, Path], Path], device_map: Any, tmp_path: Path
) -> None:
    came, model = _tied(1), _tied(2)
    frozen = freeze_entries(model, RULES)
    accelerate.load_checkpoint_in_model(model, str(save(came, tmp_path)), device_map=device_map)
    if model[3].weight is not model[0].weight:  # type: ignore[index]  # a file without the second name
        model[3].weight = model[0].weight  # type: ignore[index]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    frozen.guard(optimizer)
    tables, means = came[0].weight.detach().clone(), came[2].running_mean.clone()  # type: ignore[index]
    tables[1], means[2] = 0.5, 3
    weight = torch.full((4, 4), 0.25)
    rows = torch.arange(4).view(4, 1).expand(4, 4) == 0
    held = {
        "0.weight": Held(torch.arange(6).view(6, 1).expand(6, 4) < 2, tables),
        "1.weight": Held(rows, weight),
        "1.bias": Held(torch.ones(4, dtype=torch.bool), came[1].bias.detach().clone()),  # type: ignore[index]
    }
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.tensor([0, 1, 2, 3])).square().sum().backward()
        assert_gradients_clean(model, held)
        optimizer.step()
        assert_model_holds(model, held, "after the step")
        frozen.assert_frozen()
    assert same_bits(model.state_dict()["2.running_mean"][:3], means[:3])
    assert not torch.equal(model[0].weight[2:], came[0].weight[2:])  # type: ignore[index]


def test_an_optimizer_of_the_parameters_before_the_load_is_not_taken_for_one_that_guards(tmp_path: Path) -> None:
    model = net()
    frozen = freeze_entries(model, "0.bias")
    frozen.guard(adamw(model))
    accelerate.load_checkpoint_in_model(model, str(_as_bin(net(4), tmp_path)), device_map={"": "cpu"})
    with pytest.raises(UnguardedError, match=r"missing is .*a guarded optimizer of `0\.bias`"):
        frozen.assert_frozen()


def test_weights_that_lie_on_the_disk_are_reported(tmp_path: Path) -> None:
    model = net()
    frozen = freeze_entries(model, "0.bias")
    path, places = str(_as_bin(net(4), tmp_path)), {"0": "disk", "1": "cpu", "2": "cpu"}
    accelerate.load_checkpoint_in_model(model, path, device_map=places, offload_folder=str(tmp_path / "disk"))
    with pytest.raises(ParameterChangedError, match=r"`0\.bias` is on the meta device and has no numbers"):
        frozen.assert_frozen()
