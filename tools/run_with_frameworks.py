"""Run the tests of frameworks that are too large for every run: `python -m tools.run_with_frameworks`.

A fresh environment gets what `constraints-frameworks.txt` names and what the tests need; the tests run on this
checkout. A table shows the result and the version of each framework.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

from .run_on_wheel import ROOT, TOOLS_ALONE, environment, run

PINS: Final = ("constraints.txt", "constraints-frameworks.txt")

BESIDE: Final = ("pytorch-ignite", "skorch", "transformers", "accelerate", "peft", "PyYAML", "safetensors")
"""The packages that the tests need, whose versions are in `constraints.txt`."""

TESTS: Final = (
    "tests/test_frameworks.py",
    "tests/test_peft.py",
    "tests/test_docs.py::test_the_blocks_of_a_page_run_and_print_what_it_shows[docs/frameworks.md]",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the result for each framework, and return 1 if a test failed or was skipped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, help="an environment to make or to use again (default: one for this run)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="frameworks-") as folder:
        python = environment(options.venv or Path(folder) / "venv")
        results = Path(folder) / "results.xml"
        run([str(python), "-m", "pip", "install", "--quiet", *_constraints(), "torch", *packages()])
        # fastai requires it and trains without it; with another build than torch's, transformers cannot be imported
        run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision"])
        pytest = [str(python), "-m", "pytest", "-q", "-rs", "-W", "ignore", f"--junitxml={results}"]
        run([*pytest, *TESTS], cwd=ROOT, check=False)
        went = outcomes(results)
        print(*table(went, _versions(python)), sep="\n")
        return int(not went or any(set(each) != {"passed"} for each in went.values()))


def packages(root: Path = ROOT) -> list[str]:
    """Return what to install: the frameworks, and what the tests need in addition."""
    pins = (root / PINS[1]).read_text()
    return [*re.findall(r"^([\w-]+)==", pins, re.MULTILINE), *BESIDE, *TOOLS_ALONE]


def _constraints() -> list[str]:
    return [f"--constraint={ROOT / name}" for name in PINS]


def outcomes(results: Path) -> dict[str, Counter[str]]:
    """Count the tests that passed, failed and were skipped for each framework, from pytest's JUnit file.

    The framework is a test's first parameter; a test without parameters counts for its file.
    """
    found: dict[str, Counter[str]] = {}
    cases = ElementTree.parse(results).iter("testcase") if results.exists() else ()  # noqa: S314  # pytest's own
    for case in cases:
        framework = re.search(r"test_frameworks$", case.attrib["classname"]) and re.search(
            r"\[(\w+)", case.attrib["name"]
        )
        name = framework[1] if framework else case.attrib["classname"].rpartition(".test_")[2]
        ends = [each.tag for each in case if each.tag in ("failure", "error", "skipped")]
        found.setdefault(name, Counter())[_WORDS[ends[0]] if ends else "passed"] += 1
    return found


_WORDS: Final = {"failure": "failed", "error": "failed", "skipped": "skipped"}


def table(went: dict[str, Counter[str]], versions: dict[str, str]) -> list[str]:
    """Return the lines of the table, one for each framework, with the versions below."""
    width = max(map(len, went), default=0)
    rows = [f"{name:{width}}  " + ", ".join(f"{n} {word}" for word, n in each.items()) for name, each in went.items()]
    return [*rows, *(f"{name} {version}" for name, version in versions.items())]


def _versions(python: Path) -> dict[str, str]:
    """Return the versions of what was installed, and of torch."""
    frozen = [str(python), "-m", "pip", "freeze"]
    installed = dict(
        re.findall(r"^([\w-]+)==(\S+)$", subprocess.run(frozen, capture_output=True, text=True).stdout, re.MULTILINE)
    )
    return {name: installed[name] for name in ("torch", *packages()) if name in installed and name not in TOOLS_ALONE}


if __name__ == "__main__":
    sys.exit(main())
