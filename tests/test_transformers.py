"""The callback holds frozen entries through the Trainer of transformers, on real architectures of a few weights."""

from __future__ import annotations

import inspect
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset

from freezehooks import (
    DriftError,
    FrozenEntries,
    MaskedOptimizer,
    OptimizerMismatchError,
    RuleSyntaxError,
    SpecError,
    StateMismatchError,
    TargetError,
    UnguardedError,
    freeze_entries,
)

from .claims import assert_entries_hold, assert_gradients_clean, assert_model_holds, parameters_of, same_bits
from .zoo import Held

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import accelerate  # these after the skips
import transformers

from freezehooks.integrations.transformers import FreezeEntriesCallback, FrozenEntriesMonitor

needs_compact = pytest.mark.skipif(
    "compact" not in inspect.signature(FrozenEntries.guard).parameters,
    reason="FrozenEntries.guard keeps no compact state yet",
)

VOCABULARY, OLD = 20, 12  # rows of the embedding, and how many of them were there before new tokens came

SPECS = {
    "gpt2": "transformer.wte[~12:]\ntransformer.h.0.mlp.c_fc[:, 1] = 0.5\ntransformer.ln_f.bias",
    "bert": "bert.embeddings.word_embeddings[~12:]\nbert.encoder.layer.0.*.query[0] = 0.5\nclassifier.bias",
}


def _gpt2(*, tied: bool = True) -> Any:
    torch.manual_seed(3)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=8,
            n_embd=8,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
            tie_word_embeddings=tied,
        )
    )


def _bert() -> Any:
    torch.manual_seed(3)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=8,
        )
    )


MODELS: dict[str, Callable[[], Any]] = {"gpt2": _gpt2, "bert": _bert}


def _held(model: nn.Module) -> dict[str, Held]:
    """The meaning of the specs above, by plain indexing; a shared parameter is listed under both of its names."""
    held = {}
    for name, parameter in parameters_of(model).items():
        frozen = torch.zeros_like(parameter, dtype=torch.bool)
        values = parameter.detach().clone()
        if name.endswith(("wte.weight", "lm_head.weight", "word_embeddings.weight")):
            frozen[:OLD] = True
        elif name.endswith("h.0.mlp.c_fc.weight"):
            frozen[:, 1], values[:, 1] = True, 0.5
        elif name.endswith("query.weight"):
            frozen[0], values[0] = True, 0.5
        elif name.endswith(("ln_f.bias", "classifier.bias")):
            frozen[...] = True
        if bool(frozen.any()):
            held[name] = Held(frozen, values)
    return held


class _Texts(Dataset[dict[str, Tensor]]):
    """Twelve short texts, with the next tokens or a class as labels."""

    def __init__(self, kind: str) -> None:
        generator = torch.Generator().manual_seed(5)
        self.tokens = torch.randint(VOCABULARY, (12, 6), generator=generator)
        self.labels = self.tokens if kind == "gpt2" else self.tokens[:, 0] % 2

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


class _Watch(transformers.TrainerCallback):  # type: ignore[misc]  # untyped
    """Checks the promise before and after every step of the optimizer."""

    def __init__(self, held: dict[str, Held]) -> None:
        self.held = held
        self.steps = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert_gradients_clean(kwargs["model"], self.held)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1
        assert_model_holds(kwargs["model"], self.held, "after a step")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert_model_holds(kwargs["model"], self.held, "after saving")


class _At(transformers.TrainerCallback):  # type: ignore[misc]  # untyped
    """Calls a function at one event."""

    def __init__(self, event: str, action: Callable[..., None]) -> None:
        self.action = action
        setattr(self, event, self._act)

    def _act(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.action(**kwargs)


def _trainer(model: Any, folder: Path, *callbacks: Any, **options: Any) -> Any:
    kind = "bert" if isinstance(model, transformers.BertForSequenceClassification) else "gpt2"
    outside = {key: options.pop(key) for key in ("optimizers", "model_init", "eval_dataset") if key in options}
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": 2,
        "per_device_train_batch_size": 3,
        "learning_rate": 0.05,
        "weight_decay": 0.1,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
    }
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**{**defaults, **options}),
        train_dataset=_Texts(kind),
        callbacks=list(callbacks),
        **outside,
    )


OPTIONS: dict[str, dict[str, Any]] = {
    "fused": {},
    "foreach": {"optim": "adamw_torch"},
    "adafactor": {"optim": "adafactor"},
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "accumulate": {"gradient_accumulation_steps": 2},
    "clip": {"max_grad_norm": 0.01},
    "no_clip": {"max_grad_norm": 0.0},
    "schedule": {"lr_scheduler_type": "cosine", "warmup_steps": 2},
    "bf16": {"bf16": True},
    "checkpointing": {"activation_checkpointing": True},
    "compile": {"torch_compile": True, "torch_compile_backend": "eager"},
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own, inside a compiled loss
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_entries_hold_through_training(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = MODELS[kind]()
    watch, callback = _Watch(_held(model)), FreezeEntriesCallback(SPECS[kind])
    _trainer(model, tmp_path, callback, watch, **options).train()
    assert watch.steps == 8 // options.get("gradient_accumulation_steps", 1)
    assert_model_holds(model, watch.held, "after training")
    assert callback.frozen is not None
    assert not callback.frozen.attached


def test_free_entries_train(tmp_path: Path) -> None:
    model = _gpt2()
    before = model.transformer.wte.weight.detach().clone()
    _trainer(model, tmp_path, FreezeEntriesCallback(SPECS["gpt2"])).train()
    assert bool((model.transformer.wte.weight != before)[OLD:].all())


def test_the_watch_can_fail(tmp_path: Path) -> None:
    model = _gpt2()
    with pytest.raises(AssertionError, match=r"not \+0\.0"):
        _trainer(model, tmp_path, _Watch(_held(model))).train()


@pytest.mark.parametrize("name", ["transformer.wte", "lm_head"])
def test_a_tied_embedding_holds_under_either_name(name: str, tmp_path: Path) -> None:
    model = _gpt2()
    before = model.lm_head.weight.detach().clone()
    _trainer(model, tmp_path, FreezeEntriesCallback(f"{name}[~{OLD}:]")).train()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert same_bits(model.lm_head.weight[:OLD], before[:OLD])


def test_the_logged_norm_is_that_of_the_free_entries(tmp_path: Path) -> None:
    norms: list[Tensor] = []
    held = _held(_gpt2())
    spec = [f"transformer.wte[~{OLD}:]", "transformer.ln_f.bias"]  # what keeps its value changes no forward

    def measure(model: nn.Module, **kwargs: Any) -> None:
        free = []
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            kept = name in held and "c_fc" not in name
            free.append(parameter.grad[~held[name].frozen] if kept else parameter.grad.flatten())
        norms.append(torch.cat(free).norm())

    options: dict[str, Any] = {"max_grad_norm": 1e9, "max_steps": 1, "logging_strategy": "steps", "logging_steps": 1}
    _trainer(_gpt2(), tmp_path, _At("on_pre_optimizer_step", measure), **options).train()
    frozen = _trainer(_gpt2(), tmp_path, FreezeEntriesCallback(spec), **options)
    frozen.train()
    torch.testing.assert_close(torch.tensor(frozen.state.log_history[0]["grad_norm"]), norms[0])


# --------------------------------------------------------------------------------------------------------------------
# Saving and resuming


SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 2}  # 3 of 8 steps: mid-epoch


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("step", [3, 6])
def test_a_resumed_run_equals_one_never_interrupted(kind: str, step: int, tmp_path: Path) -> None:
    whole = MODELS[kind]()
    held = _held(whole)
    _trainer(whole, tmp_path, FreezeEntriesCallback(SPECS[kind]), _Watch(held), **SAVING).train()
    resumed = MODELS[kind]()
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.add_(1)  # what is resumed from says all
    again = _trainer(resumed, tmp_path, FreezeEntriesCallback(SPECS[kind]), _Watch(held), **SAVING)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert same_bits(ours, theirs)


def test_a_saved_model_is_a_plain_one_and_the_file_beside_it_is_plain_data(tmp_path: Path) -> None:
    model = _gpt2()
    held = _held(model)
    _trainer(model, tmp_path, FreezeEntriesCallback(SPECS["gpt2"]), **SAVING).train()
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "checkpoint-6")
    assert_model_holds(loaded, held, "in a model loaded from the checkpoint")
    saved = torch.load(tmp_path / "checkpoint-6" / "freezehooks.pt", weights_only=True)
    assert [list(item["frozen"]["parameters"]) for item in saved.values()] == [
        ["transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight", "transformer.ln_f.bias"]
    ]
    _trainer(_gpt2(), tmp_path, **SAVING).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


SMALLEST = "transformer.h.*.c_fc[smallest(0.5)] = 0.25"


def _regions(callback: FreezeEntriesCallback) -> dict[str, Tensor]:
    assert callback.frozen is not None
    return {name: part.frozen for name, part in callback.frozen.items()}


def _resume(folder: Path, checkpoint: Path, **options: Any) -> FreezeEntriesCallback:
    callback = FreezeEntriesCallback(SMALLEST)
    trainer = _trainer(_gpt2(), folder, callback, **{**SAVING, **options})
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return callback


@pytest.mark.parametrize(
    ("folder", "moved"), [("first", False), ("second", False), ("first", True)], ids=["same", "other_output", "moved"]
)
def test_regions_chosen_by_numbers_come_from_the_checkpoint(folder: str, moved: bool, tmp_path: Path) -> None:
    first = FreezeEntriesCallback(SMALLEST)
    _trainer(_gpt2(), tmp_path / "first", first, **SAVING).train()
    checkpoint, options = tmp_path / "first" / "checkpoint-3", {}
    if moved:
        checkpoint = Path(shutil.move(checkpoint, tmp_path / "moved"))
        options = {"resume_from_checkpoint": str(checkpoint)}
    again = _regions(_resume(tmp_path / folder, checkpoint, **options))
    assert all(frozen.equal(again[name]) for name, frozen in _regions(first).items())


def test_a_checkpoint_without_its_file_is_refused(tmp_path: Path) -> None:
    _trainer(_gpt2(), tmp_path, FreezeEntriesCallback(SMALLEST), **SAVING).train()
    checkpoint = Path(shutil.move(tmp_path / "checkpoint-3", tmp_path / "moved"))
    with pytest.raises(StateMismatchError, match=r"is not in .*checkpoint-3; name its folder, as in TrainingArguments"):
        _resume(tmp_path, checkpoint)


def test_the_file_of_another_run_is_not_taken_for_the_checkpoints_own(tmp_path: Path) -> None:
    _trainer(_gpt2(), tmp_path, FreezeEntriesCallback(SMALLEST), **SAVING).train()
    checkpoint = Path(shutil.move(tmp_path / "checkpoint-3", tmp_path / "moved"))
    _trainer(_gpt2(), tmp_path, FreezeEntriesCallback(SMALLEST), **SAVING).train()
    with pytest.raises(StateMismatchError, match=r"`freezehooks\.pt` of the checkpoint is not in"):
        _resume(tmp_path, checkpoint)


OTHER_FORMAT = "the state of `FreezeEntriesCallback` has format 99, expected 2; load it with the version of freezehooks"


def test_a_checkpoint_whose_file_has_another_format_is_refused(tmp_path: Path) -> None:
    _trainer(_gpt2(), tmp_path, FreezeEntriesCallback(SMALLEST), **SAVING).train()
    path = tmp_path / "checkpoint-3" / "freezehooks.pt"
    saved = torch.load(path, weights_only=True)
    (item,) = saved.values()
    assert set(item) == {"format", "released", "frozen", "run"}
    item["format"] = 99
    torch.save(saved, path)
    with pytest.raises(StateMismatchError, match=OTHER_FORMAT):
        _resume(tmp_path, tmp_path / "checkpoint-3")


def test_a_checkpoint_whose_entry_has_another_format_is_refused(tmp_path: Path) -> None:
    callback = FreezeEntriesCallback(SMALLEST)
    _trainer(_gpt2(), tmp_path, callback, **SAVING).train()
    path = tmp_path / "checkpoint-3" / "trainer_state.json"
    state = json.loads(path.read_text())
    state["stateful_callbacks"][callback.state_key]["format"] = 99
    path.write_text(json.dumps(state))
    with pytest.raises(StateMismatchError, match=OTHER_FORMAT):
        _resume(tmp_path, tmp_path / "checkpoint-3")


def test_resuming_under_other_rules_is_refused_and_leaves_nothing_behind(tmp_path: Path) -> None:
    _trainer(_gpt2(), tmp_path, FreezeEntriesCallback(SPECS["gpt2"]), **SAVING).train()
    model = _gpt2()
    trainer = _trainer(model, tmp_path, FreezeEntriesCallback("transformer.ln_f.bias"), **SAVING)
    with pytest.raises(
        StateMismatchError, match=r"saved under other rules: .*c_fc\[:, 1\] = 0\.5.*; give the callback"
    ):
        trainer.train(resume_from_checkpoint=True)
    _assert_no_trace(model, trainer.optimizer.optimizer)


def test_a_checkpoint_of_an_unfrozen_run_resumes_frozen(tmp_path: Path) -> None:
    _trainer(_gpt2(), tmp_path, **SAVING).train()
    held = _held(transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "checkpoint-3"))
    model = _gpt2()
    trainer = _trainer(model, tmp_path, FreezeEntriesCallback(SPECS["gpt2"]), _Watch(held), **SAVING)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_model_holds(model, held, "after resuming a plain run")


def test_the_best_model_holds(tmp_path: Path) -> None:
    model = _bert()
    held = _held(model)
    options = {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True}
    seen: list[bool] = []
    look = _At("on_train_end", lambda model, **kwargs: seen.append(bool(FrozenEntries.of(model))))
    trainer = _trainer(
        model,
        tmp_path,
        FreezeEntriesCallback(SPECS["bert"]),
        _Watch(held),
        look,
        eval_dataset=_Texts("bert"),
        **options,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None
    assert_model_holds(model, held, "in the best model")
    best = transformers.BertForSequenceClassification.from_pretrained(trainer.state.best_model_checkpoint)
    for ours, theirs in zip(model.parameters(), best.parameters(), strict=True):
        assert same_bits(ours, theirs)
    assert seen == [False]


def test_several_callbacks_share_a_trainer_and_its_checkpoints(tmp_path: Path) -> None:
    for resume in (None, str(tmp_path / "checkpoint-3")):
        model = _gpt2()
        held = _held(model)
        callbacks = [FreezeEntriesCallback(line) for line in SPECS["gpt2"].splitlines()]
        _trainer(model, tmp_path, *callbacks, _Watch(held), **SAVING).train(resume_from_checkpoint=resume)
        assert_model_holds(model, held, "under three callbacks")


def test_a_trainer_that_restores_callbacks_from_checkpoints_leaves_this_one_alone(tmp_path: Path) -> None:
    for resume in (None, str(tmp_path / "checkpoint-3")):
        callback = FreezeEntriesCallback(SPECS["gpt2"])
        trainer = _trainer(_gpt2(), tmp_path, callback, **SAVING, restore_callback_states_from_checkpoint=True)
        trainer.train(resume_from_checkpoint=resume)
        assert callback in trainer.callback_handler.callbacks


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_frozen_model_that_was_saved_loads_again_and_holds(tied: bool, tmp_path: Path) -> None:
    model = _gpt2(tied=tied)
    heads = ["transformer.wte"] if tied else ["transformer.wte", "lm_head"]
    spec = [f"{head}[{rows}] = {value}" for head in heads for rows, value in (("0", 0.5), ("1:4", "keep"))]
    frozen = freeze_entries(model, spec)
    optimizer = MaskedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.05), frozen)
    tokens = _Texts("gpt2").tokens
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    trained = {name: parameter.detach().clone() for name, parameter in parameters_of(model).items()}
    with torch.no_grad():
        model.transformer.wte.weight[0] = 9  # a stray write
    model.save_pretrained(tmp_path)
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.transformer.wte.weight) == tied
    assert all(same_bits(parameter, trained[name]) for name, parameter in parameters_of(loaded).items())
    freeze_entries(loaded, spec, state=frozen.state_dict()).assert_frozen(guarded=False)
    model.load_state_dict(loaded.state_dict())
    frozen.assert_frozen()


# --------------------------------------------------------------------------------------------------------------------
# Thawing


def test_entries_are_let_go_at_until_epoch_and_stay_free_on_resuming(tmp_path: Path) -> None:
    spec = "transformer.ln_f.bias = 0.5"
    model, held = _gpt2(), []
    look = _At("on_step_end", lambda model, **kwargs: held.append(bool((model.transformer.ln_f.bias == 0.5).all())))
    _trainer(model, tmp_path, FreezeEntriesCallback(spec, until_epoch=1), look, **SAVING).train()
    assert held == [True] * 4 + [False] * 4

    for step in (3, 6):
        resumed, model = FreezeEntriesCallback(spec, until_epoch=1), _gpt2()
        again = _trainer(model, tmp_path, resumed, **SAVING)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert (resumed.frozen is None) == (step == 6)
        assert not bool((model.transformer.ln_f.bias == 0.5).any())


def test_entries_are_let_go_where_a_run_resumes_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    options: dict[str, Any] = {**SAVING, "save_strategy": "epoch"}
    for resume in (None, str(tmp_path / "checkpoint-4")):
        model = _gpt2()
        callback = FreezeEntriesCallback("transformer.ln_f.bias = 0.5", until_epoch=1)
        _trainer(model, tmp_path, callback, **options).train(resume_from_checkpoint=resume)
        assert not bool((model.transformer.ln_f.bias == 0.5).any())


def test_a_checkpoint_without_frozen_entries_left_says_so(tmp_path: Path) -> None:
    _trainer(_gpt2(), tmp_path, FreezeEntriesCallback("transformer.ln_f.bias", until_epoch=1), **SAVING).train()
    again = _trainer(_gpt2(), tmp_path, FreezeEntriesCallback("transformer.ln_f.bias"), **SAVING)
    with pytest.warns(UserWarning, match="nothing is frozen in this run either. To freeze again"):
        again.train(resume_from_checkpoint=True)


def test_until_epoch_0_leaves_the_weights_alone(tmp_path: Path) -> None:
    model = _gpt2()
    _trainer(model, tmp_path, FreezeEntriesCallback("transformer.ln_f.bias = 0.5", until_epoch=0), max_steps=1).train()
    assert not bool((model.transformer.ln_f.bias == 0.5).any())


def _assert_no_trace(model: nn.Module, optimizer: Any) -> None:
    """Claim: neither modules nor parameters nor the optimizer carry a hook, and the names are the plain model's."""
    hooks = [name for name in vars(nn.Module()) if name.endswith("_hooks")]
    assert hooks
    for module in model.modules():
        assert [name for name in hooks if getattr(module, name)] == []
    for parameter in model.parameters():
        assert not parameter._post_accumulate_grad_hooks
        assert not parameter._backward_hooks
    for when in ("step_pre", "step_post", "load_state_dict_post", "state_dict_pre"):
        assert not getattr(optimizer, f"_optimizer_{when}_hooks")
    assert list(model.state_dict()) == list(type(model)(model.config).state_dict())


@pytest.mark.parametrize("kind", MODELS)
def test_training_leaves_no_trace(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    optimizers: list[Any] = []
    look = _At("on_step_end", lambda optimizer, **kwargs: optimizers.append(optimizer.optimizer))
    trainer = _trainer(model, tmp_path, FreezeEntriesCallback(SPECS[kind]), look, max_steps=1)
    trainer.train()
    assert type(optimizers[0]) is torch.optim.AdamW
    assert optimizers[0] is trainer.optimizer.optimizer
    _assert_no_trace(model, optimizers[0])


# --------------------------------------------------------------------------------------------------------------------
# Refusals


def test_bad_rules_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(RuleSyntaxError, match="column 17"):
        FreezeEntriesCallback("transformer.wte[@]")
    with pytest.raises(SpecError, match="until_epoch"):
        FreezeEntriesCallback(SPECS["gpt2"], until_epoch=-1)


def test_a_misspelt_name_is_refused_with_nothing_installed(tmp_path: Path) -> None:
    model = _gpt2()
    before = model.transformer.ln_f.bias.detach().clone()
    callback = FreezeEntriesCallback("transformer.ln_f.bias = 1\ntransformer.wte.weigth")
    trainer = _trainer(model, tmp_path, callback)
    with pytest.raises(TargetError, match=r"did you mean `transformer\.wte\.weight`"):
        trainer.train()
    assert callback.frozen is None
    assert same_bits(model.transformer.ln_f.bias, before)
    _assert_no_trace(model, trainer.optimizer.optimizer)


def test_an_optimizer_of_another_model_is_refused_with_nothing_installed(tmp_path: Path) -> None:
    model, other = _gpt2(), _gpt2()
    optimizer = torch.optim.AdamW(other.parameters())
    with pytest.raises(OptimizerMismatchError, match="steps none of the frozen parameters"):
        _trainer(model, tmp_path, FreezeEntriesCallback(SPECS["gpt2"]), optimizers=(optimizer, None)).train()
    _assert_no_trace(model, optimizer)


def test_drift_is_raised_at_the_end_of_the_epoch(tmp_path: Path) -> None:
    model, callback = _gpt2(), FreezeEntriesCallback(SPECS["gpt2"])
    spoil = _At("on_step_end", lambda model, **kwargs: model.transformer.h[0].mlp.c_fc.weight.data[0, 1].fill_(7))
    trainer = _trainer(model, tmp_path, callback, spoil)
    with pytest.raises(DriftError, match=r"c_fc\.weight\[0, 1\]` holds 7\.0 instead of 0\.5"):
        trainer.train()
    assert trainer.state.global_step == 4
    _assert_no_trace(model, trainer.optimizer.optimizer)


def test_a_stripped_hook_is_raised_at_the_end_of_the_epoch(tmp_path: Path) -> None:
    model, callback = _gpt2(), FreezeEntriesCallback(SPECS["gpt2"])
    strip = _At("on_step_end", lambda model, **kwargs: model.transformer.h[0].mlp.c_fc._forward_pre_hooks.clear())
    trainer = _trainer(model, tmp_path, callback, strip)
    with pytest.raises(UnguardedError, match=r"missing is the forward hook of `transformer\.h\.0\.mlp\.c_fc\.weight`"):
        trainer.train()
    _assert_no_trace(model, trainer.optimizer.optimizer)


def test_without_transformers_the_import_says_what_to_install() -> None:
    script = (
        "import sys; sys.modules['transformers'] = None\n"
        "try:\n    import freezehooks.integrations.transformers\n"
        "except ModuleNotFoundError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert "pip install 'freezehooks[transformers]'" in done.stdout, done.stderr


# --------------------------------------------------------------------------------------------------------------------
# Beside other things


def test_a_callback_starts_every_training_afresh(tmp_path: Path) -> None:
    callback = FreezeEntriesCallback(SPECS["gpt2"], until_epoch=2)
    for _ in range(2):
        model = _gpt2()
        held = _held(model)
        _trainer(model, tmp_path, callback, _Watch(held)).train()
        assert_model_holds(model, held, "under a callback used again")
    with torch.no_grad():
        model.transformer.wte.weight.add_(1)
    held = _held(model)
    _trainer(model, tmp_path, callback, _Watch(held)).train()
    assert_model_holds(model, held, "in a model trained again")


def test_what_another_callback_writes_at_the_end_is_imposed_on(tmp_path: Path) -> None:
    model = _gpt2()
    held = _held(model)
    average = _At("on_train_end", lambda model, **kwargs: model.transformer.wte.weight.data.fill_(9))
    _trainer(model, tmp_path, average, FreezeEntriesCallback(SPECS["gpt2"]), max_steps=1).train()
    assert_model_holds(model, held, "after averages were written into the model")


def test_a_trainer_trains_twice_and_its_model_may_be_made_anew(tmp_path: Path) -> None:
    callback = FreezeEntriesCallback("transformer.ln_f.bias = 0.5")
    trainer = _trainer(None, tmp_path, callback, model_init=lambda: _gpt2(), max_steps=2)
    for _ in range(2):
        trainer.train()
        assert bool((trainer.model.transformer.ln_f.bias == 0.5).all())
        _assert_no_trace(trainer.model, trainer.optimizer.optimizer)


def test_a_training_that_broke_off_is_followed_by_another(tmp_path: Path) -> None:
    def stop(**kwargs: Any) -> None:
        raise KeyboardInterrupt

    model, callback = _gpt2(), FreezeEntriesCallback(SPECS["gpt2"])
    held = _held(model)
    with pytest.raises(KeyboardInterrupt):
        _trainer(model, tmp_path, callback, _At("on_step_end", stop)).train()
    assert callback.frozen is not None
    assert callback.frozen.attached
    trainer = _trainer(model, tmp_path, callback, _Watch(held))
    trainer.train()
    assert_model_holds(model, held, "after a second start")
    _assert_no_trace(model, trainer.optimizer.optimizer)


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "masked"])
def test_an_optimizer_given_to_the_trainer_is_guarded(wrapped: bool, tmp_path: Path) -> None:
    model = _gpt2()
    held = _held(model)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    if wrapped:
        optimizer = MaskedOptimizer(optimizer, ())
    watch = _Watch(held)
    _trainer(model, tmp_path, FreezeEntriesCallback(SPECS["gpt2"]), watch, optimizers=(optimizer, None)).train()
    assert watch.steps == 8
    _assert_no_trace(model, optimizer)


def test_a_handle_and_masked_optimizer_of_ones_own_need_no_callback(tmp_path: Path) -> None:
    model = _gpt2()
    held = _held(model)
    frozen = freeze_entries(model, SPECS["gpt2"])
    optimizer = MaskedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1), frozen)
    _trainer(model, tmp_path, _Watch(held), optimizers=(optimizer, None)).train()
    frozen.assert_frozen()


class _Average(transformers.TrainerCallback):  # type: ignore[misc]  # untyped
    """An exponential average of the model, as users write it."""

    average: AveragedModel | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.average is None:
            self.average = AveragedModel(kwargs["model"], multi_avg_fn=get_ema_multi_avg_fn(0.9))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.average is not None
        self.average.update_parameters(kwargs["model"])


def test_an_average_made_from_the_frozen_model_holds(tmp_path: Path) -> None:
    model, mean = _gpt2(), _Average()
    held = _held(model)
    _trainer(model, tmp_path, FreezeEntriesCallback(SPECS["gpt2"]), mean, _Watch(held)).train()
    assert mean.average is not None
    assert_entries_hold(mean.average.module.state_dict(), held, "in the average")
    _assert_no_trace(model, torch.optim.AdamW(model.parameters()))


def test_an_average_made_before_training_is_left_alone(tmp_path: Path) -> None:
    averages = []
    for callbacks in ([FreezeEntriesCallback("transformer.ln_f.bias")], []):
        model, mean = _gpt2(), _Average()
        model.transformer.ln_f.bias.requires_grad_(bool(callbacks))  # the reference: a parameter that never trains
        mean.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        _trainer(model, tmp_path, mean, *callbacks).train()
        _assert_no_trace(mean.average.module, torch.optim.AdamW(model.parameters()))
        averages.append(mean.average.state_dict())
    assert all(same_bits(averages[0][name], averages[1][name]) for name in averages[0])


def test_what_is_frozen_is_reported_once_at_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, logger="transformers"):
            _trainer(_gpt2(), tmp_path, FreezeEntriesCallback(SPECS["gpt2"])).train()
    finally:
        logger.removeHandler(caplog.handler)
    records = {id(record): record.getMessage() for record in caplog.records}  # under CI transformers propagates too
    told = [message for message in records.values() if "112 of 1,984 entries are frozen" in message]
    assert len(told) == 1
    assert "transformer.ln_f.bias" in told[0]


@pytest.mark.parametrize(("compact", "handed_on"), [(False, {}), (True, {"compact": True})])
def test_compact_is_handed_to_the_guard(
    compact: bool, handed_on: dict[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, bool]] = []
    guard = FrozenEntries.guard

    def recorded(frozen: FrozenEntries, optimizer: Any, **options: bool) -> Any:
        seen.append(options)
        return guard(frozen, optimizer)

    monkeypatch.setattr(FrozenEntries, "guard", recorded)
    _trainer(_gpt2(), tmp_path, FreezeEntriesCallback(SPECS["gpt2"], compact=compact), max_steps=1).train()
    assert seen == [handed_on]


@needs_compact
@pytest.mark.parametrize("kind", MODELS)
def test_compact_state_trains_the_same_and_resumes(kind: str, tmp_path: Path) -> None:
    ends = []
    for compact in (False, True):
        model = MODELS[kind]()
        held, folder = _held(model), tmp_path / str(compact)
        options = {**SAVING, "optim": "adamw_torch", "max_grad_norm": 0.0}
        _trainer(model, folder, FreezeEntriesCallback(SPECS[kind], compact=compact), _Watch(held), **options).train()
        ends.append(model)
        again = MODELS[kind]()
        resumed = _trainer(again, folder, FreezeEntriesCallback(SPECS[kind], compact=compact), _Watch(held), **options)
        resumed.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
        assert all(same_bits(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    for whole, compacted in zip(*(model.parameters() for model in ends), strict=True):
        torch.testing.assert_close(compacted, whole)


# --------------------------------------------------------------------------------------------------------------------
# Accelerate alone


@pytest.mark.parametrize("kind", MODELS)
def test_accelerate_prepares_steps_and_restores(kind: str, tmp_path: Path) -> None:
    model, texts = MODELS[kind](), _Texts(kind)
    held = _held(model)
    frozen = freeze_entries(model, SPECS[kind])
    inner = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, MaskedOptimizer(inner, frozen))

    def step() -> None:
        optimizer.zero_grad()
        accelerator.backward(prepared(input_ids=texts.tokens, labels=texts.labels).loss)
        accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
        assert_gradients_clean(model, held)
        optimizer.step()
        assert_model_holds(model, held, "after an accelerated step")

    step()
    accelerator.save_state(str(tmp_path))
    trained = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    step()
    accelerator.load_state(str(tmp_path))
    for name, parameter in model.named_parameters():
        assert same_bits(parameter, trained[name])
    frozen.assert_frozen()
    step()
    assert any(not same_bits(parameter, trained[name]) for name, parameter in model.named_parameters())


def _logged(trainer: Any) -> dict[int, dict[str, float]]:
    """Return what was logged of frozen entries, by step."""
    rows = [row for row in trainer.state.log_history if any(name.startswith("freezehooks/") for name in row)]
    return {row["step"]: {name: row[name] for name in row if name.startswith("freezehooks/")} for row in rows}


@pytest.mark.parametrize("compact", [False, True])
def test_what_the_trainer_logs_of_frozen_entries(compact: bool, tmp_path: Path) -> None:
    trainer = _trainer(
        _gpt2(), tmp_path, FreezeEntriesCallback(SPECS["gpt2"], compact=compact), logging_strategy="steps",
        logging_steps=3, logging_first_step=True,
    )  # fmt: skip
    trainer.add_callback(FrozenEntriesMonitor(trainer))
    trainer.train()
    rows = _logged(trainer)
    assert list(rows) == [1, 3, 6]
    names = {name.split("/")[1] for name in rows[1]}
    held = _held(_gpt2())
    assert names == set(held) - {"lm_head.weight"}  # the other name of a tied one
    for row in rows.values():
        for name in names:
            assert row[f"freezehooks/{name}/drift"] == row[f"freezehooks/{name}/gradient_norm_frozen"] == 0
            assert (row[f"freezehooks/{name}/gradient_norm_free"] == 0) == bool(held[name].frozen.all())
    assert [row["step"] for row in trainer.state.log_history if "loss" in row] == [1, 3, 6]


def test_drift_is_logged_at_the_end_of_epochs(tmp_path: Path) -> None:
    model = _gpt2()

    def spoil(**kwargs: Any) -> None:
        model.transformer.wte.weight.data[...] = 9.0

    spec = "transformer.wte[0] = 8.5"
    model_held = freeze_entries(model, spec)
    trainer = _trainer(model, tmp_path, _At("on_step_end", spoil), logging_strategy="epoch")
    trainer.add_callback(FrozenEntriesMonitor(trainer))
    trainer.train()
    assert _logged(trainer) == {4: {"freezehooks/transformer.wte.weight/drift": 0.5}, 8: {
        "freezehooks/transformer.wte.weight/drift": 0.5
    }}  # fmt: skip
    model_held.remove()


def test_a_reporter_writes_them_into_its_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    pytest.importorskip("lightning")
    from .test_monitor import read_events

    options = {"logging_strategy": "steps", "logging_steps": 4, "report_to": ["tensorboard"]}
    trainer = _trainer(_gpt2(), tmp_path, FreezeEntriesCallback(SPECS["gpt2"]), **options)
    trainer.add_callback(FrozenEntriesMonitor(trainer))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
        trainer.train()
    curves = read_events(tmp_path, "train/freezehooks/")
    logged = {
        f"train/{name}": {step: pytest.approx(row[name]) for step, row in _logged(trainer).items()}
        for name in _logged(trainer)[4]
    }
    assert curves == logged


def test_it_skips_gradients_where_asked_to(tmp_path: Path) -> None:
    spec = "lm_head[:-2]"
    usual, quick = _gpt2(tied=False), _gpt2(tied=False)
    _trainer(usual, tmp_path, FreezeEntriesCallback(spec)).train()
    callback = FreezeEntriesCallback(spec, skip_gradients=True)
    said: list[str] = []
    look = _At("on_step_end", lambda **kwargs: said.append(str(callback.frozen)))
    _trainer(quick, tmp_path, callback, look).train()
    assert "no gradient is computed for frozen rows of lm_head.weight" in said[0]
    assert not quick.lm_head._forward_hooks
    for name, parameter in quick.named_parameters():
        torch.testing.assert_close(parameter, usual.get_parameter(name))
