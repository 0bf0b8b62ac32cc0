"""Results as a table for people and as JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ._comparison import Case, Claim, Row
from ._measure import Spread

_HEADER = (
    "",
    "ms",
    "x reference",
    "added ms",
    "fastest x",
    "step x",
    "kernels",
    "state",
    "kept",
    "peak",
    "frozen entries",
    "claims",
)


def table(case: Case) -> str:
    """Format a comparison: a title, a row for each subject, and notes. Columns without figures are left out."""
    lines = [_cells(row) for row in case.rows.values()]
    used = [n for n, title in enumerate(_HEADER) if not title or any(line[n].strip("-") for line in lines)]
    rows = [[line[n] for n in used] for line in (_HEADER, *lines)]
    return "\n".join([case.title, *_aligned(rows), *(f"  ({note})" for note in case.notes)])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        _spread(row.time, "{:.2f}"),
        _spread(row.ratio, "{:.3f}"),
        _spread(row.added, "{:+.2f}"),
        _number(row.fastest),
        _number(row.step.median),
        "-" if row.kernels is None else f"{row.kernels:,}",
        _size(row.state),
        _size(row.extra),
        _size(row.peak),
        row.entries or "-",
        "; ".join(map(str, row.claims)) or "-",
    )


def _number(number: float) -> str:
    return "-" if math.isnan(number) else f"{number:.3f}"


def _spread(spread: Spread, form: str) -> str:
    if math.isnan(spread.median):
        return "-"
    return f"{form.format(spread.median)} ({form.format(spread.low)} to {form.format(spread.high)})"


def _size(count: int | None) -> str:
    if count is None:
        return "-"
    for unit, size in (("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def write_json(path: Path, environment: Mapping[str, str], found: Mapping[str, Iterable[Case]]) -> None:
    """Write all figures to a file, with null for what was not measured."""
    scenarios = {name: [_plain(dataclasses.asdict(case)) for case in cases] for name, cases in found.items()}
    path.write_text(json.dumps({"environment": environment, "scenarios": scenarios}, indent=1) + "\n")


def _plain(item: Any) -> Any:
    """Replace nan by None, since JSON has no nan."""
    if isinstance(item, dict):
        return {key: _plain(inside) for key, inside in item.items()}
    if isinstance(item, list):
        return [_plain(inside) for inside in item]
    return None if isinstance(item, float) and math.isnan(item) else item


def broken(cases: Iterable[Case]) -> list[Claim]:
    """Return the claims that did not hold."""
    return [claim for case in cases for row in case.rows.values() for claim in row.claims if not claim.held]
