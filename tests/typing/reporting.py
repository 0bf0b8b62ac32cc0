"""What the handle reports, counts and draws, and errors about what is missing."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import nn
from typing_extensions import assert_type

from freezehooks import (
    CheckpointError,
    DriftError,
    FreezeError,
    FrozenEntries,
    Guard,
    Mechanisms,
    PartReport,
    Report,
    Trainable,
    UnguardedError,
    Violation,
)


def a_report_is_read_and_written(frozen: FrozenEntries) -> str:
    report = frozen.report()
    assert_type(report, Report)
    assert_type(report.parts, Mapping[str, PartReport])
    assert_type(report.holds, bool)
    assert_type(report.to_dict(), dict[str, Any])
    return str(report)


def what_a_report_says_of_a_parameter(part: PartReport) -> None:
    assert_type(part.name, str)
    assert_type(part.shape, tuple[int, ...])
    assert_type(part.rules, tuple[str, ...])
    assert_type(part.frozen + part.free + part.drifted + part.nbytes, int)
    assert_type(part.lowest, float | None)
    assert_type(part.highest, float | None)
    assert_type(part.drift, float)
    assert_type(part.mechanisms, Mechanisms)
    assert_type(part.missing, tuple[str, ...])


def what_holds_a_parameter(mechanisms: Mechanisms) -> None:
    assert_type(mechanisms.trained, bool)
    assert_type(mechanisms.gradient_hook, bool)
    assert_type(mechanisms.forward_hook, bool | None)
    assert_type(mechanisms.checkpoint_hooks, bool | None)
    assert_type(mechanisms.optimizers, tuple[str, ...])


def what_a_violation_says(violation: Violation) -> None:
    assert_type(violation.index, tuple[int, ...])
    assert_type(violation.expected, float | complex)
    assert_type(violation.drift, float)


def how_many_entries_train(frozen: FrozenEntries) -> str:
    assert_type(frozen.trainable(), Trainable)
    assert_type(frozen.trainable().trainable, int)
    assert_type(frozen.trainable().total, int)
    assert_type(frozen.trainable().percent, float)
    return str(frozen.trainable())


def a_picture(frozen: FrozenEntries, folder: Path) -> list[Figure]:
    assert_type(frozen.plot("conv.weight"), Figure)
    return [frozen.plot("conv.weight", "conv.png"), frozen.plot("conv.weight", path=folder / "conv.pdf")]


def checked_with_and_without_guards(frozen: FrozenEntries) -> tuple[Violation, ...]:
    try:
        frozen.assert_frozen()
        frozen.assert_frozen(guarded=False)
    except DriftError:
        return frozen.violations()
    except UnguardedError as error:
        assert_type(error.fact, str)
        assert_type(error.advice, str)
    return ()


def errors_are_the_fitting_builtins_too(
    unguarded: UnguardedError, checkpoint: CheckpointError
) -> tuple[FreezeError, RuntimeError, FreezeError, ValueError]:
    return unguarded, unguarded, checkpoint, checkpoint


def wrong_questions(frozen: FrozenEntries, model: nn.Module, guard: Guard, report: Report, part: PartReport) -> None:
    frozen.assert_frozen(False)  # type: ignore[call-arg]
    frozen.assert_frozen(guarded=guard)  # type: ignore[arg-type]
    frozen.report(model)  # type: ignore[call-arg]
    frozen.trainable(model)  # type: ignore[call-arg]
    frozen.plot()  # type: ignore[call-arg]
    frozen.plot(0)  # type: ignore[arg-type]
    frozen.plot("conv.weight", BytesIO())  # type: ignore[arg-type]
    report.holds = True  # type: ignore[misc]
    report["conv.weight"]  # type: ignore[index]
    part.drift = 0.0  # type: ignore[misc]
    part.missing()  # type: ignore[operator]
    share: int = frozen.trainable()  # type: ignore[assignment]
    del share
