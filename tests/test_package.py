"""The wheel holds the package and its type marker, and README's code runs."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_the_code_in_readme_runs(block: str) -> None:
    if "lightning" in block:
        pytest.importorskip("lightning")
    exec(compile(block, "README.md", "exec"), {})


def test_the_wheel_holds_the_type_marker_and_neither_tests_nor_examples(tmp_path: Path) -> None:
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        ROOT,
    ]
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    (wheel,) = tmp_path.glob("freezehooks-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "freezehooks/py.typed" in names
    assert "freezehooks/integrations/lightning.py" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"freezehooks"}


def test_the_tools_are_pinned_for_development() -> None:
    pinned = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert pinned["torch"] == "2.13.0"
    assert {"ruff", "mypy", "pytest", "lightning", "pytorch-lightning", "hypothesis"} <= set(pinned)
