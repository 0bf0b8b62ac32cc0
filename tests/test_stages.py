"""Callbacks that name what trains, or freeze for some epochs of a training, by themselves and in sequence."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import Tensor

pytest.importorskip("lightning")
pytest.importorskip("pytorch_lightning")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")


from freezehooks import SpecError, StateMismatchError, UnguardedError  # these after the skips
from freezehooks.integrations.lightning import FreezeEntries
from freezehooks.integrations.transformers import FreezeEntriesCallback

from .claims import held_twice, same_bits
from .test_lightning import PACKAGES, _data, _module, _SaveLast
from .test_lightning import _trainer as _lightning
from .test_transformers import SAVING, _At, _gpt2
from .test_transformers import _trainer as _huggingface

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory"),
]

callbacks = pytest.mark.parametrize("kind", [FreezeEntries, FreezeEntriesCallback])


# --------------------------------------------------------------------------------------------------------------------
# Arguments


@callbacks
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "takes `spec` or `train_only`, found neither; give `spec` to say what is frozen"),
        ({"spec": "a", "train_only": "b"}, "found both"),
        (
            {"spec": "a", "from_epoch": 3, "until_epoch": 3},
            "`from_epoch` must come before `until_epoch`, found 3 and 3",
        ),
        ({"spec": "a", "from_epoch": 4, "until_epoch": 3}, "found 4 and 3"),
        ({"spec": "a", "from_epoch": -1}, "`from_epoch` must be an epoch counted from 0"),
        ({"spec": "a", "from_epoch": 1.5}, "`from_epoch` must be an epoch"),
    ],
)
def test_bad_arguments_are_refused(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        kind(**options)


@callbacks
def test_state_keys_say_rules_and_epochs(kind: Any) -> None:
    stages = [
        kind("a"),
        kind("a", until_epoch=2),
        kind("a", from_epoch=2),
        kind("a", from_epoch=2, until_epoch=4),
        kind(train_only="a"),
        kind(train_only="a", from_epoch=2),
    ]
    assert len({stage.state_key for stage in stages}) == 6


# --------------------------------------------------------------------------------------------------------------------
# Lightning


class _Rows:
    """After each epoch: which numbers of a parameter moved in it."""

    def __init__(self, package: str, name: str) -> None:
        self.callback = importlib.import_module(package).Callback()
        self.callback.on_train_epoch_end = self._look
        self.callback.on_fit_start = lambda trainer, module: self._before.append(self._copy(module))
        self._name = name
        self._before: list[Tensor] = []
        self.moved: list[list[bool]] = []

    def _copy(self, module: Any) -> Tensor:
        copied: Tensor = module.get_parameter(self._name).detach().clone()
        return copied

    def _look(self, trainer: Any, module: Any) -> None:
        now = self._copy(module)
        self.moved.append((now != self._before[-1]).flatten()[:2].tolist())
        self._before.append(now)


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("compact", [False, True], ids=["masked", "compact"])
def test_lightning_trains_what_is_named_alone(package: str, compact: bool, tmp_path: Path) -> None:
    module = _module(package, watched=False)
    before = {name: each.detach().clone() for name, each in module.named_parameters()}
    callback = FreezeEntries(train_only=["net.2.weight[0]", "net.2.bias"], compact=compact)
    _lightning(package, tmp_path, callback).fit(module, _data(), _data())
    moved = {name: each.detach() != before[name] for name, each in module.named_parameters()}
    assert sorted(name for name, each in moved.items() if bool(each.any())) == ["net.2.bias", "net.2.weight"]
    assert not moved["net.2.weight"][1].any()
    assert all(each.requires_grad for each in module.parameters())


def test_lightning_stops_before_a_step_that_trains_what_was_not_named(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import BaseFinetuning

    class Unfreeze(BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            """Leave that to `train_only`."""

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.make_trainable(pl_module.net[0])

    module = _module("lightning.pytorch", watched=False)
    before, callback = module.net[0].weight.detach().clone(), FreezeEntries(train_only="net.2.weight[0]")
    trainer = _lightning("lightning.pytorch", tmp_path, callback, Unfreeze(), max_epochs=3)
    with pytest.raises(
        UnguardedError, match=r"train_only did not name `net\.0\.weight`.*, which requires a gradient now"
    ):
        trainer.fit(module, _data(), _data())
    assert trainer.current_epoch == 1
    assert same_bits(module.net[0].weight, before)
    assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("compact", [False, True], ids=["masked", "compact"])
@pytest.mark.parametrize("order", [1, -1], ids=["forward", "backward"])
def test_lightning_stages_follow_one_another(package: str, compact: bool, order: int, tmp_path: Path) -> None:
    module, look = _module(package, watched=False), _Rows(package, "net.2.bias")
    stages = [
        FreezeEntries("net.2.bias[0]", until_epoch=1, compact=compact),
        FreezeEntries("net.2.bias[1]", from_epoch=1, until_epoch=2, compact=compact),
        FreezeEntries("net.2.bias[0] = 3", from_epoch=2, until_epoch=3, compact=compact),
        FreezeEntries("net.2.bias[0]", from_epoch=4, compact=compact),
    ]
    _lightning(package, tmp_path, *stages[::order], look.callback, max_epochs=5).fit(module, _data(), _data())
    assert look.moved == [[False, True], [True, False], [True, True], [True, True], [False, True]]


def test_lightning_resumes_in_any_stage(tmp_path: Path) -> None:
    def stages() -> list[FreezeEntries]:
        return [FreezeEntries("net.2.bias[0]", from_epoch=1), FreezeEntries("net.2.bias[1]", from_epoch=3)]

    package = PACKAGES[0]
    through = _module(package, watched=False)
    _lightning(package, tmp_path, *stages(), max_epochs=5).fit(through, _data(), _data())
    path = None
    for epochs in range(1, 6):
        module = _module(package, watched=False)
        trainer = _lightning(package, tmp_path, *stages(), max_epochs=epochs)
        trainer.fit(module, _data(), _data(), ckpt_path=path)
        path = tmp_path / f"{epochs}.ckpt"
        trainer.save_checkpoint(path)
    for first, second in itertools.zip_longest(through.parameters(), module.parameters()):
        assert same_bits(first, second)


@held_twice
@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(
    ("epochs", "held"),
    [
        ([{"until_epoch": 1}, {"from_epoch": 2, "until_epoch": 3}, {"from_epoch": 4}], [0, 2, 4]),
        ([{"from_epoch": 1}, {"until_epoch": 3}], [0, 1, 2, 3, 4]),
    ],
    ids=["apart", "overlapping"],
)
def test_lightning_callbacks_of_the_same_rules_keep_apart_in_checkpoints(
    package: str, epochs: list[dict[str, Any]], held: list[int], tmp_path: Path
) -> None:
    def fit(start: Path | None = None) -> Any:
        module, look = _module(package, watched=False, scheduled=False), _Rows(package, "net.2.bias")
        module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        stages = [FreezeEntries("net.2.bias[0]", **each) for each in epochs]
        save = importlib.import_module(f"{package}.callbacks").ModelCheckpoint(
            tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True, enable_version_counter=False
        )
        callbacks = [*stages, look.callback, save]
        trainer = _lightning(package, tmp_path, *callbacks, max_epochs=5, enable_checkpointing=True)
        trainer.fit(module, _data(), _data(), ckpt_path=start)
        return module, look.moved

    whole, moved = fit()
    assert [epoch for epoch in range(5) if not moved[epoch][0]] == held
    for epoch in range(4):
        resumed, later = fit(tmp_path / f"epoch={epoch}.ckpt")
        assert later == moved[epoch + 1 :]
        assert all(same_bits(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))


def test_lightning_resumes_alone_with_another_epoch(tmp_path: Path) -> None:
    fit = _SaveLast(PACKAGES[0], tmp_path)
    fit(FreezeEntries("net.2.bias", until_epoch=3), epochs=1, module=_module(PACKAGES[0], watched=False))
    module, look = _module(PACKAGES[0], watched=False), FreezeEntries("net.2.bias", until_epoch=2)
    fit(look, epochs=3, module=module, resume=True)
    assert look.frozen is not None
    assert not look.frozen.attached


@pytest.mark.filterwarnings("ignore")  # jsonargparse's own
def test_the_configuration_file_says_what_trains(tmp_path: Path) -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(FreezeEntries, "freeze")
    path = tmp_path / "config.yaml"
    for said, rules in (("net.2.bias[0]", 1), ("['net.2.bias[0]', net.0]", 2)):
        path.write_text(f"train_only: {said}\nfrom_epoch: 2\n")
        callback = parser.instantiate_classes(parser.parse_args([f"--freeze={path}"])).freeze
        assert len(callback.rules) == rules
        assert callback.trains_rules
        assert callback.from_epoch == 2


# --------------------------------------------------------------------------------------------------------------------
# The Trainer of transformers


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("compact", [False, True], ids=["masked", "compact"])
def test_the_trainer_trains_new_rows_alone_and_resumes(tied: bool, compact: bool, tmp_path: Path) -> None:
    runs = []
    for resume in (None, str(tmp_path / "checkpoint-3")):
        model = _gpt2(tied=tied)
        before = {name: each.detach().clone() for name, each in model.named_parameters(remove_duplicate=False)}
        callback = FreezeEntriesCallback(train_only=["transformer.wte[12:]", "lm_head[12:]"], compact=compact)
        _huggingface(model, tmp_path, callback, **SAVING).train(resume_from_checkpoint=resume)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            moved = parameter.detach() != before[name]
            if name in ("transformer.wte.weight", "lm_head.weight"):
                assert bool(moved[12:].any())
                assert not moved[:12].any()
            else:
                assert not moved.any(), name
        assert all(each.requires_grad for each in model.parameters())
        runs.append(model)
    for first, second in zip(runs[0].parameters(), runs[1].parameters(), strict=True):
        assert same_bits(first, second)


_MOMENTUM: Final = {"optim": "sgd", "learning_rate": 0.1}
"""For entries thawed under AdamW, the correction in the first hundred steps is not saved in a checkpoint."""


def _stages() -> list[FreezeEntriesCallback]:
    bias = "transformer.ln_f.bias"
    return [
        FreezeEntriesCallback(f"{bias}[1]", from_epoch=1),
        FreezeEntriesCallback(f"{bias}[0]", until_epoch=1),
    ]


def test_stages_of_the_trainer_follow_one_another_and_resume(tmp_path: Path) -> None:
    seen: list[list[bool]] = []

    def look(model: Any, **kwargs: Any) -> None:
        grad = model.transformer.ln_f.bias.grad
        seen.append([bool(grad[0] == 0), bool(grad[1] == 0)])

    runs = []
    for resume, steps in ((None, 8), ("3", 5), ("6", 2)):
        seen.clear()
        model = _gpt2()
        folder = None if resume is None else str(tmp_path / f"checkpoint-{resume}")
        watch = _At("on_pre_optimizer_step", look)
        _huggingface(model, tmp_path, *_stages(), watch, **SAVING, **_MOMENTUM).train(resume_from_checkpoint=folder)
        expected = [[True, False]] * 4 + [[False, True]] * 4
        assert seen == expected[8 - steps :]
        runs.append(model)
    for other in runs[1:]:
        for first, second in zip(runs[0].parameters(), other.parameters(), strict=True):
            assert same_bits(first, second)


class _WithoutLength(torch.utils.data.IterableDataset[Any]):
    """The same rows, whose number nobody knows before they are read."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


def test_epochs_of_a_dataset_without_length_are_its_passes(tmp_path: Path) -> None:
    seen: list[list[bool]] = []

    def look(model: Any, **kwargs: Any) -> None:
        grad = model.transformer.ln_f.bias.grad
        seen.append([bool(grad[0] == 0), bool(grad[1] == 0)])

    trainer = _huggingface(_gpt2(), tmp_path, *_stages(), _At("on_pre_optimizer_step", look), **_MOMENTUM, max_steps=12)
    trainer.train_dataset = _WithoutLength(trainer.train_dataset)
    trainer.train()
    assert seen == [[True, False]] * 4 + [[False, True]] * 8


def test_callbacks_of_the_same_rules_keep_apart_in_checkpoints(tmp_path: Path) -> None:
    def both() -> list[FreezeEntriesCallback]:
        spec = "transformer.ln_f.bias[0]"
        return [FreezeEntriesCallback(spec, from_epoch=1), FreezeEntriesCallback(spec, until_epoch=1)]

    runs = []
    for resume in (None, str(tmp_path / "checkpoint-3"), str(tmp_path / "checkpoint-6")):
        model = _gpt2()
        start = model.transformer.ln_f.bias[0].item()
        _huggingface(model, tmp_path, *both(), **SAVING, **_MOMENTUM).train(resume_from_checkpoint=resume)
        assert model.transformer.ln_f.bias[0].item() == start
        runs.append(model)
    for other in runs[1:]:
        for first, second in zip(runs[0].parameters(), other.parameters(), strict=True):
            assert same_bits(first, second)


def test_the_trainer_resumes_with_another_epoch_and_refuses_what_was_trained_as_frozen(tmp_path: Path) -> None:
    spec = "transformer.ln_f.bias"
    _huggingface(_gpt2(), tmp_path, FreezeEntriesCallback(spec, until_epoch=2), **SAVING).train()
    resume = str(tmp_path / "checkpoint-3")
    _huggingface(_gpt2(), tmp_path, FreezeEntriesCallback(spec, until_epoch=1), **SAVING).train(resume)
    trainer = _huggingface(_gpt2(), tmp_path, FreezeEntriesCallback(train_only=spec), **SAVING)
    with pytest.raises(StateMismatchError, match="saved under other rules"):
        trainer.train(resume)
