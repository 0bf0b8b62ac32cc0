"""The report on a handle: what it holds and how, as a table, in a notebook, or as a dict."""

from __future__ import annotations

import html
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from torch import Tensor

from .._errors import shortened
from .._held.parameter import FrozenParameter
from .._held.violation import Violation
from .status import Mechanisms, said


@dataclass(frozen=True, slots=True)
class PartReport:
    """What is frozen in one parameter, and whether everything that holds it is in place.

    Attributes:
        name: The parameter's qualified name.
        shape: The parameter's shape.
        rules: The rules that freeze entries of it, or tie it, as text.
        frozen: How many of its entries are frozen.
        free: How many of its entries train.
        lowest: The least of the values (of the magnitudes, for complex ones); None if this rank has no frozen entry.
        highest: The greatest of the values, or of the magnitudes.
        drifted: How many frozen entries do not hold their value now, bit for bit.
        drift: The largest absolute difference of a frozen entry from its value now; infinite for nan.
        mechanisms: What holds the entries, and what is missing.
        nbytes: The memory that regions and values take, in bytes.
    """

    name: str
    shape: tuple[int, ...]
    rules: tuple[str, ...]
    frozen: int
    free: int
    lowest: float | None
    highest: float | None
    drifted: int
    drift: float
    mechanisms: Mechanisms
    nbytes: int

    @property
    def missing(self) -> tuple[str, ...]:
        """The mechanisms that are missing; empty if the frozen entries are held."""
        return self.mechanisms.missing


@dataclass(frozen=True, slots=True)
class Report:
    """What a handle holds, and what holds it. Made by `FrozenEntries.report`.

    It prints as a table, shows as one in a notebook, and `to_dict` returns it as builtins.

    Attributes:
        parts: What is frozen in each parameter, by its name.
        removed: A description of what is not held now; empty if everything is.
        skipped: A note for each rule with wildcards that skipped parameters where its region is empty.
    """

    parts: Mapping[str, PartReport]
    removed: str = ""
    skipped: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether every frozen entry holds its value and nothing that holds it is missing."""
        return not self.removed and not any(part.drifted or part.missing for part in self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """Return an item of builtins for each parameter, with what is missing under "missing"."""
        return {name: {**asdict(part), "missing": part.missing} for name, part in self.parts.items()}

    def __str__(self) -> str:
        if not self.parts:
            return self.removed or "nothing is frozen"
        table = aligned([_HEADINGS, *map(_cells, self.parts.values())], _NUMBERS)
        return "\n".join([table, self._verdict(), *self.skipped])

    def _repr_html_(self) -> str:
        headings = "".join(f"<th>{heading}</th>" for heading in _HEADINGS)
        rows = "".join(f"<tr>{_html_row(_cells(part))}</tr>" for part in self.parts.values())
        lines = "".join(f"<p>{html.escape(line)}</p>" for line in (self._verdict(), *self.skipped))
        return f"<table><thead><tr>{headings}</tr></thead><tbody>{rows}</tbody></table>{lines}"

    def _verdict(self) -> str:
        if self.holds:
            return "every frozen entry holds its value, and nothing that holds it is missing"
        drifted = [f"`{name}`" for name, part in self.parts.items() if part.drifted]
        gaps = said({name: part.missing for name, part in self.parts.items()})
        drift = f"drifted: {', '.join(drifted)}" if drifted else ""
        return "; ".join(filter(None, [self.removed, drift, f"missing: {gaps}" if gaps else ""]))


_HEADINGS: Final = (
    *("parameter", "shape", "rules", "values", "gradient", "forward", "saving", "optimizers"),
    *("frozen", "free", "drift", "bytes"),
)
_NUMBERS: Final = range(8, 12)
"""The columns with numbers, which are aligned to the right."""

_MISSING: Final = "MISSING"


def _cells(part: PartReport) -> tuple[str, ...]:
    words = (
        part.name,
        str(part.shape),
        ", ".join(map(shortened, part.rules)),
        _values_text(part),
        *_mechanism_cells(part.mechanisms),
    )
    drift = f"{part.drift:g} in {part.drifted:,}" if part.drifted else "0"
    return *words, f"{part.frozen:,}", f"{part.free:,}", drift, f"{part.nbytes:,}"


def _mechanism_cells(found: Mechanisms) -> tuple[str, ...]:
    gradient, optimizers = "not trained", "not trained"
    if found.trained:
        gradient, optimizers = _presence(found.gradient_hook), ", ".join(found.optimizers) or _MISSING
    return gradient, _presence(found.forward_hook), _presence(found.checkpoint_hooks), optimizers


def _presence(hook: bool | None) -> str:
    return "no module" if hook is None else "hooked" if hook else _MISSING


def _values_text(part: PartReport) -> str:
    ends = [f"{end:g}" for end in (part.lowest, part.highest) if end is not None]
    return " to ".join(dict.fromkeys(ends))


def _html_row(cells: Sequence[str]) -> str:
    shown = [f"<b>{cell}</b>" if cell == _MISSING else html.escape(cell) for cell in cells]
    return "".join(f"<td>{cell}</td>" for cell in shown)


def aligned(rows: Sequence[tuple[str, ...]], right: Container[int]) -> str:
    """Format rows of text as a table, with the columns in `right` aligned to the right and the others to the left."""
    columns = []
    for n, column in enumerate(zip(*rows, strict=True)):
        width = max(map(len, column))
        columns.append([text.rjust(width) if n in right else text.ljust(width) for text in column])
    return "\n".join("  ".join(row).rstrip() for row in zip(*columns, strict=True))


def report_parameter(frozen: FrozenParameter, violations: Iterable[Violation], mechanisms: Mechanisms) -> PartReport:
    """Report what is frozen in one parameter, what has drifted, and what holds it."""
    violations = list(violations)
    lowest, highest = _range(frozen.values)
    return PartReport(
        name=frozen.name,
        shape=tuple(frozen.shape),
        rules=tuple(map(str, frozen.rules)),
        frozen=frozen.frozen_count,
        free=frozen.free_count,
        lowest=lowest,
        highest=highest,
        drifted=sum(violation.count for violation in violations),
        drift=max((violation.drift for violation in violations), default=0.0),
        mechanisms=mechanisms,
        nbytes=frozen.nbytes,
    )


def _range(values: Tensor) -> tuple[float | None, float | None]:
    numbers = values.abs() if values.is_complex() else values
    return (numbers.min().item(), numbers.max().item()) if len(numbers) else (None, None)
