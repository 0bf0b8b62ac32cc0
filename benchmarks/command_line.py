"""How long the command line takes over files of many small tensors."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from freezehooks.cli import main

from ._comparison import Case, Options, Row
from ._measure import Clock, Spread, Timing, interleave


def commands(options: Options) -> Iterator[Case]:
    """Two files of 3,000 small tensors, every other one changed, are shown, compared and verified.

    Must hold: each takes less than two seconds.
    """
    count = 3 * options.sizes.chains[-1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder, count)
        before, now, rules = (str(folder / file) for file in ("a.pt", "b.pt", "r.txt"))
        asked = {
            "show": ["show", now],
            "diff": ["diff", before, now],
            "verify": ["verify", now, "--against", before, "--rule", "*[1:]"],
            "verify, a rule each": ["verify", now, "--against", before, "--rules", rules],
            "verify --train-only": ["verify", now, "--against", before, "--train-only", "*[0]"],
        }
        turns = {title: Command(arguments, Clock(torch.device("cpu"))).turn for title, arguments in asked.items()}
        rows = {}
        for title, timings in interleave(turns, *options.turns(5)).items():
            row = rows[title] = Row(title, Spread.of([1e3 * timing.whole for timing in timings]))
            row.claim("under 2 s", row.time.median < 2e3)
        yield Case(f"the command line, {count:,} tensors", rows)


def _write(folder: Path, count: int) -> None:
    before = {f"h.{n}.weight": torch.arange(32.0).view(8, 4) + n for n in range(count)}
    now = {name: tensor.clone() for name, tensor in before.items()}
    for n in range(0, count, 2):
        now[f"h.{n}.weight"][0] += 1
    torch.save(before, folder / "a.pt")
    torch.save(now, folder / "b.pt")
    (folder / "r.txt").write_text("\n".join(f"h.{n}[1:]" for n in range(count)), encoding="utf-8")


class Command:
    """Runs one command of `freezehooks` in this process."""

    def __init__(self, arguments: list[str], clock: Clock) -> None:
        self.arguments = arguments
        self.clock = clock

    def turn(self, number: int) -> Timing:
        """Return how long it took."""
        start = self.clock()
        with (
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            main(self.arguments)
        return Timing(self.clock() - start)
