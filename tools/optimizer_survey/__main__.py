"""Try every optimizer that pytorch_optimizer and timm can build on the CPU: `python -m tools.optimizer_survey`.

Neither package is needed for anything else here. Install them, and what they import, in a separate folder:

    pip install --no-deps --target packages pytorch_optimizer timm torchvision einops
    PYTHONPATH=packages python -m tools.optimizer_survey

A small model trains with some entries frozen at a number and some at what they hold, beside the same model whose
gradients are zeroed by hand at frozen entries and whose values are written by hand. All comparisons are bit for bit.

  held         frozen entries after each of 20 steps, also if they are frozen only after 10 steps
  undisturbed  free entries after each step, against the run by hand
  resumed      a new run from the states saved after 10 steps, against the one that was not interrupted
  copied       a deepcopy of the `MaskedOptimizer` with its model, against the original, over 20 more steps
  thaw         the largest of 20 steps of thawed entries, over that of the run by hand: at most 1.05, or two learning
               rates for the optimizers of torch.optim with bias correction

`as by hand` means that the optimizer fails in the same way without this library.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch

import torch

from .checks import REFUSED, Found, survey
from .subjects import Subject, subjects

_HEADER = ("optimizer", "class", "held", "undisturbed", "resumed", "copied", "thaw", "remark")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table, and return 1 if anything is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", nargs="?", default="*", help="try only those that match, such as 'timm.*'")
    pattern = parser.parse_args(arguments).pattern
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")  # one of them compiles its step, for minutes
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    found = [_surveyed(subject) for subject in subjects() if fnmatch(subject.name, pattern)]
    print(_table(found))
    print(f"\n{_summary(found)}; {time.perf_counter() - start:.0f} seconds, torch {torch.__version__}")
    return int(not all(each.is_kept for each in found if each.was_asked))


def _surveyed(subject: Subject) -> Found:
    found = survey(subject)
    print(*_row(found), sep=" | ", file=sys.stderr, flush=True)  # all of them take minutes
    return found


def _table(found: Iterable[Found]) -> str:
    rows = [_HEADER, *map(_row, found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _row(found: Found) -> tuple[str, ...]:
    thaw = found.thaw if found.is_thaw_kept else f"NO: {found.thaw}"
    cells = found.held, found.undisturbed, found.resumed, found.copied, thaw
    return (found.name, found.kind, *cells, "; ".join(found.remarks))


def _summary(found: Sequence[Found]) -> str:
    asked = [each for each in found if each.was_asked]
    refused = sum(each.held == REFUSED for each in asked)
    wrong = sum(not each.is_kept for each in asked)
    kept = len(asked) - refused - wrong
    return f"{len(asked)} of {len(found)} built: {kept} as they should be, {refused} refused, {wrong} not"


if __name__ == "__main__":
    sys.exit(main())
