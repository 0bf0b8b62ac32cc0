"""The callback holds frozen entries through Lightning's Trainer, under both of its packages."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from freezehooks import (
    DriftError,
    MaskedOptimizer,
    RuleSyntaxError,
    SpecError,
    StateMismatchError,
    TargetError,
    UnsupportedParameterError,
    freeze_entries,
)

from .claims import assert_entries_hold, assert_gradients_clean, assert_model_holds, same_bits
from .zoo import Held

pytest.importorskip("lightning")
pytest.importorskip("pytorch_lightning")

from freezehooks.integrations.lightning import FreezeEntries  # after the skips

pytestmark = [
    # Lightning's own, on machines with more cores than the loaders use, and from its log-free Trainer
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory"),
]

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
SPEC = "net.0[center] = 0\nnet.2.weight[0, 1] = 1\nnet.2.bias"


def _net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Flatten(), nn.Linear(48, 2))


def _held(net: nn.Module) -> dict[str, Held]:
    convolution, head, bias = (p.detach().clone() for n, p in net.named_parameters() if n != "0.bias")
    taps = torch.zeros_like(convolution, dtype=torch.bool)
    taps[..., 1, 1] = True
    entry = torch.zeros_like(head, dtype=torch.bool)
    entry[0, 1] = True
    return {
        "net.0.weight": Held(taps, torch.zeros_like(convolution)),
        "net.2.weight": Held(entry, torch.ones_like(head)),
        "net.2.bias": Held(torch.ones_like(bias, dtype=torch.bool), bias),
    }


def _module(
    package: str, *, manual: bool = False, optimizers: int = 1, scheduled: bool = True, watched: bool = True
) -> Any:
    """A LightningModule that checks the promise after every backward and batch if it is watched."""
    base: Any = importlib.import_module(package).LightningModule

    class Module(base):  # type: ignore[misc]  # one of two packages
        def __init__(self) -> None:
            super().__init__()
            self.net = _net()
            self.other = nn.Linear(2, 2)
            self.automatic_optimization = not manual
            self.held = _held(self.net)
            self.steps = 0

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
            loss = nn.functional.cross_entropy(self.other(self.net(batch[0])), batch[1])
            if not manual:
                return loss
            for optimizer in self._optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self._optimizers():
                optimizer.step()
            return None

        def _optimizers(self) -> list[Any]:
            found = self.optimizers()
            return found if isinstance(found, list) else [found]

        def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            self.log("val_loss", nn.functional.cross_entropy(self.other(self.net(batch[0])), batch[1]))

        def on_after_backward(self) -> None:
            if watched:
                assert_gradients_clean(self, self.held)

        def on_train_batch_end(self, *args: Any) -> None:
            self.steps += 1
            if watched:
                assert_model_holds(self, self.held, "after a batch")

        def configure_optimizers(self) -> Any:
            split = [self.net.parameters(), self.other.parameters()] if optimizers == 2 else [self.parameters()]
            made = [torch.optim.AdamW(p, lr=0.05, weight_decay=0.1) for p in split]
            schedules = [torch.optim.lr_scheduler.StepLR(o, 1) for o in made]
            if not scheduled:
                return made
            if manual:
                return made, schedules
            return made, [*schedules, torch.optim.lr_scheduler.OneCycleLR(made[0], max_lr=0.1, total_steps=99)]

    return Module()


def _data() -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(24, 1, 4, 4, generator=generator)
    return DataLoader(TensorDataset(images, (images.mean((1, 2, 3)) > 0).long()), batch_size=6)


def _trainer(package: str, tmp_path: Path, *callbacks: Any, **options: Any) -> Any:
    defaults = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    return importlib.import_module(package).Trainer(callbacks=list(callbacks), **{**defaults, **options})


packages = pytest.mark.parametrize("package", PACKAGES)


@packages
@pytest.mark.parametrize(
    ("module_options", "trainer_options"),
    [
        ({}, {}),
        ({"manual": True}, {}),
        ({"manual": True, "optimizers": 2}, {}),
        ({}, {"accumulate_grad_batches": 2}),
        ({}, {"gradient_clip_val": 0.01}),
        ({}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
        ({}, {"precision": "bf16-mixed"}),
        ({"scheduled": False}, {}),
    ],
    ids=["plain", "manual", "two_optimizers", "accumulate", "clip_norm", "clip_value", "bf16_mixed", "no_scheduler"],
)
def test_entries_hold_through_fit(
    package: str, module_options: dict[str, Any], trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    module = _module(package, **module_options)
    callback = FreezeEntries(SPEC)
    _trainer(package, tmp_path, callback, **trainer_options).fit(module, _data(), _data())
    assert module.steps == 8
    assert_model_holds(module, module.held, "after fit")
    assert callback.frozen is not None
    assert not callback.frozen.attached


@packages
def test_free_entries_train(package: str, tmp_path: Path) -> None:
    module = _module(package)
    before = module.net[2].weight.detach().clone()
    _trainer(package, tmp_path, FreezeEntries(SPEC)).fit(module, _data(), _data())
    moved = module.net[2].weight != before
    assert bool(moved[~module.held["net.2.weight"].frozen].all())


@packages
@pytest.mark.parametrize("compact", [False, True], ids=["masked", "compact"])
def test_a_fit_equals_the_plain_loop_bit_for_bit(package: str, compact: bool, tmp_path: Path) -> None:
    module, plain = (_module(package, scheduled=False) for _ in range(2))
    plain.load_state_dict(module.state_dict())
    _trainer(package, tmp_path, FreezeEntries(SPEC, compact=compact)).fit(module, _data(), _data())
    (inner,) = plain.configure_optimizers()
    optimizer = MaskedOptimizer(inner, freeze_entries(plain, SPEC), compact=compact)
    for batch in [*_data(), *_data()]:
        optimizer.zero_grad()
        plain.training_step(batch, 0).backward()
        optimizer.step()
    assert all(same_bits(a, b) for a, b in zip(module.parameters(), plain.parameters(), strict=True))


def test_the_module_checks_can_fail(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"not \+0\.0"):
        _trainer(PACKAGES[0], tmp_path).fit(_module(PACKAGES[0]), _data(), _data())


@packages
def test_optimizers_stay_the_objects_that_the_module_made(package: str, tmp_path: Path) -> None:
    module = _module(package)
    trainer = _trainer(package, tmp_path, FreezeEntries(SPEC))
    trainer.fit(module, _data(), _data())
    assert type(trainer.optimizers[0]) is torch.optim.AdamW
    assert trainer.lr_scheduler_configs[0].scheduler.optimizer is trainer.optimizers[0]
    assert not trainer.optimizers[0]._optimizer_step_post_hooks


@packages
def test_log_keys_of_the_learning_rate_stay(package: str, tmp_path: Path) -> None:
    library = importlib.import_module(package)
    monitor = importlib.import_module(f"{package}.callbacks").LearningRateMonitor()
    logger = importlib.import_module(f"{package}.loggers").CSVLogger(tmp_path)
    trainer = _trainer(package, tmp_path, FreezeEntries(SPEC), monitor, logger=logger, log_every_n_steps=1)
    trainer.fit(_module(package), _data(), _data())
    assert "lr-AdamW" in monitor.lrs
    assert library.__name__ == package


@packages
def test_a_masked_optimizer_returned_by_the_module_works_beside_it(package: str, tmp_path: Path) -> None:
    module = _module(package)
    configure = module.configure_optimizers

    def wrapped() -> Any:
        return MaskedOptimizer(configure()[0][0], ())

    module.configure_optimizers = wrapped
    _trainer(package, tmp_path, FreezeEntries(SPEC)).fit(module, _data(), _data())
    assert module.steps == 8


@packages
def test_averaged_weights_hold(package: str, tmp_path: Path) -> None:
    averaging = importlib.import_module(f"{package}.callbacks").WeightAveraging
    checkpoint = importlib.import_module(f"{package}.callbacks").ModelCheckpoint(tmp_path, save_last=True)
    for callbacks in ([averaging(), FreezeEntries(SPEC)], [FreezeEntries(SPEC), averaging()]):
        module = _module(package)
        _trainer(package, tmp_path, *callbacks, checkpoint, enable_checkpointing=True).fit(module, _data(), _data())
        assert_model_holds(module, module.held, "after averaging")
        saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
        assert_entries_hold(saved["state_dict"], module.held, "in the averaged checkpoint")


@packages
def test_entries_hold_beside_model_pruning(package: str, tmp_path: Path) -> None:
    callbacks = importlib.import_module(f"{package}.callbacks")
    module = _module(package, watched=False)  # pruning renames the parameter that the watch looks at
    del module.held["net.2.weight"], module.held["net.2.bias"]
    pruning = callbacks.ModelPruning(
        "l1_unstructured", parameters_to_prune=[(module.net[0], "weight")], amount=0.3, use_global_unstructured=False
    )
    _SaveLast(package, tmp_path)(FreezeEntries("net.0[center] = 0"), pruning, epochs=2, module=module)
    assert_model_holds(module, module.held, "after pruning")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert_entries_hold(saved["state_dict"], module.held, "in the pruned checkpoint")


class _SaveLast:
    """Fits for some epochs and saves a checkpoint at the end of each."""

    def __init__(self, package: str, folder: Path) -> None:
        self.package, self.folder = package, folder

    def __call__(self, *callbacks: Any, epochs: int, resume: bool = False, module: Any = None) -> Any:
        module = _module(self.package) if module is None else module
        save = importlib.import_module(f"{self.package}.callbacks").ModelCheckpoint(self.folder, save_last=True)
        trainer = _trainer(self.package, self.folder, *callbacks, save, max_epochs=epochs, enable_checkpointing=True)
        trainer.fit(module, _data(), _data(), ckpt_path=self.folder / "last.ckpt" if resume else None)
        return module


@packages
def test_a_resumed_run_equals_one_never_interrupted(package: str, tmp_path: Path) -> None:
    whole = _SaveLast(package, tmp_path / "whole")(FreezeEntries(SPEC), epochs=3)
    fit = _SaveLast(package, tmp_path / "parts")
    fit(FreezeEntries(SPEC), epochs=1)
    resumed = fit(FreezeEntries(SPEC), epochs=3, resume=True)
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert same_bits(ours, theirs)


@packages
def test_regions_chosen_by_numbers_come_from_the_checkpoint(package: str, tmp_path: Path) -> None:
    fit = _SaveLast(package, tmp_path)
    first, again = FreezeEntries("net.0[smallest(0.5)] = 0.25"), FreezeEntries("net.0[smallest(0.5)] = 0.25")
    fit(first, epochs=1, module=_module(package, watched=False))
    fit(again, epochs=2, module=_module(package, watched=False), resume=True)
    assert first.frozen is not None
    assert again.frozen is not None
    assert first.frozen["net.0.weight"].frozen.equal(again.frozen["net.0.weight"].frozen)


@packages
def test_resuming_under_other_rules_is_refused(package: str, tmp_path: Path) -> None:
    fit = _SaveLast(package, tmp_path)
    fit(FreezeEntries(SPEC), epochs=1)
    with (
        pytest.warns(UserWarning, match="callbacks used to create the checkpoint"),
        pytest.raises(StateMismatchError, match=r"saved under other rules: .*net\.2\.bias.*; give the callback"),
    ):
        fit(FreezeEntries("net.0[center] = 0"), epochs=2, resume=True)


@packages
@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        ({"format": 99}, "the state of `FreezeEntries` has format 99, expected 2; load it with the version of"),
        ({"released": True}, r"`FreezeEntries` cannot be read \(KeyError: 'format'\); resume from a checkpoint that"),
    ],
    ids=["another_format", "no_format"],
)
def test_a_checkpoint_of_another_format_is_refused(
    package: str, spoilt: dict[str, Any], message: str, tmp_path: Path
) -> None:
    fit, path = _SaveLast(package, tmp_path), tmp_path / "last.ckpt"
    fit(FreezeEntries(SPEC), epochs=1)
    checkpoint = torch.load(path, weights_only=True)
    assert set(checkpoint["callbacks"][FreezeEntries(SPEC).state_key]) == {"format", "released", "frozen"}
    checkpoint["callbacks"][FreezeEntries(SPEC).state_key] = spoilt
    torch.save(checkpoint, path)
    with pytest.raises(StateMismatchError, match=message):
        fit(FreezeEntries(SPEC), epochs=2, resume=True)


@packages
def test_a_checkpoint_of_an_unfrozen_run_resumes_frozen(package: str, tmp_path: Path) -> None:
    fit = _SaveLast(package, tmp_path)
    plain = fit(epochs=1, module=_module(package, watched=False))
    module = _module(package)
    module.held["net.2.bias"] = Held(torch.ones(2, dtype=torch.bool), plain.net[2].bias.detach().clone())
    fit(FreezeEntries(SPEC), epochs=2, module=module, resume=True)
    assert_model_holds(module, module.held, "after resuming a plain run")


@packages
def test_entries_are_let_go_at_until_epoch_and_stay_free_on_resuming(package: str, tmp_path: Path) -> None:
    fit = _SaveLast(package, tmp_path)
    module = _module(package, watched=False)
    held: list[bool] = []
    module.on_train_batch_end = lambda *args: held.append(bool((module.net[2].bias == 0.5).all()))
    fit(FreezeEntries("net.2.bias = 0.5", until_epoch=1), epochs=2, module=module)
    assert held == [True] * 4 + [False] * 4

    resumed = FreezeEntries("net.2.bias = 0.5", until_epoch=1)
    again = fit(resumed, epochs=3, module=_module(package, watched=False), resume=True)
    assert resumed.frozen is None
    assert not bool((again.net[2].bias == 0.5).any())


@packages
def test_drift_is_raised_at_the_end_of_the_epoch(package: str, tmp_path: Path) -> None:
    module = _module(package, watched=False)
    step = module.optimizer_step

    def spoil(*args: Any, **kwargs: Any) -> None:
        step(*args, **kwargs)
        module.net[2].weight.data[0, 1] = 7.0

    module.optimizer_step = spoil
    callback = FreezeEntries(SPEC)
    with pytest.raises(DriftError, match=r"net\.2\.weight\[0, 1\]` holds 7\.0 instead of 1\.0"):
        _trainer(package, tmp_path, callback).fit(module, _data(), _data())
    assert callback.frozen is not None
    assert not callback.frozen.attached


@packages
@pytest.mark.parametrize("validated", [True, False], ids=["validated", "not_validated"])
def test_averages_that_start_late_or_round_hold_in_the_checkpoint(
    package: str, validated: bool, tmp_path: Path
) -> None:
    averaging = importlib.import_module(f"{package}.callbacks").EMAWeightAveraging
    for options in ({"update_starting_at_step": 1000}, {"decay": 0.9}):
        module = _module(package)
        if not validated:
            module.validation_step = None
        save = importlib.import_module(f"{package}.callbacks").ModelCheckpoint(tmp_path, save_last=True)
        callbacks = [averaging(**options), FreezeEntries(SPEC), save]
        trainer = _trainer(package, tmp_path, *callbacks, enable_checkpointing=True)
        trainer.fit(module, _data(), _data() if validated else None)
        saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
        assert_entries_hold(saved["state_dict"], module.held, f"in the averaged checkpoint, {options}")
        assert_model_holds(module, module.held, "after averaging")


@packages
@pytest.mark.parametrize("freeze_first", [True, False], ids=["freeze_first", "prune_first"])
def test_lottery_tickets_do_not_count_as_drift(package: str, freeze_first: bool, tmp_path: Path) -> None:
    module = _module(package, watched=False)
    pruning = importlib.import_module(f"{package}.callbacks").ModelPruning(
        "l1_unstructured",
        parameters_to_prune=[(module.net[0], "weight")],
        amount=0.3,
        use_global_unstructured=False,
        use_lottery_ticket_hypothesis=True,
    )
    freeze = FreezeEntries("net.0[center] = 0")
    callbacks = [freeze, pruning] if freeze_first else [pruning, freeze]
    _trainer(package, tmp_path, *callbacks).fit(module, _data(), _data())
    assert bool((module.net[0].weight[..., 1, 1] == 0).all())


@packages
def test_parameters_that_join_an_optimizer_later_are_held(package: str, tmp_path: Path) -> None:
    finetuning = importlib.import_module(f"{package}.callbacks").BackboneFinetuning(1, verbose=False)
    module = _module(package, watched=False)
    module.backbone = module.net
    module.net = None
    module.forward = lambda x: module.other(module.backbone(x))

    def training_step(batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(module(batch[0]), batch[1])

    module.training_step, module.validation_step = training_step, None
    module.configure_optimizers = lambda: torch.optim.AdamW(
        [p for p in module.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1
    )
    freeze = FreezeEntries("backbone.0[center] = 0.5")
    _trainer(package, tmp_path, freeze, finetuning, max_epochs=3).fit(module, _data())
    assert bool((module.backbone[0].weight[..., 1, 1] == 0.5).all())


@packages
def test_optimizers_made_anew_in_mid_fit_are_guarded(package: str, tmp_path: Path) -> None:
    module = _module(package, scheduled=False)
    module.on_train_epoch_start = lambda: module.trainer.strategy.setup_optimizers(module.trainer)
    _trainer(package, tmp_path, FreezeEntries(SPEC)).fit(module, _data(), _data())
    assert module.steps == 8


@packages
@pytest.mark.parametrize("manual", [False, True], ids=["", "manual"])
@pytest.mark.parametrize("when", ["on_train_epoch_start", "on_train_batch_start"])
def test_optimizers_made_anew_in_mid_fit_are_compact(when: str, manual: bool, package: str, tmp_path: Path) -> None:
    def fit(*, compact: bool) -> Any:
        module = _module(package, scheduled=False, manual=manual)
        sizes: list[int] = []

        def renew(*args: Any) -> None:
            if len(sizes) % 3 == 0:
                module.trainer.strategy.setup_optimizers(module.trainer)

        def look(*args: Any) -> None:
            (optimizer,) = module.trainer.optimizers
            sizes.append(optimizer.state[module.net[2].weight]["exp_avg"].numel())

        setattr(module, when, renew)
        watch = importlib.import_module(package).Callback()
        watch.on_train_batch_end = look
        _trainer(package, tmp_path, FreezeEntries(SPEC, compact=compact), watch).fit(module, _data(), _data())
        assert sizes == [95 if compact else 96] * 8
        return module

    compact, plain = fit(compact=True), fit(compact=False)
    assert all(same_bits(a, b) for a, b in zip(compact.parameters(), plain.parameters(), strict=True))


def test_a_callback_starts_every_fit_afresh(tmp_path: Path) -> None:
    callback = FreezeEntries("net.2.bias", until_epoch=1)
    for _ in range(2):
        module = _module(PACKAGES[0], watched=False)
        kept = module.net[2].bias.detach().clone()
        _trainer(PACKAGES[0], tmp_path, callback, max_epochs=1).fit(module, _data(), _data())
        assert same_bits(module.net[2].bias, kept)
    with torch.no_grad():
        module.net[2].bias.fill_(9)
    _trainer(PACKAGES[0], tmp_path, callback, max_epochs=1).fit(module, _data(), _data())
    assert module.net[2].bias.tolist() == [9, 9]


def test_a_module_that_got_a_new_layer_between_two_fits_is_frozen_anew(tmp_path: Path) -> None:
    module, callback = _module(PACKAGES[0], watched=False), FreezeEntries("net.2.weight[0, 1] = 1")
    for _ in range(2):
        module.net[2] = nn.Linear(48, 2)
        _trainer(PACKAGES[0], tmp_path, callback, max_epochs=1).fit(module, _data(), _data())
        assert module.net[2].weight[0, 1] == 1


@packages
def test_entries_are_let_go_where_a_run_resumes_at_the_end_of_an_epoch(package: str, tmp_path: Path) -> None:
    save = importlib.import_module(f"{package}.callbacks").ModelCheckpoint(
        tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1
    )
    for epochs, start in ((2, None), (3, tmp_path / "step=8.ckpt")):
        module = _module(package, watched=False)
        callback = FreezeEntries("net.2.bias = 0.5", until_epoch=2)
        trainer = _trainer(package, tmp_path, callback, save, max_epochs=epochs, enable_checkpointing=True)
        trainer.fit(module, _data(), _data(), ckpt_path=start)
        assert bool((module.net[2].bias == 0.5).all()) == (start is None)


@packages
def test_a_checkpoint_without_frozen_entries_left_says_so(package: str, tmp_path: Path) -> None:
    fit = _SaveLast(package, tmp_path)
    fit(FreezeEntries("net.2.bias = 0.5", until_epoch=1), epochs=2, module=_module(package, watched=False))
    with pytest.warns(UserWarning, match="nothing is frozen in this run either. To freeze again"):
        fit(FreezeEntries("net.2.bias = 0.5"), epochs=3, module=_module(package, watched=False), resume=True)


def test_until_epoch_0_leaves_the_weights_alone(tmp_path: Path) -> None:
    module = _module(PACKAGES[0], watched=False)
    callback = FreezeEntries("net.2.bias = 0.5", until_epoch=0)
    _trainer(PACKAGES[0], tmp_path, callback, max_epochs=0).fit(module, _data(), _data())
    assert not bool((module.net[2].bias == 0.5).any())


@packages
def test_what_is_frozen_is_reported_at_the_start(
    package: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger(package)
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, logger=package):
            _trainer(package, tmp_path, FreezeEntries(SPEC), max_epochs=1).fit(_module(package), _data(), _data())
    finally:
        logger.removeHandler(caplog.handler)
    assert "6 of 134 entries are frozen" in caplog.text
    assert "net.2.weight  (2, 48)" in caplog.text


def test_a_fit_that_follows_another_holds_on(tmp_path: Path) -> None:
    module, callback = _module(PACKAGES[0]), FreezeEntries(SPEC)
    for _ in range(2):
        _trainer(PACKAGES[0], tmp_path, callback, max_epochs=1).fit(module, _data(), _data())
    assert module.steps == 8
    assert_model_holds(module, module.held, "after two fits")


def test_several_callbacks_share_a_trainer(tmp_path: Path) -> None:
    module = _module(PACKAGES[0])
    callbacks = [FreezeEntries(line) for line in SPEC.splitlines()]
    _trainer(PACKAGES[0], tmp_path, *callbacks).fit(module, _data(), _data())
    assert_model_holds(module, module.held, "under three callbacks")


def test_bad_rules_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(RuleSyntaxError, match="column 7"):
        FreezeEntries("net.0[@]")
    with pytest.raises(SpecError, match="until_epoch"):
        FreezeEntries(SPEC, until_epoch=-1)
    with pytest.raises(TargetError, match=r"did you mean `net\.0\.weight`"):
        _trainer(PACKAGES[0], tmp_path, FreezeEntries("net.0.weigth = 0")).fit(_module(PACKAGES[0]), _data(), _data())


_CLI = """
import sys, torch
sys.path.insert(0, {root!r})
from {package}.cli import LightningCLI
from tests.test_lightning import _data, _module
cli = LightningCLI(type(_module({package!r})), run=False, save_config_callback=None, args=["--config", {config!r}])
callback = next(c for c in cli.trainer.callbacks if type(c).__name__ == "FreezeEntries")
cli.trainer.fit(cli.model, _data(), _data())
print(*callback.rules, callback.until_epoch, callback.frozen.frozen_count, sep="|")
"""

_CONFIG = """
trainer:
  max_epochs: 1
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  callbacks:
    - class_path: freezehooks.integrations.lightning.FreezeEntries
      init_args:
        spec: {spec}
        until_epoch: 9
"""


@packages
@pytest.mark.parametrize(
    "spec",
    [
        '"net.0.weight[:, :, 1, 1] = 0\\nnet.2.weight[0, 1] = 1\\nnet.2.bias"',
        '["net.0.weight[:, :, 1, 1] = 0", "net.2.weight[0, 1] = 1", "net.2.bias"]',
        '{"net.0.weight": [":, :, 1, 1", 0], "net.2.weight": ["0, 1", 1], "net.2.bias": "..."}',
    ],
    ids=["text", "list", "mapping"],
)
def test_the_command_line_builds_it_from_yaml(package: str, spec: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(_CONFIG.format(spec=spec))
    root = str(Path(__file__).parents[1])
    script = _CLI.format(root=root, package=package, config=str(config))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    expected = "net.0.weight[:, :, 1, 1] = 0|net.2.weight[0, 1] = 1|net.2.bias = keep|9|6"
    assert done.stdout.strip().splitlines()[-1] == expected


_RESUME = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.test_lightning import SPEC, FreezeEntries, _SaveLast
from tests.claims import assert_model_holds
module = _SaveLast({package!r}, Path({folder!r}))(FreezeEntries(SPEC), epochs=2, resume=True)
assert_model_holds(module, module.held, "in a new process")
print("held", module.steps)
"""


@packages
def test_a_new_process_resumes_from_the_checkpoint(package: str, tmp_path: Path) -> None:
    _SaveLast(package, tmp_path)(FreezeEntries(SPEC), epochs=1)
    script = _RESUME.format(root=str(Path(__file__).parents[1]), package=package, folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "held 4"


def test_without_lightning_the_import_says_what_to_install() -> None:
    script = (
        "import sys; sys.modules.update({'lightning': None, 'pytorch_lightning': None})\n"
        "import importlib.util as u; u.find_spec = lambda name: None\n"
        "try:\n    import freezehooks.integrations.lightning\n"
        "except ModuleNotFoundError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert "pip install 'freezehooks[lightning]'" in done.stdout, done.stderr


@packages
def test_a_run_that_only_validates_is_left_alone(package: str, tmp_path: Path) -> None:
    module = _module(package, watched=False)
    before = module.net[0].weight.detach().clone()
    callback = FreezeEntries(SPEC)
    _trainer(package, tmp_path, callback).validate(module, _data(), verbose=False)
    assert callback.frozen is None
    assert same_bits(module.net[0].weight, before)


@packages
def test_it_skips_gradients_where_asked_to(package: str, tmp_path: Path) -> None:
    callback = FreezeEntries("net.2.weight[0] = 0", skip_gradients=True)
    module = _module(package, watched=False)
    _trainer(package, tmp_path, callback).fit(module, _data(), _data())
    assert callback.frozen is not None
    assert callback.frozen.rules == callback.rules
    assert not module.net[2].weight[0].any()
    assert bool(module.net[2].weight[1].any())
    assert not module.net[2]._forward_hooks
    with pytest.raises(UnsupportedParameterError, match="no gradient can be skipped"):
        _trainer(package, tmp_path, FreezeEntries("net.0.weight[center]", skip_gradients=True)).fit(
            module, _data(), _data()
        )
