"""Check the contents of the built wheel and source archive: `python -m tools.check_dist`, after `make wheel`.

The wheel must contain the whole package and nothing else, and the source archive all that git tracks except the
repository's own configuration. With `--release`, the version must be publishable and be in the changelog.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]

_MACHINERY: Final = re.compile(r"\.ci/|\.gitignore$")
_MADE: Final = re.compile(r"PKG-INFO$|[\w.]+\.egg-info/")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what is wrong, and return 1 if anything is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dist", type=Path, default=ROOT / "dist")
    parser.add_argument("--release", action="store_true", help="check the version and the changelog too")
    options = parser.parse_args(arguments)
    (wheel,), (archive,) = options.dist.glob("*.whl"), options.dist.glob("*.tar.gz")
    tracked = _tracked(ROOT)
    wrong = [*wrong_in_wheel(names_in_wheel(wheel), tracked), *wrong_in_archive(names_in_archive(archive), tracked)]
    if options.release:
        wrong += wrong_for_release(wheel.name.split("-")[1], (ROOT / "CHANGELOG.md").read_text())
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return int(bool(wrong))


def _tracked(root: Path) -> set[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=root, check=True, capture_output=True, text=True)  # noqa: S607
    return {name for name in listed.stdout.splitlines() if (root / name).exists()}


def names_in_wheel(wheel: Path) -> set[str]:
    """Return the files in a wheel."""
    with zipfile.ZipFile(wheel) as files:
        return set(files.namelist())


def names_in_archive(archive: Path) -> set[str]:
    """Return the files in a source archive, without their common folder."""
    with tarfile.open(archive) as files:
        return {member.name.split("/", 1)[1] for member in files if member.isfile()}


def wrong_in_wheel(names: Iterable[str], tracked: Iterable[str]) -> list[str]:
    """Describe where a wheel differs from the tracked files of the package, except for its metadata."""
    package = {name for name in tracked if name.startswith("freezehooks/")}
    held = set(names)
    metadata = {name for name in held if name.split("/")[0].endswith(".dist-info")}
    licences = [] if any(name.endswith("/LICENSE") for name in metadata) else ["the wheel lacks LICENSE"]
    return [*_differences("wheel", held - metadata, package), *licences]


def wrong_in_archive(names: Iterable[str], tracked: Iterable[str]) -> list[str]:
    """Describe where a source archive differs from the tracked files, except for files made by the build."""
    expected = {name for name in tracked if not _MACHINERY.match(name)}
    return _differences("source archive", {name for name in names if not _MADE.match(name)}, expected)


def _differences(where: str, found: set[str], expected: set[str]) -> list[str]:
    return [
        *(f"the {where} lacks {name}" for name in sorted(expected - found)),
        *(f"the {where} holds {name}, which it should not" for name in sorted(found - expected)),
    ]


def wrong_for_release(version: str, changelog: str) -> list[str]:
    """Describe what prevents a version from being published."""
    wrong = [] if re.fullmatch(r"\d+\.\d+\.\d+", version) else [f"{version} is no version to publish"]
    if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE):
        wrong.append(f"CHANGELOG.md has no heading `## [{version}] - year-month-day`")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
