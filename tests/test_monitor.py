"""Drift and gradient norms of frozen entries reach every logger, at the steps that are logged and no others."""

from __future__ import annotations

import csv
import importlib
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from freezehooks import SpecError, freeze_entries

pytest.importorskip("lightning")
pytest.importorskip("pytorch_lightning")

from freezehooks.integrations._figures import figures  # these after the skips
from freezehooks.integrations.lightning import FreezeEntries, FrozenEntriesMonitor

from .test_lightning import PACKAGES, SPEC, _data, _module, _trainer, packages, pytestmark  # noqa: F401

Curves = dict[str, dict[int, float]]
"""For each name, the number at each step."""

NAMES = ("net.0.weight", "net.2.weight", "net.2.bias")


def _logger(package: str) -> Any:
    """A logger that keeps what it is given."""
    base: Any = importlib.import_module(f"{package}.loggers.logger").Logger

    class Logger(base):  # type: ignore[misc]  # one of two packages
        name, version = "kept", 0

        def __init__(self) -> None:
            super().__init__()
            self.rows: list[tuple[int, dict[str, float]]] = []

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
            pass

        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            kept = {name: number for name, number in metrics.items() if name.startswith("freezehooks/")}
            if kept:
                self.rows.append((step, kept))

    return Logger()


def _fit(package: str, tmp_path: Path, module: Any, *callbacks: Any, every: int | None = 1, **options: Any) -> Any:
    logger = _logger(package)
    options = {"log_every_n_steps": 1, **options}  # Lightning warns where it is more than an epoch has
    trainer = _trainer(
        package, tmp_path, *callbacks, FrozenEntriesMonitor(every_n_steps=every), logger=logger, **options
    )
    trainer.fit(module, _data(), _data())
    return logger.rows


@packages
@pytest.mark.parametrize(
    ("module_options", "compact"),
    [({}, False), ({}, True), ({"manual": True}, False), ({"manual": True, "optimizers": 2}, False)],
    ids=["automatic", "compact", "manual", "two_optimizers"],
)
def test_held_entries_have_no_drift_and_no_gradient(
    package: str, module_options: dict[str, Any], compact: bool, tmp_path: Path
) -> None:
    rows = _fit(package, tmp_path, _module(package, **module_options), FreezeEntries(SPEC, compact=compact))
    assert [step for step, _ in rows] == list(range(8))
    for _, metrics in rows:
        assert set(metrics) == {
            f"freezehooks/{name}/{what}"
            for name in NAMES
            for what in ("drift", "gradient_norm_frozen", "gradient_norm_free")
        }
        assert all(metrics[f"freezehooks/{name}/drift"] == 0 for name in NAMES)
        assert all(metrics[f"freezehooks/{name}/gradient_norm_frozen"] == 0 for name in NAMES)
        assert metrics["freezehooks/net.0.weight/gradient_norm_free"] > 0
        assert metrics["freezehooks/net.2.bias/gradient_norm_free"] == 0  # all of it is frozen


def test_a_write_after_the_step_is_logged_as_drift(tmp_path: Path) -> None:
    module = _module(PACKAGES[0], watched=False)
    step = module.optimizer_step

    def spoil(*args: Any, **kwargs: Any) -> None:
        step(*args, **kwargs)
        module.net[0].weight.data[0, 0, 1, 1] = -0.5 if module.global_step == 2 else 0  # counted after this

    module.optimizer_step = spoil
    rows = _fit(PACKAGES[0], tmp_path, module, FreezeEntries(SPEC), max_steps=3)
    assert [metrics["freezehooks/net.0.weight/drift"] for _, metrics in rows] == [0, 0, 0.5]


@packages
def test_the_norms_are_those_of_the_whole_accumulated_gradient(package: str, tmp_path: Path) -> None:
    module = _module(package)
    found: list[float] = []
    module.on_before_optimizer_step = lambda optimizer: found.append(module.net[2].weight.grad.norm().item())
    rows = _fit(package, tmp_path, module, FreezeEntries(SPEC), accumulate_grad_batches=2, gradient_clip_val=1e-6)
    assert [step for step, _ in rows] == [0, 1, 2, 3]
    logged = [metrics["freezehooks/net.2.weight/gradient_norm_free"] for _, metrics in rows]
    assert logged == pytest.approx(found)


@packages
@pytest.mark.parametrize(("every", "steps"), [(3, [2, 5]), (None, [3, 7])], ids=["its_own", "the_trainers"])
def test_only_the_steps_asked_for_are_logged(
    package: str, every: int | None, steps: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []
    module = importlib.import_module("freezehooks.integrations.lightning")
    figures = module.figures

    def look(*args: Any, **kwargs: Any) -> Any:
        looked.append(1)
        return figures(*args, **kwargs)

    monkeypatch.setattr(module, "figures", look)
    rows = _fit(package, tmp_path, _module(package), FreezeEntries(SPEC), every=every, log_every_n_steps=4)
    assert [step for step, _ in rows] == steps
    assert len(looked) == 2 * len(steps)  # before and after those steps, and never else


def test_every_logger_is_told(tmp_path: Path) -> None:
    loggers = [_logger(PACKAGES[0]), _logger(PACKAGES[0])]
    callbacks = [FreezeEntries(SPEC), FrozenEntriesMonitor(every_n_steps=4)]
    trainer = _trainer(PACKAGES[0], tmp_path, *callbacks, logger=loggers, log_every_n_steps=1)
    trainer.fit(_module(PACKAGES[0]), _data(), _data())
    assert loggers[0].rows == loggers[1].rows != []


def _read_csv(folder: Path) -> Curves:
    (path,) = folder.rglob("metrics.csv")
    curves: Curves = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, number in row.items():
                if name.startswith("freezehooks/") and number:
                    curves.setdefault(name, {})[int(row["step"])] = float(number)
    return curves


def read_events(folder: Path, prefix: str = "freezehooks/") -> Curves:
    """Read what TensorBoard reads: records of a length, its checksum, an event and its checksum."""
    events = importlib.import_module("tensorboardX.proto.event_pb2")
    (path,) = folder.rglob("events.out.tfevents.*")
    rest, curves = path.read_bytes(), Curves()
    while rest:
        (length,) = struct.unpack("<Q", rest[:8])
        event, rest = events.Event.FromString(rest[12 : 12 + length]), rest[16 + length :]
        for value in event.summary.value:
            if value.tag.startswith(prefix):
                curves.setdefault(value.tag, {})[event.step] = value.simple_value
    return curves


@packages
@pytest.mark.parametrize(
    ("kind", "needed", "read"),
    [("CSVLogger", "csv", _read_csv), ("TensorBoardLogger", "tensorboardX", read_events)],
    ids=["csv", "tensorboard"],
)
def test_the_curves_are_in_the_files_of_the_logger(
    package: str, kind: str, needed: str, read: Callable[[Path], Curves], tmp_path: Path
) -> None:
    pytest.importorskip(needed)
    module, kept = _module(package), _logger(package)
    logger = getattr(importlib.import_module(f"{package}.loggers"), kind)(tmp_path)
    callbacks = [FreezeEntries(SPEC), FrozenEntriesMonitor()]
    trainer = _trainer(package, tmp_path, *callbacks, logger=[logger, kept], log_every_n_steps=2)
    trainer.fit(module, _data(), _data())
    logger.finalize("success")
    curves = read(tmp_path)
    assert len(curves) == 3 * len(NAMES)
    for name in NAMES:
        assert curves[f"freezehooks/{name}/drift"] == dict.fromkeys([1, 3, 5, 7], 0.0)
        assert curves[f"freezehooks/{name}/gradient_norm_frozen"] == dict.fromkeys([1, 3, 5, 7], 0.0)
    free = curves["freezehooks/net.2.weight/gradient_norm_free"]
    told = {step: numbers["freezehooks/net.2.weight/gradient_norm_free"] for step, numbers in kept.rows}
    assert free == pytest.approx(told)
    assert all(free.values())


def test_the_figures_of_a_plain_loop_are_the_same() -> None:
    """The figures that callbacks log: norms before a step, drift after it."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    freeze_entries(model, "0.weight[0] = 1\n1.bias")
    optimizer = torch.optim.SGD(model[0].parameters(), lr=1.0)
    model(torch.ones(1, 2)).sum().backward()
    model[0].weight.grad = torch.tensor([[3.0, 4.0], [6.0, 8.0]])
    assert figures(model, before_step_of=optimizer) == {
        "freezehooks/0.weight/gradient_norm_frozen": 5.0,
        "freezehooks/0.weight/gradient_norm_free": 10.0,
    }
    optimizer.step()  # it is not guarded
    assert figures(model) == {"freezehooks/0.weight/drift": 4.0, "freezehooks/1.bias/drift": 0.0}
    assert figures(nn.Linear(2, 2)) == {}


def test_logging_stops_where_the_entries_are_let_go(tmp_path: Path) -> None:
    module = _module(PACKAGES[0], watched=False)
    rows = _fit(PACKAGES[0], tmp_path, module, FreezeEntries(SPEC, until_epoch=1))
    assert [step for step, _ in rows] == [0, 1, 2, 3]


def test_what_was_frozen_by_hand_goes_by_the_names_of_the_whole_module(tmp_path: Path) -> None:
    module = _module(PACKAGES[0], watched=False)
    handles = [freeze_entries(module.net, "2.weight[0] = 1"), freeze_entries(module.other, "weight[0] = 0")]
    rows = _fit(PACKAGES[0], tmp_path, module, max_epochs=1)
    assert {name.split("/")[1] for _, metrics in rows for name in metrics} == {"net.2.weight", "other.weight"}
    assert rows[-1][1]["freezehooks/net.2.weight/drift"] > 0  # no optimizer was guarded
    assert all(handle.attached for handle in handles)


def test_two_callbacks_on_one_parameter_are_logged_as_one(tmp_path: Path) -> None:
    module = _module(PACKAGES[0], watched=False)
    callbacks = [FreezeEntries("net.2.weight[0] = 0"), FreezeEntries("net.2.weight[1] = 0")]
    rows = _fit(PACKAGES[0], tmp_path, module, *callbacks, max_epochs=1)
    assert all(metrics["freezehooks/net.2.weight/gradient_norm_free"] == 0 for _, metrics in rows)
    assert len(rows) == 4


def test_a_parameter_without_gradient_has_no_norms(tmp_path: Path) -> None:
    module = _module(PACKAGES[0], watched=False)
    module.unused = nn.Linear(2, 2)
    rows = _fit(PACKAGES[0], tmp_path, module, FreezeEntries("unused.weight[0] = 0"), max_epochs=1)
    assert [sorted(metrics) for _, metrics in rows] == [["freezehooks/unused.weight/drift"]] * 4


@packages
def test_a_trainer_without_logger_is_refused(package: str, tmp_path: Path) -> None:
    trainer = _trainer(package, tmp_path, FreezeEntries(SPEC), FrozenEntriesMonitor())
    with pytest.raises(SpecError, match="needs a logger, and the Trainer has none; give it one with"):
        trainer.fit(_module(package), _data(), _data())


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "1"])
def test_an_interval_that_is_no_number_of_steps_is_refused(every: Any) -> None:
    with pytest.raises(SpecError, match=r"`every_n_steps` must be a number of steps, or None, found .*1 or more"):
        FrozenEntriesMonitor(every_n_steps=every)
