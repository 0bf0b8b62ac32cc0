"""Check that every file names the same versions: `python -m tools.check_pins`.

The hooks of pre-commit must use the versions that `make check` uses, and `constraints-lowest.txt` the oldest versions
that `setup.cfg` allows.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]

_PIN: Final = re.compile(r"([A-Za-z][\w-]*)==(\d[\w.]*)")
_BOUND: Final = re.compile(r"^\s+([A-Za-z][\w-]*)(?:\[[\w,-]+\])?>=(\d[\w.]*)", re.MULTILINE)


def main() -> int:
    """Print each disagreement, and return 1 if there is any."""
    found = disagreements(ROOT)
    print(*found, sep="\n", end="\n" if found else "")
    return int(bool(found))


def disagreements(root: Path) -> list[str]:
    """Return the disagreements in a checkout, one a line."""
    pins = dict(_PIN.findall((root / "constraints.txt").read_text()))
    hooks = _PIN.findall((root / ".pre-commit-config.yaml").read_text())
    lowest = _PIN.findall((root / "constraints-lowest.txt").read_text())
    bounds = dict(_BOUND.findall((root / "setup.cfg").read_text()))
    return [
        *_differences(".pre-commit-config.yaml", hooks, "constraints.txt", pins),
        *_differences("constraints-lowest.txt", lowest, "setup.cfg", bounds),
    ]


def _differences(name: str, found: list[tuple[str, str]], other: str, expected: dict[str, str]) -> list[str]:
    return [
        f"{name}: {tool} is {version}, in {other} it is {expected.get(tool, 'not named')}"
        for tool, version in found
        if _release(version) != _release(expected.get(tool, ""))
    ]


def _release(version: str) -> str:
    """Strip the zeros at the end of a version, since 2.6 and 2.6.0 are the same."""
    return re.sub(r"(\.0)+$", "", version)


if __name__ == "__main__":
    sys.exit(main())
