"""Times subjects against one another, in turns, so that any disturbance of the machine affects all of them."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles of some numbers; all nan if there are none."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Spread:
        """Return the median and quartiles of some numbers."""
        if len(numbers) < 2:
            only = numbers[0] if numbers else math.nan
            return cls(only, only, only)
        return cls(*statistics.quantiles(numbers, n=4, method="inclusive"))


@dataclass(frozen=True, slots=True)
class Timing:
    """The seconds of one subject in one round.

    Attributes:
        whole: All that the subject does in a round.
        step: The optimizer's step only; nan if it was not timed.
    """

    whole: float
    step: float = math.nan


class Clock:
    """Reads the time once the device has finished all work so far.

    Attributes:
        reads_parts: Whether the optimizer's step is timed separately.

    Args:
        device: The device.
        parts: Whether to time the optimizer's step separately even if that makes the whole step slower: on CUDA, which
            has to be synchronized before and after it.
    """

    def __init__(self, device: torch.device, parts: bool = False) -> None:
        self._device = device
        self.reads_parts = parts or device.type != "cuda"

    def __call__(self) -> float:
        """Return the time in seconds."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def between(self) -> float:
        """Return the time between two parts of a training step, or nan if they are not timed separately."""
        return self() if self.reads_parts else math.nan


Turn = Callable[[int], Timing]
"""What a subject does in the round of a given number."""


def interleave(subjects: Mapping[str, Turn], rounds: int, warm_up: int) -> dict[str, list[Timing]]:
    """Let the subjects take turns, in another order each round.

    Args:
        subjects: What is timed, by name.
        rounds: How many rounds count.
        warm_up: How many more come first and do not count.

    Returns:
        The timings of each subject, one for each round, in the same order.
    """
    shuffled = random.Random(0)  # noqa: S311  # no secret
    timings: dict[str, list[Timing]] = {name: [] for name in subjects}
    order = list(subjects)
    with _collecting_between_rounds() as collect:
        for number in range(warm_up + rounds):
            shuffled.shuffle(order)
            for name in order:
                timings[name].append(subjects[name](number))
            collect()
    return {name: found[warm_up:] for name, found in timings.items()}


@contextmanager
def _collecting_between_rounds() -> Iterator[Callable[[], object]]:
    gc.collect()
    gc.freeze()  # exclude existing objects, so that garbage collections take next to no time
    gc.disable()
    try:
        yield gc.collect
    finally:
        gc.enable()
        gc.unfreeze()


def ratios(found: Sequence[float], reference: Sequence[float]) -> Spread:
    """Return the ratio to the reference's time in the same round."""
    return Spread.of([own / its for own, its in zip(found, reference, strict=True)])


def added_milliseconds(found: Sequence[float], reference: Sequence[float]) -> Spread:
    """Return the time beyond the reference's in the same round."""
    return Spread.of([1e3 * (own - its) for own, its in zip(found, reference, strict=True)])
