"""The wheel holds the package and its type marker; the development set is pinned."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_wheel_holds_the_type_marker_and_neither_tests_nor_examples(tmp_path: Path) -> None:
    """Built from a copy: setuptools leaves a `build` folder behind, and packages what an older one contains."""
    copy = tmp_path / "checkout"
    tracked = ["setup.cfg", "pyproject.toml", "README.md", "LICENSE"]
    for folder in ("freezehooks", "tests", "examples"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in tracked:
        shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", tmp_path, copy], check=True, timeout=300, capture_output=True)
    (wheel,) = tmp_path.glob("freezehooks-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "freezehooks/py.typed" in names
    assert "freezehooks/integrations/lightning.py" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"freezehooks"}


def test_the_development_set_is_pinned() -> None:
    pinned = set(re.findall(r"^([\w-]+)==[\w.]+", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    asked = set(re.findall(r"^    ([\w-]+)(?:\[[\w,]+\])?>=", (ROOT / "setup.cfg").read_text(), re.MULTILINE))
    assert asked <= pinned
