"""A package imports only those above it; importing freezehooks loads torch and nothing optional."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

import freezehooks

PACKAGE: Final = Path(freezehooks.__file__).parent
CONTRIBUTING: Final = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
FILES: Final = sorted(PACKAGE.rglob("*.py"))

ROOMS: Final = re.findall(r"^\| `([\w/.]+?)(?:\.py|/)?` \|", CONTRIBUTING, re.MULTILINE)
"""Files and packages in order: each may import those before it."""

MAY_IMPORT: Final = {"layers": {"_errors", "_counted", "_rules", "_entries"}}
"""Packages that the others do not import, with the only ones that they may import."""


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    """Return the packages that a file imports from, and `/name` for those outside freezehooks."""
    parents = list(path.relative_to(PACKAGE).parts[:-1])
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(f"/{alias.name.split('.')[0]}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(f"/{str(node.module).split('.')[0]}")
        elif isinstance(node, ast.ImportFrom):
            above = parents[: len(parents) - node.level + 1]
            names = [*above, *(node.module or "").split(".")] if node.module else above
            found.update([names[0]] if names else [alias.name for alias in node.names])
    return found


every_file = pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])


@every_file
def test_a_package_imports_only_those_above_it(path: Path) -> None:
    room = _room(path)
    above = MAY_IMPORT.get(room, set(ROOMS[: ROOMS.index(room)]))
    assert {name for name in _imports(path) if not name.startswith("/")} - above - {room} == set()


@every_file
def test_rules_and_errors_import_no_torch(path: Path) -> None:
    if _room(path) in ("_errors", "_counted", "_rules"):
        assert "/torch" not in _imports(path)


def test_the_list_names_every_room_and_no_other() -> None:
    assert sorted(ROOMS) == sorted({_room(path) for path in FILES})


def test_the_check_sees_an_import_from_below(tmp_path: Path) -> None:
    assert _imports(PACKAGE / "_rules" / "rule.py") >= {"_errors", "_rules", "/re"}
    assert "_handle" not in ROOMS[: ROOMS.index("_held")]


def test_importing_the_package_imports_nothing_optional() -> None:
    optional = ["lightning", "pytorch_lightning", "transformers", "accelerate", "matplotlib", "yaml", "safetensors"]
    script = (
        "import sys, torch; before = set(sys.modules); import freezehooks; "
        f"print(set({optional}) & (set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "set()", done.stderr


def test_the_public_names_are_all_there() -> None:
    assert sorted(freezehooks.__all__) == freezehooks.__all__
    assert all(hasattr(freezehooks, name) for name in freezehooks.__all__)


def test_the_package_imports_where_a_private_helper_of_torch_is_missing() -> None:
    helpers = ["torch._functorch.pyfunctorch", "torch.multiprocessing.reductions", "torch.utils._python_dispatch"]
    script = (
        f"import sys, torch\nfor name in {helpers}: sys.modules[name] = None\n"
        "import freezehooks\nlayer = torch.nn.Linear(2, 2)\nprint(len(freezehooks.parse_rule('a = 1').target))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "1", done.stderr
