"""The checks of each optimizer, and their results."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import torch
from torch import Tensor, optim

from freezehooks import FreezeError, MaskedOptimizer, freeze_entries

from .runs import ByHand, Guarded, Run, State, frozen_of, spec_of, values_of
from .subjects import Subject

STEPS: Final = 20
"""After how many steps frozen entries are thawed."""

ROOM: Final = 1.05
"""How far thawed entries may move, relative to the run by hand, if moments contain the weights' decay."""

YES: Final = "yes"
LIKE_BY_HAND: Final = "as by hand"
NOT_ASKED: Final = "-"
REFUSED: Final = "refused"

_CORRECTED: Final = (optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.Adamax)
"""The optimizers of torch whose thawed entries may move up to two learning rates a step, whatever they do by hand."""

_INTEGERS: Final = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Found:
    """The results for an optimizer; a cell that begins with `yes` or `as by hand` is as it should be.

    Attributes:
        name: Its package and the name that it has there.
        kind: Its class.
        held: Whether frozen entries held bit for bit after every step, guarded from the start or in mid-training.
        undisturbed: Whether free entries equaled those of the run by hand, bit for bit, after every step.
        resumed: Whether a run that resumed from saved states ended like the one that was not interrupted.
        copied: Whether a copy of the optimizer, with its model, trained on like the original.
        thaw: The largest step of thawed entries over that of the run by hand.
        is_thaw_kept: Whether that is within the limit.
        remarks: Why something was not checked, and what went wrong.
    """

    name: str
    kind: str = ""
    held: str = NOT_ASKED
    undisturbed: str = NOT_ASKED
    resumed: str = NOT_ASKED
    copied: str = NOT_ASKED
    thaw: str = NOT_ASKED
    is_thaw_kept: bool = True
    remarks: list[str] = field(default_factory=list)

    @property
    def was_asked(self) -> bool:
        """Whether the optimizer could be built."""
        return self.held != NOT_ASKED

    @property
    def is_kept(self) -> bool:
        """Whether everything is as it should be, which includes a rejection with its reason."""
        cells = (self.held, self.undisturbed, self.resumed, self.copied)
        is_kept = self.is_thaw_kept and all(cell.startswith((YES, LIKE_BY_HAND)) for cell in cells)
        return is_kept or self.held == REFUSED


def survey(subject: Subject) -> Found:
    """Run all checks on one optimizer."""
    found = Found(subject.name)
    if subject.missing:
        found.remarks.append(f"not built: needs {subject.missing}")
        return found
    with subject.around():
        try:
            run = Run(subject)
            found.kind = type(run.optimizer).__name__
            run.step(0)
        except Exception as error:  # whatever an optimizer raises
            found.remarks.append(f"not built: {_shown(error)}")
            return found
        try:
            _compare(Guarded(subject), ByHand(subject), found)
        except FreezeError as error:
            found.held = REFUSED
            found.remarks.append(_shown(error))
        except Exception as error:  # it is what was found
            found.held = f"NO: {_shown(error)}"
        if found.held == YES:
            found.held = _outcome(partial(_held_in_mid_training, subject))
    return found


def _compare(guarded: Guarded, by_hand: ByHand, found: Found) -> None:
    """Train both runs side by side, and check each for resuming and copying."""
    _train(guarded, by_hand, found, range(STEPS // 2))
    states = {run: _saved(run) for run in (guarded, by_hand)}
    _train(guarded, by_hand, found, range(STEPS // 2, STEPS))
    found.resumed = _like_by_hand(*(_outcome(partial(_resumed, *each)) for each in states.items()))
    found.copied = _like_by_hand(*(_outcome(partial(_copied, run)) for run in states))
    if not all(bool(weight.isfinite().all()) for weight in by_hand.weights().values()):
        found.remarks.append("weights are not finite, by hand too")
    _let_go(guarded, by_hand, found)


def _train(guarded: Guarded, by_hand: ByHand, found: Found, steps: range) -> None:
    for number in steps:
        guarded.step(number)
        by_hand.step(number)
        if found.held in (NOT_ASKED, YES):
            found.held = _whether_held(guarded, by_hand.values, number)
        if found.undisturbed in (NOT_ASKED, YES):
            found.undisturbed = _whether_alike(guarded, by_hand, number, of_free=True)


def _held_in_mid_training(subject: Subject) -> str:
    """Return whether entries hold that are frozen and guarded in mid-training."""
    run = Run(subject)
    run.steps(range(STEPS // 2))
    values = values_of(run.model)
    run.optimizer = MaskedOptimizer(run.optimizer, freeze_entries(run.model, spec_of(run.model)))
    for number in range(STEPS // 2, STEPS // 2 + STEPS):
        run.step(number)
        found = _whether_held(run, values, number)
        if found != YES:
            return f"{found}, frozen in mid-training"
    return YES


def _saved(run: Run) -> State | Exception:
    try:
        return run.saved()
    except Exception as error:  # that of some optimizers cannot be saved
        return error


def _resumed(run: Run, state: State | Exception) -> str:
    """Return whether a run that resumes halfway ends where this one is."""
    if isinstance(state, Exception):
        raise state
    resumed = type(run)(run.subject, state)
    resumed.steps(range(STEPS // 2, STEPS))
    return _whether_alike(resumed, run, STEPS - 1)


def _copied(run: Run) -> str:
    """Return whether a copy trains on like the run itself, which goes on in any case."""
    later = range(STEPS, 2 * STEPS)
    try:
        twin = run.copied()
        twin.steps(later)
    finally:
        run.steps(later)
    return _whether_alike(twin, run, 2 * STEPS - 1)


def _let_go(guarded: Guarded, by_hand: ByHand, found: Found) -> None:
    """Thaw frozen entries, and compare how far they move in a step."""
    largest = [_largest_step(run) for run in (guarded, by_hand)]
    found.thaw = f"{largest[0] / largest[1]:.3f}" if largest[1] else f"{largest[0]:.1e} / 0"
    found.is_thaw_kept = largest[0] <= ROOM * largest[1] or all(map(math.isnan, largest))
    if type(guarded.optimizer.inner) in _CORRECTED:
        rate = float(guarded.optimizer.param_groups[0]["lr"])
        found.remarks.append(f"thawed: {largest[0] / rate:.2f} learning rates, by hand {largest[1] / rate:.2f}")
        found.is_thaw_kept = largest[0] <= 2 * rate


def _largest_step(run: Run) -> float:
    frozen, largest = frozen_of(run.model), 0.0
    run.let_go()
    for number in range(2 * STEPS, 3 * STEPS):
        before = run.weights()
        run.step(number)
        steps = ((now - before[name])[frozen[name]] for name, now in run.weights().items())
        largest = max([largest, *(float(step.abs().max()) for step in steps)])
    return largest


# --------------------------------------------------------------------------------------------------------------------
# Cells


def _whether_held(run: Run, values: dict[str, Tensor], number: int) -> str:
    frozen = frozen_of(run.model)
    held = {name: torch.where(frozen[name], values[name], weight) for name, weight in run.weights().items()}
    return _difference(run.weights(), held, number)


def _whether_alike(run: Run, other: Run, number: int, *, of_free: bool = False) -> str:
    found, expected = run.weights(), other.weights()
    if of_free:
        frozen = frozen_of(run.model)
        found, expected = ({n: w[~frozen[n]] for n, w in each.items()} for each in (found, expected))
    return _difference(found, expected, number)


def _difference(found: dict[str, Tensor], expected: dict[str, Tensor], number: int) -> str:
    """Return `yes` if all bits are the same, or else how many entries differ and by how much."""
    off = {name: _differ(found[name], expected[name]) for name in found}
    count = sum(int(each.sum()) for each in off.values())
    if not count:
        return YES
    worst = max(float((found[name] - expected[name])[off[name]].abs().max()) for name in off if off[name].any())
    return f"NO: {count} off by {worst:.1e} after step {number + 1}"


def _differ(first: Tensor, second: Tensor) -> Tensor:
    integers = _INTEGERS[first.element_size()]
    return first.contiguous().view(integers) != second.contiguous().view(integers)


def _outcome(ask: Callable[[], str]) -> str:
    try:
        return ask()
    except Exception as error:  # it is what was found
        return f"NO: {_shown(error)}"


def _like_by_hand(guarded: str, by_hand: str) -> str:
    """Return the result of the guarded run if the run by hand does better, or else that both are alike."""
    if guarded == YES or by_hand == YES:
        return guarded
    return f"{LIKE_BY_HAND} ({by_hand.removeprefix('NO: ')})" if guarded == by_hand else f"{guarded}; by hand {by_hand}"


def _shown(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]
