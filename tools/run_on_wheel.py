"""Run the tests on the built wheel, as on a user's machine: `python -m tools.run_on_wheel --extras all`.

A fresh environment gets the wheel from `dist`, and the tests run from the unpacked source archive, away from this
checkout, so that anything missing from either shows. With all extras the typed code of `tests/typing` is checked
against the wheel too. Tests that build a wheel themselves are left to `make test`.
"""

from __future__ import annotations

import argparse
import configparser
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
NOT_FOR_USERS: Final = frozenset({"test", "docs", "bench"})
TOOLS_ALONE: Final = ("pytest", "pytest-xdist", "hypothesis", "numpy", "expecttest")

IN_PARALLEL: Final = ("--numprocesses=logical", "--maxprocesses=8", "--dist=loadgroup")
"""One process of tests for each core, as `make test` has them; tests on several ranks share one."""

OF_THE_SOURCES: Final = ("tests/test_package.py::test_the_wheel_holds_the_type_marker_and_neither_tests_nor_examples",)
"""It needs the folder `freezehooks` of a checkout, which must not be beside the tests, or it would be imported."""

_WHERE: Final = "import freezehooks, pathlib; print(pathlib.Path(freezehooks.__file__).parent.parent.name)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Install the wheel, check where the package is imported from, and return the exit status of pytest."""
    options = _options(arguments)
    with tempfile.TemporaryDirectory(prefix="wheel-") as folder:
        python = environment(options.venv or Path(folder) / "venv")
        tests = _unpacked(_only(options.dist, "*.tar.gz"), Path(folder) / "tests")
        _install(python, options.constraint, _only(options.dist, "*.whl"), options.extras == "all")
        _check_installed(python, tests)
        if options.extras == "all":
            run([str(python), "-m", "mypy", "tests/typing"], cwd=tests)
        return _pytest(python, tests, options.extras == "all", options.pytest)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--extras", choices=["none", "all"], default="none", help="which extras a user would name")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="the folder with one wheel and one sdist")
    parser.add_argument("--constraint", type=Path, default=ROOT / "constraints.txt", help="the versions to install")
    parser.add_argument("--venv", type=Path, help="an environment to make or to use again (default: one for this run)")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    return parser.parse_args(arguments)


def user_extras(setup: Path = ROOT / "setup.cfg") -> list[str]:
    """Return the extras that users install, in the order of `setup.cfg`."""
    config = configparser.ConfigParser()
    config.read_string(setup.read_text())
    return [name for name in config["options.extras_require"] if name not in NOT_FOR_USERS]


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"one {pattern} in {folder} expected, found {len(found)}; run `make wheel`")
    return found[0].resolve()


def environment(folder: Path) -> Path:
    """Return the interpreter of a virtual environment, which is created if it does not exist."""
    python = folder.resolve() / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    return python


def _unpacked(archive: Path, folder: Path) -> Path:
    """Unpack a source archive without the package, so that only the installed one is found."""
    with tarfile.open(archive) as files:
        if hasattr(tarfile, "data_filter"):  # 3.10 and 3.11 have it from a later patch on
            files.extraction_filter = tarfile.data_filter
        files.extractall(folder)  # noqa: S202  # built a moment ago by `make wheel`
    (tests,) = folder.iterdir()
    shutil.rmtree(tests / "freezehooks")
    return tests


def _install(python: Path, constraint: Path, wheel: Path, everything: bool) -> None:
    """Install the wheel as a user would, check what that installed, and only then add what the tests need."""
    pip = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(constraint.resolve())]
    extras = user_extras() if everything else []
    run([*pip, "--force-reinstall", "--no-deps", str(wheel)])
    run([*pip, f"{wheel}[{','.join(extras)}]" if extras else str(wheel)])
    run([str(python), "-m", "pip", "check"])
    run([*pip, *([f"{wheel}[test]"] if everything else TOOLS_ALONE)])


def _check_installed(python: Path, tests: Path) -> None:
    found = subprocess.run(
        [str(python), "-c", _WHERE], cwd=tests, env=_alone(), check=True, capture_output=True, text=True
    )
    if found.stdout.strip() != "site-packages":
        raise SystemExit(f"freezehooks was imported from {found.stdout.strip()}, expected site-packages")


def _pytest(python: Path, tests: Path, everything: bool, more: Sequence[str]) -> int:
    """Run the tests and the docstrings' examples, skipping modules whose extras are missing."""
    command = [str(python), "-m", "pytest", *IN_PARALLEL, "-q", "-rs", "--tb=short", "-p", "no:cacheprovider"]
    command += [] if everything else ["--doctest-ignore-import-errors"]
    command += [f"--deselect={test}" for test in OF_THE_SOURCES]
    return run([*command, *(more or ["tests", "--pyargs", "freezehooks"])], cwd=tests, check=False)


def _alone() -> Mapping[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def run(command: Sequence[str], cwd: Path | None = None, check: bool = True) -> int:
    """Print a command, run it outside this environment, and return its exit status, or exit with it if asked to."""
    print("+", *command, flush=True)
    status = subprocess.run(command, cwd=cwd, env=_alone()).returncode
    if check and status:
        raise SystemExit(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
