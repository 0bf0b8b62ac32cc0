"""Run the core tests on several releases of torch: `python -m tools.run_on_torch`, or `make test-versions`.

Each release gets a fresh environment, which is removed before the next one is made: with its CUDA libraries torch takes
several gigabytes. pip installs a CPU wheel if one of its indexes has it. The tests run on this checkout.
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

from .run_on_wheel import IN_PARALLEL, TOOLS_ALONE, environment, run

ROOT: Final = Path(__file__).parents[1]

NEWEST: Final = "newest"
"""The release that pip installs by default."""

BETWEEN: Final = ("2.9.1", "2.11.0")
"""Releases between the oldest and the pinned one, in which torch.compile reads a module's hooks differently."""

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
"""The files of tests that do not depend on torch, which need not run on other releases."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result on one release: a line to print, and whether all tests ran and passed."""

    line: str
    passed: bool


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the result on each release, and return 1 if one could not be installed or a test failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("releases", nargs="*", default=releases(), help="such as 2.9.1, or newest (default: all)")
    outcomes = [_run_on(release) for release in parser.parse_args(arguments).releases]
    print(*(outcome.line for outcome in outcomes), sep="\n")
    return int(not all(outcome.passed for outcome in outcomes))


def releases(root: Path = ROOT) -> list[str]:
    """Return the releases to run on: the oldest supported, some in between, the pinned and the newest one."""
    oldest, pinned = (_pinned_torch(root / name) for name in ("constraints-lowest.txt", "constraints.txt"))
    return [oldest, *BETWEEN, pinned, NEWEST]


def _pinned_torch(constraints: Path) -> str:
    return str(re.findall(r"^torch==(\S+)", constraints.read_text(), re.MULTILINE)[0])


def _run_on(release: str) -> Outcome:
    with tempfile.TemporaryDirectory(prefix=f"torch-{release}-") as folder:
        python = environment(Path(folder) / "venv")
        if _install(python, release, Path(folder)):
            return Outcome(f"torch {release}: not installed; see pip's message above", passed=False)
        results, start = Path(folder) / "results.xml", time.monotonic()
        command = [str(python), "-m", "pytest", *pytest_arguments(), f"--junitxml={results}"]
        status = run(command, cwd=ROOT, check=False)
        seconds = time.monotonic() - start
        return Outcome(f"torch {_version(python)}: {counts(results)} in {seconds:.0f} s", passed=status == 0)


def _install(python: Path, release: str, folder: Path) -> int:
    """Install a release and what the tests need, in matching versions, and return the exit status of pip."""
    constraint = folder / "constraints.txt"
    constraint.write_text(constraints(release))
    packages = ["torch" if release == NEWEST else f"torch=={release}", *TOOLS_ALONE]
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-cache-dir", "--constraint", str(constraint)]
    return run([*pip, *packages], check=False)


def constraints(release: str, root: Path = ROOT) -> str:
    """Return the constraints for a release: for the oldest, the oldest versions of everything."""
    lowest = root / "constraints-lowest.txt"
    chosen = lowest if release == _pinned_torch(lowest) else root / "constraints.txt"
    return re.sub(r"^torch==.*\n", "", chosen.read_text(), flags=re.MULTILINE)


def pytest_arguments() -> list[str]:
    """Return the arguments with which pytest runs only the core tests."""
    return [
        *IN_PARALLEL,
        "-q",
        "-rs",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "tests",
        *(f"--ignore-glob=tests/test_{name}.py" for name in NOT_CORE),
    ]


def counts(results: Path) -> str:
    """Count the tests that passed, failed and were skipped, from pytest's JUnit file."""
    if not results.exists():
        return "pytest did not finish"
    suite = ElementTree.parse(results).getroot()[0]  # noqa: S314  # written by pytest a moment ago
    total, skipped = int(suite.attrib["tests"]), int(suite.attrib["skipped"])
    failed = int(suite.attrib["failures"]) + int(suite.attrib["errors"])
    return f"{total - skipped - failed} passed, {failed} failed, {skipped} skipped"


def _version(python: Path) -> str:
    asked = [str(python), "-c", "import torch; print(torch.__version__)"]
    return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
