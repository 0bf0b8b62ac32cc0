"""The table in docs/guarantees.md: every cell has an allowed word, and every row names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
LINES = (TESTS.parent / "docs" / "guarantees.md").read_text().splitlines()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in LINES if line.count("|") == 6]
EVENTS = [row for row in ROWS if row[0] not in ("event", "---")]

rows = pytest.mark.parametrize("row", EVENTS, ids=[row[0][:60] for row in EVENTS])


def _tests_in(name: str) -> set[str]:
    return {node.name for node in ast.parse((TESTS / name).read_text()).body if isinstance(node, ast.FunctionDef)}


def test_the_table_is_found() -> None:
    assert len(EVENTS) > 60


@rows
def test_every_cell_says_held_refused_or_why_it_does_not_apply(row: list[str]) -> None:
    for cell in row[1:4]:
        assert re.fullmatch(r"held(, see below)?|refused|n/a: .+", cell), cell


@rows
def test_every_row_names_tests_that_exist(row: list[str]) -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row[4])
    assert named, "the row has no test"
    assert [(file, test) for file, test in named if test not in _tests_in(file)] == []


def test_tests_named_in_the_text_exist() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", "\n".join(LINES))
    assert [(file, test) for file, test in named if test not in _tests_in(file)] == []
