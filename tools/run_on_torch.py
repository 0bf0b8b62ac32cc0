"""Run the core tests on several releases of torch: `python -m tools.run_on_torch`, or `make test-versions`.

Each release gets a fresh environment, which is removed before the next one is made: with its CUDA libraries torch takes
some gigabytes. pip takes a CPU wheel where one of its indexes has it. What is tested is this checkout.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

from .run_on_wheel import TOOLS_ALONE, environment, run

ROOT: Final = Path(__file__).parents[1]

NEWEST: Final = "newest"
"""Whatever pip takes where no release is named."""

BETWEEN: Final = ("2.9.1", "2.11.0")
"""Releases between the oldest and the pinned one, on which torch.compile reads a module's hooks in other ways."""

NOT_CORE: Final = (
    "benchmarks",
    "cli*",
    "comparison",
    "cuda",
    "docs",
    "examples",
    "frameworks",
    "guarantees",
    "house",
    "lightning",
    "migration",
    "package",
    "peft",
    "plot",
    "rules_page",
    "tools",
    "transformers",
)
"""Tests of what is around the library, by the names of their files: they say nothing more on another torch."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the tests went on one release, in a line, and whether all ran and passed."""

    line: str
    passed: bool


def main(arguments: Sequence[str] | None = None) -> int:
    """Print how the tests went on each release, and return 1 where one could not be installed or a test failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("releases", nargs="*", default=releases(), help="such as 2.9.1, or newest (default: all)")
    outcomes = [_run_on(release) for release in parser.parse_args(arguments).releases]
    print(*(outcome.line for outcome in outcomes), sep="\n")
    return int(not all(outcome.passed for outcome in outcomes))


def releases(root: Path = ROOT) -> list[str]:
    """Return the releases to run on: the oldest that is supported, some between, the pinned and the newest one."""
    oldest, pinned = (_pinned_torch(root / name) for name in ("constraints-lowest.txt", "constraints.txt"))
    return [oldest, *BETWEEN, pinned, NEWEST]


def _pinned_torch(constraints: Path) -> str:
    return str(re.findall(r"^torch==(\S+)", constraints.read_text(), re.MULTILINE)[0])


def _run_on(release: str) -> Outcome:
    with tempfile.TemporaryDirectory(prefix=f"torch-{release}-") as folder:
        python = environment(Path(folder) / "venv")
        if _install(python, release, Path(folder)):
            return Outcome(f"torch {release}: not installed; pip says above why", passed=False)
        results, start = Path(folder) / "results.xml", time.monotonic()
        command = [str(python), "-m", "pytest", *pytest_arguments(), f"--junitxml={results}"]
        status = run(command, cwd=ROOT, check=False)
        seconds = time.monotonic() - start
        return Outcome(f"torch {_version(python)}: {counts(results)} in {seconds:.0f} s", passed=status == 0)


def _install(python: Path, release: str, folder: Path) -> int:
    """Install a release and what the tests need, in versions of its time, and return the exit status of pip."""
    constraint = folder / "constraints.txt"
    constraint.write_text(constraints(release))
    packages = ["torch" if release == NEWEST else f"torch=={release}", *TOOLS_ALONE]
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-cache-dir", "--constraint", str(constraint)]
    return run([*pip, *packages], check=False)


def constraints(release: str, root: Path = ROOT) -> str:
    """Return the versions to install beside a release: with the oldest, the oldest of all."""
    lowest = root / "constraints-lowest.txt"
    chosen = lowest if release == _pinned_torch(lowest) else root / "constraints.txt"
    return re.sub(r"^torch==.*\n", "", chosen.read_text(), flags=re.MULTILINE)


def pytest_arguments() -> list[str]:
    """Return what pytest is called with to run the core tests alone."""
    return [
        "-q",
        "-rs",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "tests",
        *(f"--ignore-glob=tests/test_{name}.py" for name in NOT_CORE),
    ]


def counts(results: Path) -> str:
    """Return how many tests passed, failed and were skipped, by what pytest wrote in the format of JUnit."""
    if not results.exists():
        return "pytest did not come to an end"
    suite = ElementTree.parse(results).getroot()[0]  # noqa: S314  # written by pytest a moment ago
    total, skipped = int(suite.attrib["tests"]), int(suite.attrib["skipped"])
    failed = int(suite.attrib["failures"]) + int(suite.attrib["errors"])
    return f"{total - skipped - failed} passed, {failed} failed, {skipped} skipped"


def _version(python: Path) -> str:
    asked = [str(python), "-c", "import torch; print(torch.__version__)"]
    return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
