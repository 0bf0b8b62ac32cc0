"""Measure what freezing entries costs, against plain training and against other ways to do it.

In each scenario all subjects start from the same weights, see the same data, and take turns in one process, in
another order each round. Each round compares a subject's time with that of plain training in the same round. The table
shows medians, with quartiles in parentheses, over all rounds but the first few.

  ms, x reference, added ms   the time of a training step; divided by the reference's; minus the reference's
  fastest x                   the fastest round over the reference's fastest: steadier if others use the machine too
  step x                      the optimizer's step only (with what comes right before and after) over the reference's
  kernels                     how many kernels a training step launches, on CUDA
  state, kept, peak           bytes of the optimizer's state; bytes that freezing keeps in addition; the most bytes
                              allocated at once in a step
  frozen entries              whether they held
  claims                      the claims about this row, and whether the medians confirm them

The reference is the first row; a difference is meaningful if it exceeds that of `plain again`. Claims that do not hold
are counted at the end; the exit status is 0 in any case, since a benchmark is not a test.

`--device cuda` measures larger models, with several training steps in a turn; the GPU is synchronized before and after
a turn but not in between. The optimizer's step is timed in turns of its own, with the GPU synchronized before and after
it. `--tiny` runs these scenarios too, on the CPU.

    python -m benchmarks                          the scenarios for the CPU
    python -m benchmarks --device cuda --quick    those for a GPU, in a few minutes
    python -m benchmarks --tiny --quick           all of them in seconds, where figures mean nothing
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import torch

from . import command_line, gpu, installation, many_layers, shared_kernel, training
from ._comparison import Case, Options
from ._machine import environment, restart
from ._report import broken, table, write_json
from .models import FULL, TINY

Scenario = Callable[[Options], Iterator[Case]]

ON_CPU: Final[dict[str, Scenario]] = {
    "center": training.center,
    "half": training.half,
    "pruned": training.pruned,
    "tokens": training.tokens,
    "rows": training.rows_alone,
    "many": many_layers.many,
    "value": training.value,
    "shared": shared_kernel.shared,
    "install": installation.install,
    "commands": command_line.commands,
}

ON_CUDA: Final[dict[str, Scenario]] = {
    "many": many_layers.many,
    "gpt2": gpu.gpt2,
    "resnet50": gpu.resnet50,
    "wide": gpu.wide,
    "wide_rows": gpu.wide_rows,
    "wide_tokens": gpu.wide_tokens,
}

SCENARIOS: Final = ON_CPU | ON_CUDA


def main() -> None:
    """Run the chosen scenarios and print what was found."""
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.list:
        print("\n\n".join(map(_description, SCENARIOS)))
        return
    if arguments.device.type == "cuda" and not torch.cuda.is_available():
        parser.error(
            "--device cuda: torch sees no CUDA device here; to see that its scenarios run, leave --device out and "
            "add --tiny"
        )
    restart(arguments.device, arguments.malloc == "kept")
    torch.set_num_threads(arguments.threads)
    facts = environment(arguments.device)
    print("\n".join(f"{name}: {fact}" for name, fact in facts.items()))
    found = {name: _run(name, _options(arguments)) for name in _chosen(arguments)}
    if arguments.json:
        write_json(arguments.json, facts, found)
    print(f"\n{len(broken(case for cases in found.values() for case in cases))} claims not held")


def _description(name: str) -> str:
    devices = [device for device, scenarios in (("cpu", ON_CPU), ("cuda", ON_CUDA)) if name in scenarios]
    return f"{name}: {inspect.getdoc(SCENARIOS[name])}\n\nRuns on: {', '.join(devices)}"


def _chosen(arguments: argparse.Namespace) -> list[str]:
    """Return the scenarios that were named, or those for the device; all of them with --tiny."""
    of_device = ON_CUDA if arguments.device.type == "cuda" else ON_CPU
    return arguments.scenario or list(SCENARIOS if arguments.tiny else of_device)


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
    add("--scenario", action="append", choices=SCENARIOS, help="run this scenario; repeatable (default: all)")
    add("--list", action="store_true", help="list the scenarios with their claims, and run nothing")
    add("--rounds", type=_positive, help="rounds that count in each comparison (as many as it needs)")
    add("--quick", action="store_true", help="two rounds to warm up and five that count: a rough estimate")
    add("--tiny", action="store_true", help="run all scenarios on tiny models, to see that everything works")
    add("--device", type=torch.device, default="cpu", help="where to train: cpu or cuda (%(default)s)")
    add("--threads", type=_positive, default=1, help="threads of torch (%(default)s)")
    add(
        "--malloc",
        choices=("kept", "default"),
        default="kept",
        help="kept: restart with an allocator that keeps freed memory, without which each step page-faults its big "
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
