"""Measure what freezing entries costs, against plain training and against other ways to do it.

In each scenario all subjects start from the same weights, see the same data, and take turns in one process, in
another order each round. A round gives each subject's time over the plain one's in that very round; printed are
medians, with quartiles in brackets, over the rounds after the first few.

  ms, x reference, added ms   the time of a training step; over the reference's; beyond the reference's
  fastest x                   the fastest round over the reference's fastest: steadier where others use the machine too
  step x                      the optimizer's step alone (with what comes right before and after) over the reference's
  state, kept, peak           bytes of the optimizer's state; that freezing keeps beside model and optimizer; that a
                              step has at once of what it allocates
  frozen entries              whether they held
  claims                      what must hold of this row, and whether it did, by the medians

The reference is the first row; a difference means something where it exceeds that of `plain again`. Claims that do
not hold are counted at the end; the exit status is 0 either way: a benchmark is no test.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import torch

from . import installation, shared_kernel, training
from ._comparison import Case, Options
from ._machine import environment, restart
from ._report import broken, table, write_json
from .models import FULL, TINY

SCENARIOS: Final[dict[str, Callable[[Options], Iterator[Case]]]] = {
    "centre": training.centre,
    "half": training.half,
    "pruned": training.pruned,
    "tokens": training.tokens,
    "many": training.many,
    "value": training.value,
    "shared": shared_kernel.shared,
    "install": installation.install,
}


def main() -> None:
    """Run the chosen scenarios and print what was found."""
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.list:
        print("\n\n".join(f"{name}: {inspect.getdoc(scenario)}" for name, scenario in SCENARIOS.items()))
        return
    if arguments.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    restart(arguments.device, arguments.malloc == "kept")
    torch.set_num_threads(arguments.threads)
    facts = environment(arguments.device)
    print("\n".join(f"{name}: {fact}" for name, fact in facts.items()))
    found = {name: _run(name, _options(arguments)) for name in arguments.scenario or SCENARIOS}
    if arguments.json:
        write_json(arguments.json, facts, found)
    print(f"\n{len(broken(case for cases in found.values() for case in cases))} claims not held")


def _run(name: str, options: Options) -> list[Case]:
    print(f"\n{name}: {inspect.getdoc(SCENARIOS[name])}", flush=True)
    torch.manual_seed(0)  # the same models and data, whichever scenarios came before
    cases = []
    for case in SCENARIOS[name](options):
        print(f"\n{table(case)}", flush=True)
        cases.append(case)
    return cases


def _options(arguments: argparse.Namespace) -> Options:
    rounds = 5 if arguments.quick and arguments.rounds is None else arguments.rounds
    return Options(arguments.device, rounds, 2 if arguments.quick else 5, TINY if arguments.tiny else FULL)


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--scenario", action="append", choices=SCENARIOS, help="run this one; may be repeated (all of them)")
    add("--list", action="store_true", help="say what the scenarios are and what must hold in each, and do nothing")
    add("--rounds", type=_positive, help="rounds that count, in every comparison (as many as each needs)")
    add("--quick", action="store_true", help="five rounds after two: a first impression, not a measurement")
    add("--tiny", action="store_true", help="models of a few entries: to see that everything runs")
    add("--device", type=torch.device, default="cpu", help="where to train: cpu or cuda (%(default)s)")
    add("--threads", type=_positive, default=1, help="threads of torch (%(default)s)")
    add(
        "--malloc",
        choices=("kept", "default"),
        default="kept",
        help="kept: start anew with an allocator that keeps freed memory, without which each step page-faults its big "
        "temporaries in again; default: as it is (%(default)s)",
    )
    add("--json", type=Path, metavar="FILE", help="write all figures to a file as well")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"found {number}, expected 1 or more")
    return number


if __name__ == "__main__":
    main()
