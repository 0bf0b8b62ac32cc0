"""A file imports from lower floors only, and importing the package loads torch and nothing optional."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import freezehooks

PACKAGE = Path(freezehooks.__file__).parent
ROOT = Path(__file__).parents[1]

FLOORS = {
    "_errors": 0,
    "_counted": 0,
    "_expressions": 1,
    "_rules": 1.1,
    "_grammar": 1.2,
    "_free": 2,
    "_places": 2,
    "_shards": 2,
    "_regions": 2,
    "_ranks": 2.1,
    "_targets": 2.1,
    "_tie": 2.2,
    "_piece": 2.9,
    "_frozen": 3,
    "_parts": 3.1,
    "_monitor": 3.1,
    "_cells": 3.1,
    "_sheet": 3.2,
    "_plot": 3.3,
    "_formulas": 2,
    "_model_hook": 4.1,
    "_hooks": 4,
    "_state": 4,
    "_narrow": 4.1,
    "_stage": 4.1,
    "_compact": 4.2,
    "_guard": 4.3,
    "_mechanisms": 4.8,
    "_report": 4.9,
    "_trainable": 4.9,
    "_handle": 5,
    "_optimizer": 6,
    "layers": 2.9,
    "integrations": 7,
    "cli": 7,
    "__main__": 8,
    "__init__": 8,
}

FILES = sorted(PACKAGE.rglob("*.py"))


def _floor(path: Path) -> float:
    return FLOORS[path.relative_to(PACKAGE).parts[0].removesuffix(".py")]


def _imports(path: Path) -> list[str]:
    """Return the modules of the package that a file imports, by name, and others by their top level."""
    found = []
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            if 0 < node.level < depth:
                continue  # from beside it, on its own floor
            found.append((node.module or "").split(".")[0] if node.level else f"/{(node.module or '').split('.')[0]}")
        elif isinstance(node, ast.Import):
            found.extend(f"/{alias.name.split('.')[0]}" for alias in node.names)
    return found


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_a_file_imports_from_lower_floors_only(path: Path) -> None:
    inside = [name for name in _imports(path) if not name.startswith("/")]
    assert [name for name in inside if FLOORS[name] >= _floor(path)] == []


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_rules_and_errors_import_no_torch(path: Path) -> None:
    assert ("/torch" in _imports(path)) <= (_floor(path) >= 2)


def test_the_floors_of_every_file_are_written_down() -> None:
    pages = [ROOT / name for name in ("CONTRIBUTING.md", "docs/how-it-works.md")]
    for page in pages:
        said = page.read_text()
        assert [name for name in FLOORS if not re.search(rf"`{name}(\.py|/)?`", said) and name != "__init__"] == []


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
