"""Lightning's averages of the weights hold what `FreezeEntries` holds, in either order of callbacks."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("lightning")
pytest.importorskip("pytorch_lightning")

from freezehooks.integrations.lightning import FreezeEntries  # after the skips

from .claims import assert_entries_hold, assert_model_holds, same_bits
from .test_lightning import PACKAGES, SPEC, _data, _module, _trainer, packages, pytestmark  # noqa: F401
from .zoo import Held

orders = pytest.mark.parametrize("order", [1, -1], ids=["averaged_first", "frozen_first"])
both = pytest.mark.parametrize(
    ("package", "order"), list(zip(PACKAGES, (1, -1), strict=True)), ids=["averaged_first", "frozen_first"]
)


def _swa(package: str, **options: Any) -> Any:
    callbacks = importlib.import_module(f"{package}.callbacks")
    return callbacks.StochasticWeightAveraging(swa_lrs=0.05, **{"swa_epoch_start": 1, **options})


def _round(average: Tensor, weight: Tensor, count: Any) -> Tensor:
    """Average in a way that moves constants by a rounding error."""
    return average * 0.3 + weight * 0.7


def _watched_to_the_end(module: Any) -> Any:
    """Make a module check that it holds after all callbacks have ended the training, and record that it did."""

    def look() -> None:
        assert_model_holds(module, module.held, "at the end of training")
        module.ended = True

    module.on_train_end, module.ended = look, False
    return module


def _with_batch_norm(module: Any) -> Any:
    module.other = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    return module


@packages
@orders
@pytest.mark.parametrize(
    ("averaging", "normed", "compact"),
    [
        ({}, False, True),
        ({}, True, False),
        ({"avg_fn": _round}, False, False),
        ({"avg_fn": _round, "swa_epoch_start": 3}, True, True),
    ],
    ids=["compact", "batch_norm", "rounding", "batch_norm_rounding_compact"],
)
def test_a_fit_with_stochastic_weight_averaging_holds_to_its_end(
    package: str, order: int, averaging: dict[str, Any], normed: bool, compact: bool, tmp_path: Path
) -> None:
    module = _watched_to_the_end(_module(package, scheduled=False))
    module = _with_batch_norm(module) if normed else module
    swa = _swa(package, **averaging)
    callbacks = [swa, FreezeEntries(SPEC, compact=compact)][::order]
    trainer = _trainer(package, tmp_path, *callbacks, max_epochs=3)
    trainer.fit(module, _data(), _data())
    assert module.ended
    assert module.steps == 12 + 4 * normed  # one more epoch for the statistics
    assert_model_holds(module, module.held, "after fit")
    assert_model_holds(swa._average_model, module.held, "in the average")
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert_entries_hold(saved["state_dict"], module.held, "in the checkpoint")
    (averaged,) = [each["average_model_state"] for each in saved["callbacks"].values() if "average_model_state" in each]
    assert_entries_hold(averaged, module.held, "in the average of the checkpoint")


def _averaging(package: str, kind: str) -> Any:
    callbacks = importlib.import_module(f"{package}.callbacks")
    if kind == "StochasticWeightAveraging":
        return _swa(package, avg_fn=_round)
    if not hasattr(callbacks, kind):
        pytest.skip(f"this Lightning has no {kind}")
    return getattr(callbacks, kind)(**({"avg_fn": _round} if kind == "WeightAveraging" else {"decay": 0.9}))


kinds = pytest.mark.parametrize("kind", ["StochasticWeightAveraging", "WeightAveraging", "EMAWeightAveraging"])


@both
@kinds
def test_free_entries_are_averaged_as_beside_constants(package: str, order: int, kind: str, tmp_path: Path) -> None:
    def fit(*, frozen: bool) -> Any:
        module = _module(package, scheduled=False, watched=False)
        module.net[2].bias.requires_grad_(frozen)
        freeze = [FreezeEntries("net.2.bias")] if frozen else []
        _trainer(package, tmp_path, *[_averaging(package, kind), *freeze][::order], max_epochs=3).fit(
            module, _data(), _data()
        )
        return module

    ours, theirs = fit(frozen=True), fit(frozen=False)
    for name, parameter in ours.named_parameters():
        if name != "net.2.bias":
            assert same_bits(parameter, theirs.get_parameter(name)), name


@both
@kinds
@pytest.mark.parametrize("value", ["-0.0", "keep", "inf", "nan"])
def test_values_that_averaging_moves_hold_wherever_the_average_is_looked_at(
    package: str, order: int, kind: str, value: str, tmp_path: Path
) -> None:
    module = _watched_to_the_end(_module(package, scheduled=False, watched=False))
    spec = f"net.2.bias = {value}"
    values = module.net[2].bias.detach().clone() if value == "keep" else torch.full((2,), -0.0)
    module.held = {"net.2.bias": Held(torch.ones(2, dtype=torch.bool), values)}
    if value in ("inf", "nan"):
        module.unused = nn.Parameter(torch.full((2,), float(value)))  # it would make any loss nan
        spec = "unused"
        module.held = {"unused": Held(torch.ones(2, dtype=torch.bool), module.unused.detach().clone())}
    averaging = _averaging(package, kind)

    def look(*args: Any) -> None:
        assert_model_holds(module, module.held, "in validation")

    module.validation_step = look
    callbacks = [averaging, FreezeEntries(spec)][::order]
    _trainer(package, tmp_path, *callbacks, max_epochs=3).fit(module, _data(), _data())
    assert module.ended
    average = averaging._average_model
    assert_model_holds(getattr(average, "module", average), module.held, "in the average")
    assert not any(each._forward_pre_hooks or each._state_dict_pre_hooks for each in average.modules())


@both
def test_a_resumed_run_with_stochastic_weight_averaging_equals_one_never_interrupted(
    package: str, order: int, tmp_path: Path
) -> None:
    def fit(start: Path | None = None) -> tuple[Any, Any]:
        module, swa = _module(package, scheduled=False), _swa(package, swa_epoch_start=2, avg_fn=_round)
        save = importlib.import_module(f"{package}.callbacks").ModelCheckpoint(
            tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True, enable_version_counter=False
        )
        callbacks = [*[swa, FreezeEntries(SPEC)][::order], save]
        trainer = _trainer(package, tmp_path, *callbacks, max_epochs=4, enable_checkpointing=True)
        trainer.fit(module, _data(), _data(), ckpt_path=start)
        return module, swa._average_model

    whole = fit()
    for epoch in range(3):
        resumed = fit(tmp_path / f"epoch={epoch}.ckpt")
        for ours, theirs in zip(resumed, whole, strict=True):
            assert all(same_bits(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@both
@kinds
def test_averages_follow_the_stages_of_callbacks(package: str, order: int, kind: str, tmp_path: Path) -> None:
    """What is thawed moves in the average too, and what is frozen later holds there from then on."""
    module = _watched_to_the_end(_module(package, scheduled=False, watched=False))
    first = module.net[2].bias[0].item()
    averaging = _averaging(package, kind)
    stages = [
        FreezeEntries("net.2.bias[0]", until_epoch=2),
        FreezeEntries("net.2.bias[1] = -0.0", from_epoch=2),
    ]
    module.held = {"net.2.bias": Held(torch.tensor([False, True]), torch.tensor([0.0, -0.0]))}
    _trainer(package, tmp_path, *[averaging, *stages][::order], max_epochs=4).fit(module, _data(), _data())
    average = averaging._average_model
    for each in (module, getattr(average, "module", average)):
        assert each.net[2].bias[0].item() != first
        assert_model_holds(each, module.held, "after fit")


@both
def test_statistics_that_are_gathered_anew_hold(package: str, order: int, tmp_path: Path) -> None:
    module = _watched_to_the_end(_with_batch_norm(_module(package, scheduled=False, watched=False)))
    statistics = module.other[0].running_mean.fill_(0.3)
    module.held, spec = {}, ["other.0.running_mean[0] = 0.25", "other.0.running_mean[1]"]
    callbacks = [_swa(package), FreezeEntries(spec)][::order]
    _trainer(package, tmp_path, *callbacks, max_epochs=3).fit(module, _data(), _data())
    assert module.other[0].running_mean is not statistics
    assert same_bits(module.other[0].running_mean, torch.tensor([0.25, 0.3]))


def test_a_module_with_a_part_named_module_is_averaged_as_a_whole(tmp_path: Path) -> None:
    module, package = _module(PACKAGES[0], scheduled=False, watched=False), PACKAGES[0]
    module.module = nn.Linear(2, 2)
    swa = _swa(package)
    _trainer(package, tmp_path, swa, FreezeEntries("net.2.bias = -0.0"), max_epochs=2).fit(module, _data(), _data())
    assert swa._average_model.net[2].bias.signbit().all()


def test_a_fit_that_breaks_off_leaves_no_hooks_on_the_average(tmp_path: Path) -> None:
    module, package = _module(PACKAGES[0], scheduled=False, watched=False), PACKAGES[0]

    def fail(*args: Any) -> None:
        raise OSError("no more data")

    swa, module.validation_step = _swa(package), fail
    with pytest.raises(OSError, match="no more data"):
        _trainer(package, tmp_path, swa, FreezeEntries(SPEC), max_epochs=2, num_sanity_val_steps=0).fit(
            module, _data(), _data()
        )
    assert not any(each._forward_pre_hooks or each._state_dict_pre_hooks for each in swa._average_model.modules())
