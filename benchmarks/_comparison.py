"""Compare subjects on one task: rows of figures, and the claims that the figures keep or break."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import torch
from torch import Tensor

from freezehooks import FreezeError

from ._kernels import kernels_launched
from ._measure import Clock, Spread, Timing, added_milliseconds, interleave, ratios
from ._memory import peak_bytes, state_bytes
from .models import FULL, Sizes
from .subjects import FreezeHooks, Held, Plain, Task

NOTHING = Spread.of([])
"""A figure that was not measured."""

_INTEGERS: Final = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer dtype with as many bits as a floating-point number, by its size in bytes."""


@dataclass(frozen=True, slots=True)
class Options:
    """How to measure.

    Attributes:
        device: Where the models are.
        rounds: How many rounds count, or None for the number that each scenario needs.
        warm_up: How many rounds come first and do not count.
        sizes: How large the models are.
    """

    device: torch.device
    rounds: int | None = None
    warm_up: int = 5
    sizes: Sizes = FULL

    @property
    def steps(self) -> int:
        """Return the least number of training steps in a turn: several on CUDA, where the host runs ahead."""
        return 5 if self.device.type == "cuda" else 1

    def turns(self, usual: int) -> tuple[int, int]:
        """Return the rounds that count in a scenario, and those to warm up."""
        return (usual if self.rounds is None else self.rounds), self.warm_up


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim about a row, and whether the medians confirm it."""

    text: str
    held: bool

    def __str__(self) -> str:
        return f"{self.text}: {'held' if self.held else 'NOT HELD'}"


@dataclass(slots=True)
class Row:
    """The figures of one subject.

    Attributes:
        name: The subject.
        time: Milliseconds a round.
        ratio: The time over that of the reference in the same round.
        added: Milliseconds beyond the reference in the same round.
        fastest: The time of the fastest round over that of the reference's fastest.
        step: The time of the optimizer's step alone over the reference's.
        kernels: How many kernels a training step launches; None on the CPU.
        state: Bytes of the optimizer's state; None where there is no optimizer.
        extra: Bytes that freezing keeps in addition to model and optimizer.
        peak: The most bytes allocated at once in a step.
        entries: Whether the frozen entries held.
        claims: The claims about this row.
    """

    name: str
    time: Spread = NOTHING
    ratio: Spread = NOTHING
    added: Spread = NOTHING
    fastest: float = math.nan
    step: Spread = NOTHING
    kernels: int | None = None
    state: int | None = None
    extra: int | None = None
    peak: int | None = None
    entries: str = ""
    claims: list[Claim] = field(default_factory=list)

    def claim(self, text: str, held: bool) -> None:
        """Add a claim about this row."""
        self.claims.append(Claim(text, held))

    def claim_ratio(self, limit: float) -> None:
        """Claim that the whole step takes at most `limit` times as long as the plain one."""
        self.claim(f"at most {limit:g} x plain", self.ratio.median <= limit)

    def claim_step(self, limit: float) -> None:
        """Claim that the optimizer's step takes at most `limit` times as long as the plain one."""
        self.claim(f"step at most {limit:g} x plain", self.step.median <= limit)


@dataclass(slots=True)
class Case:
    """One comparison.

    Attributes:
        title: What was compared.
        rows: The figures, by subject.
        notes: What was left out, and why.
    """

    title: str
    rows: dict[str, Row]
    notes: list[str] = field(default_factory=list)

    def claim_less_than_alternatives(self, alternatives: Iterable[type[Plain]]) -> None:
        """Claim that this library adds less time than each alternative."""
        ours = self.rows[FreezeHooks.name]
        for alternative in alternatives:
            row = self.rows[alternative.name]
            row.claim(f"{ours.name} adds less", ours.added.median < row.added.median)

    def claim_not_above(self, other: type[Plain]) -> None:
        """Claim that this library takes at most the time of an alternative."""
        ours, its = self.rows[FreezeHooks.name], self.rows[other.name]
        ours.claim(f"not above {other.name}", ours.ratio.median <= its.ratio.median)

    def claim_added(self, other: type[Plain], times: float) -> None:
        """Claim that this library adds at most `times` the time that an alternative adds."""
        ours, its = self.rows[FreezeHooks.name], self.rows[other.name]
        ours.claim(f"adds at most {times:g} x {other.name}", ours.added.median <= times * its.added.median)


def rows_of(timings: Mapping[str, list[Timing]], reference: str) -> dict[str, Row]:
    """Summarize timings, comparing each round with the reference's time in the same round."""
    base = timings[reference]
    return {name: _row(name, found, base) for name, found in timings.items()}


def _row(name: str, found: list[Timing], base: list[Timing]) -> Row:
    own, its = [timing.whole for timing in found], [timing.whole for timing in base]
    row = Row(name, Spread.of([1e3 * seconds for seconds in own]), ratios(own, its), added_milliseconds(own, its))
    row.fastest = min(own) / min(its)
    row.step = ratios([timing.step for timing in found], [timing.step for timing in base])
    return row


def compare(title: str, kinds: Iterable[type[Plain]], task: Task, options: Options, rounds: int) -> Case:
    """Train a task with every kind of subject, in turns.

    On CUDA the optimizer's step is timed by itself in further rounds, half as many: to time it, the device has to be
    synchronized before and after it, which makes the whole step slower.

    Args:
        title: What is compared.
        kinds: The subjects; those that are not installed or do not support the task are left out with a note.
        task: What they train.
        options: How to measure.
        rounds: How many rounds this comparison needs.
    """
    subjects, notes = _built(kinds, task)
    clock, (count, warm_up) = Clock(options.device), options.turns(rounds)
    rows = rows_of(_timed(subjects, clock, count, warm_up), Plain.name)
    if not clock.reads_parts:
        apart = rows_of(_timed(subjects, Clock(options.device, parts=True), (count + 1) // 2, warm_up=1), Plain.name)
        for name, row in rows.items():
            row.step = apart[name].step
    for name, subject in subjects.items():
        _look_at(subject, rows[name], options.device)
    return Case(title, rows, notes)


def _timed(subjects: Mapping[str, Plain], clock: Clock, rounds: int, warm_up: int) -> dict[str, list[Timing]]:
    return interleave({name: partial(subject.turn, clock=clock) for name, subject in subjects.items()}, rounds, warm_up)


def _built(kinds: Iterable[type[Plain]], task: Task) -> tuple[dict[str, Plain], list[str]]:
    """Return the subjects by name, and why others were left out."""
    subjects: dict[str, Plain] = {}
    notes = []
    for kind in kinds:
        why = kind.missing()
        try:
            subjects |= {} if why else {kind.name: kind(task)}
        except FreezeError as error:
            why = str(error)
        if why:
            notes.append(f"{kind.name} left out: {why}")
    return subjects, notes


def _look_at(subject: Plain, row: Row, device: torch.device) -> None:
    """Fill in what is not a time: bytes, kernels, and whether the frozen entries held."""
    row.state, row.extra = state_bytes(subject.optimizer), subject.extra_bytes()
    row.entries, exact = whether_held(subject)
    subject.optimizer.zero_grad()
    row.peak = peak_bytes(subject.step, device)
    row.kernels = kernels_launched(subject.step, device)
    if isinstance(subject, FreezeHooks):
        row.claim("entries held", exact)


def whether_held(subject: Plain) -> tuple[str, bool]:
    """Describe the state of a subject's frozen entries, and return whether they hold bit for bit everywhere."""
    if not subject.freezes:
        return "not frozen", False
    seen, stored = _gaps(subject, subject.computed), _gaps(subject, subject.parameter)
    if seen.largest:
        return f"drifted by {seen.largest:.2g}", False
    if stored.largest:
        return f"in the forward; stored off by {stored.largest:.2g}", False
    if not stored.same_bits:
        return "but for the sign of 0", False
    return "bit for bit", True


@dataclass(frozen=True, slots=True)
class _Gaps:
    largest: float
    same_bits: bool


@torch.no_grad()
def _gaps(subject: Plain, read: Callable[[Held], Tensor]) -> _Gaps:
    """Return the largest distance of a frozen entry from its value, and whether all agree to the last bit."""
    largest, same = 0.0, True
    for held in subject.task.held:
        found = read(held)[held.index]
        wanted = torch.as_tensor(held.values(), dtype=found.dtype, device=found.device).expand_as(found)
        gap = (found - wanted).abs().max().item()
        largest = max(largest, math.inf if math.isnan(gap) else gap)
        same = same and _bits(found).equal(_bits(wanted))
    return _Gaps(largest, same)


def _bits(numbers: Tensor) -> Tensor:
    return numbers.contiguous().view(_INTEGERS[numbers.element_size()])
