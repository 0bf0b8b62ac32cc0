"""Two checkpoints -> the fewest rules that say which entries did not change."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._rules.region import WHOLE, Region
from .._rules.rule import Rule, keep
from .base import overlap
from .checkpoints import freezable
from .comparison import differ
from .description import describe
from .globs import targets_for
from .output import shown


@dataclass(frozen=True, slots=True)
class _Unchanged:
    """What did not change of one parameter: a region of it, and the one number that it holds, if it is one."""

    region: Region
    number: float | None


def unchanged_rules(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], names: Mapping[str, str]
) -> Iterator[str]:
    """Yield rules, a line each, that freeze exactly the entries of the second file that the first holds too.

    Args:
        first: The tensors of one file.
        second: Those of the other: the rules speak of its names.
        names: For names of the second file those of the first.
    """
    groups: dict[str, dict[str, _Unchanged]] = {}
    for name, before, now, same in _partly_same(first, second, names):
        if any(was > size for was, size in zip(before.shape, now.shape, strict=True)):
            yield f"# {shown(name)}: {_counted(same)}, but it has lost others: freeze what both files have"
        elif (found := _described(same, before, now)) is None:
            yield _no_rule(name, same)
        else:
            groups.setdefault(str(found.region), {})[name] = found
    absent = list(_absent(first, second, names))
    for group in sorted(groups.values(), key=lambda group: next(iter(group.values())).region != WHOLE):
        yield from _lines(group, [name for name in freezable(second) if name not in group], absent)


def _partly_same(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], names: Mapping[str, str]
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Yield the name of each parameter of which something did not change, it before and now, and where that is."""
    for name, now in freezable(second).items():
        before = first[names[name]] if name in names else None
        same = None if before is None else _same(before, now)
        if before is not None and same is not None and bool(same.any()):
            yield name, before, now, same


def _absent(first: Mapping[str, Tensor], second: Mapping[str, Tensor], names: Mapping[str, str]) -> Iterator[str]:
    """Yield what the first file has and the second has not, or has as integers: no rule may speak of it."""
    paired = {names[name] for name in freezable(second) if name in names}
    yield from (name for name in freezable(first) if name not in paired)


def _same(first: Tensor, second: Tensor) -> Tensor | None:
    """Return which entries of the second tensor the first holds too; None where no rule can be about them."""
    if first.dtype != second.dtype or first.ndim != second.ndim or second.element_size() == 1:
        return None
    same, box = torch.zeros(second.shape, dtype=torch.bool), overlap(first, second)
    same[box] = ~differ(first[box], second[box])
    return same


def _described(same: Tensor, first: Tensor, second: Tensor) -> _Unchanged | None:
    if bool(same.all()):
        return _Unchanged(WHOLE, _one_number(second.flatten()))
    region = describe(same, (first, second) if first.shape == second.shape else ())
    return None if region is None else _Unchanged(region, _one_number(second[same]))


def _one_number(numbers: Tensor) -> float | None:
    """Return the number that all entries hold, bit for bit, in as few digits as say it; None where there is none."""
    if bool(differ(numbers, numbers[:1].expand_as(numbers)).any()):
        return None
    number: Any = numbers[0].item()
    if isinstance(number, complex):
        number = number.real
    if not math.isfinite(number):
        return None
    tries = (float(f"{number:.{digits}g}") for digits in range(1, 18))
    return next((short for short in tries if _is_exactly(numbers[:1], short)), None)


def _is_exactly(entry: Tensor, number: float) -> bool:
    limit = torch.finfo(entry.dtype).max  # rounding up to fewer digits may leave the dtype's range
    return abs(number) <= limit and not bool(differ(torch.full_like(entry, number), entry).any())


def _no_rule(name: str, same: Tensor) -> str:
    return f'# {shown(name)}: {_counted(same)}, no short rule: freeze them by a mask, {{"{shown(name)}": a == b}}'


def _counted(same: Tensor) -> str:
    return f"{int(same.sum()):,} of {same.numel():,} entries unchanged"


def _lines(group: Mapping[str, _Unchanged], others: list[str], absent: list[str]) -> Iterator[str]:
    targets, unsayable = targets_for(list(group), others, absent)
    for target, names in targets.items():
        numbers = {repr(group[name].number) for name in names}
        number = group[names[0]].number
        value = keep if len(numbers) > 1 or number is None else number
        yield str(Rule(target, group[names[0]].region, value)).removesuffix(" = keep")
    for name in unsayable:
        yield f"# {shown(name)}: no rule can name it alone: freeze it through a mapping"
