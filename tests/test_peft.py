"""PEFT trains a copy of a module beside the frozen one (`modules_to_save`), and merges low-rank updates."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from freezehooks import (
    FrozenEntries,
    MaskedOptimizer,
    OptimizerMismatchError,
    TargetError,
    freeze_entries,
    train_only,
)

from .claims import assert_model_holds, same_bits
from .trainers import HuggingFace
from .zoo import Held

peft = pytest.importorskip("peft")

COPY = "base_model.model.head.modules_to_save.default.weight"
ORIGINAL = "base_model.model.head.original_module.weight"


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.body(x))


def _adapted(model: nn.Module) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["body"], modules_to_save=["head"]))


def _optimizer(model: nn.Module) -> Optimizer:
    return AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)


def _train(model: Any, optimizer: Optimizer, check: Callable[[], Any]) -> None:
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
        check()


def _frozen_before(optimizer_of: Callable[[Optimizer, tuple[FrozenEntries, ...]], Optimizer]) -> tuple[Any, Optimizer]:
    base = _Net()
    freeze_entries(base, "head[0] = 0.5")
    model = _adapted(base)
    return model, optimizer_of(_optimizer(model), FrozenEntries.of(model))


def _guard_each(optimizer: Optimizer, handles: Iterable[FrozenEntries]) -> Optimizer:
    for handle in handles:
        handle.guard(optimizer)
    return optimizer


@pytest.mark.parametrize("target", ["head", "head.weight", "base_model.model.head", COPY])
@pytest.mark.parametrize("compact", [False, True])
def test_the_copy_that_trains_is_held_under_the_names_of_the_plain_model(target: str, compact: bool) -> None:
    model = _adapted(_Net())
    frozen = freeze_entries(model, f"{target}[0] = 0.5")
    weight = model.get_parameter(COPY)
    before = weight[1:].detach().clone()
    _train(model, MaskedOptimizer(_optimizer(model), frozen, compact=compact), frozen.assert_frozen)
    assert list(frozen) == [COPY]
    assert bool((weight[0] == 0.5).all())
    assert bool((weight[1:] != before).all())


@pytest.mark.parametrize("guard", [MaskedOptimizer, _guard_each], ids=["masked", "guard"])
def test_a_model_that_was_frozen_before_is_guarded_by_the_handles_that_are_found_in_it(guard: Any) -> None:
    model, optimizer = _frozen_before(guard)
    weight = model.get_parameter(COPY)

    def check() -> None:
        assert bool((weight[0] == 0.5).all())
        for handle in FrozenEntries.of(model):
            handle.assert_frozen()

    _train(model, optimizer, check)


def test_the_handle_of_the_original_refuses_an_optimizer_that_steps_its_copy() -> None:
    base = _Net()
    frozen = freeze_entries(base, "head[0] = 0.5")
    model = _adapted(base)
    with pytest.raises(
        OptimizerMismatchError, match=r"but copies of them .* guard those: MaskedOptimizer\(optimizer, Fr"
    ):
        frozen.guard(_optimizer(model))


def test_names_are_those_of_the_model_that_is_asked_about() -> None:
    base = _Net()
    frozen = freeze_entries(base, "head[0] = 0.5")
    original, copied = FrozenEntries.of(_adapted(base))
    assert (list(original), list(copied), list(frozen)) == ([ORIGINAL], [COPY], ["head.weight"])
    assert copied[COPY].names == (COPY,)
    assert copied["head.weight"].name == COPY
    assert str(copied).splitlines()[1].startswith(COPY)
    assert list(copied.report().parts) == [COPY]


def test_two_adapters_are_two_parameters() -> None:
    model = _adapted(_Net())
    model.add_adapter("second", peft.LoraConfig(target_modules=["body"], modules_to_save=["head"]))
    with pytest.raises(
        TargetError, match=r"`head` may be `.*default\.weight` or `.*second\.weight`; write the full name"
    ):
        freeze_entries(model, "head[0] = 0.5")


def test_only_some_rows_of_the_copy_train() -> None:
    model = _adapted(_Net())
    frozen = train_only(model, "head[2:]")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    _train(model, MaskedOptimizer(_optimizer(model), frozen), frozen.assert_frozen)
    moved = {name for name, parameter in model.named_parameters() if not same_bits(parameter, before[name])}
    assert moved == {COPY}
    assert same_bits(model.get_parameter(COPY)[:2], before[COPY][:2])


def test_a_merged_model_holds_the_entries() -> None:
    model = _adapted(_Net())
    frozen = freeze_entries(model, "head[0] = 0.5")
    _train(model, MaskedOptimizer(_optimizer(model), frozen), frozen.assert_frozen)
    frozen.remove()
    merged = model.merge_and_unload()
    assert bool((merged.head.weight[0] == 0.5).all())


# Through the Trainer, as any other framework

HEAD = "base_model.model.lm_head.modules_to_save.default.weight"


class _Adapted(HuggingFace):
    """A GPT-2 whose head is a matrix of its own: PEFT trains a copy of it, and low-rank updates of the rest."""

    spec = "lm_head[~12:]"

    def make_model(self) -> Any:
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes: dict[str, Any] = {"vocab_size": 20, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
        config = GPT2Config(**sizes, bos_token_id=4, eos_token_id=4, tie_word_embeddings=False)
        adapters = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["lm_head"])
        return peft.get_peft_model(GPT2LMHeadModel(config), adapters)

    def what_is_held(self) -> dict[str, Held]:
        weight = self.model.get_parameter(HEAD)
        frozen = torch.zeros_like(weight, dtype=torch.bool)
        frozen[:12] = True
        return {HEAD: Held(frozen, weight.detach().clone())}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT's own
@pytest.mark.parametrize("compact", [False, True])
def test_the_trainer_holds_the_copy_and_resumes(compact: bool, tmp_path: Path) -> None:
    def run(name: str, epochs: int, checkpoint: Path | None = None) -> _Adapted:
        training = _Adapted(tmp_path / name, compact=compact)
        if checkpoint is not None:
            training.load(checkpoint)
        training.fit(epochs, lambda: assert_model_holds(training.model, training.held, "after a step"))
        training.check()
        return training

    whole, first = run("whole", 2), run("first", 1)
    assert bool((whole.weights()[HEAD] != whole.held[HEAD].values)[12:].all())
    first.save(tmp_path)
    second = run("second", 1, tmp_path)
    assert all(same_bits(tensor, second.weights()[name]) for name, tensor in whole.weights().items())
