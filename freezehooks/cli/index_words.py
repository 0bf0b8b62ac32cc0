"""An index in words: ``:, :, 1, 1`` is "whose position is 1 along dimensions 2 and 3". Plain Python, no tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from .._counted import ordinal
from .._rules.region import Index, IndexItem, Slice

EVERYWHERE: Final = "anywhere"
NOWHERE: Final = "nowhere"
"""What stands for an index that takes every position, and for one that takes none, whatever the shape."""

_MOST_LISTED: Final = 8

_COUNTED: Final = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}


def index_in_words(index: Index) -> str:
    """Return which entries an index takes, as what follows "every entry"; `EVERYWHERE` or `NOWHERE` where that fits."""
    items = {dimension: _plain(item) for dimension, item in _by_dimension(index.items)}
    lists = {dimension: item for dimension, item in items.items() if isinstance(item, tuple)}
    lengths = {len(item) for item in lists.values()}
    beside = len(lists) > 1 and len(lengths) == 1 and 0 not in lengths
    alone = {dimension: _position(item) for dimension, item in items.items() if not (beside and dimension in lists)}
    if len(lengths) < 2 and NOWHERE in alone.values():
        return NOWHERE
    parts = [f"{position} along {_dimensions(where)}" for position, where in _grouped(alone)]
    if beside:
        parts.append(f"{_tuples(list(lists.values()))} along {_dimensions(list(lists))}")
    if not parts:
        return EVERYWHERE
    clash = " (lists of different lengths, which no tensor takes)" if len(lengths) > 1 else ""
    return f"whose position is {joined(parts, 'and')}{clash}"


def _by_dimension(items: Sequence[IndexItem]) -> list[tuple[int, IndexItem]]:
    """Pair every item but ``...`` with its dimension; those behind it count from the end."""
    split = items.index(...) if ... in items else len(items)
    behind = len(items) - split - 1
    return [*enumerate(items[:split]), *zip(range(-behind, 0), items[split + 1 :], strict=True)]


def _plain(item: IndexItem) -> IndexItem:
    """A list of one position goes with lists of any length: it says what the position alone says."""
    return item[0] if isinstance(item, tuple) and len(item) == 1 else item


def _grouped(positions: dict[int, str]) -> list[tuple[str, list[int]]]:
    """Return each position and the dimensions that share it, without those of which everything is taken."""
    groups: dict[str, list[int]] = {}
    for dimension, position in positions.items():
        groups.setdefault(position, []).append(dimension)
    return [(position, dimensions) for position, dimensions in groups.items() if position != EVERYWHERE]


def _dimensions(dimensions: list[int]) -> str:
    if len(dimensions) > 1 and dimensions == list(range(-len(dimensions), 0)) and len(dimensions) in _COUNTED:
        return f"the last {_COUNTED[len(dimensions)]} dimensions"
    if len(dimensions) > 1 and min(dimensions) >= 0:
        return f"dimensions {joined(map(str, dimensions), 'and')}"
    return joined(map(dimension_in_words, dimensions), "and")


def dimension_in_words(dimension: int) -> str:
    """Return how a sentence names a dimension: those with negative numbers count from the last."""
    named = {-1: "the last dimension", -2: "the last dimension but one", -3: "the last dimension but two"}
    return named.get(dimension, f"dimension {dimension}")


def _tuples(lists: list[tuple[int, ...]]) -> str:
    pairs = dict.fromkeys(zip(*lists, strict=True))
    return joined((f"({', '.join(map(str, pair))})" for pair in pairs), "or", _MOST_LISTED)


# --------------------------------------------------------------------------------------------------------------------
# Positions along one dimension


def _position(item: IndexItem) -> str:
    if isinstance(item, Slice):
        return _slice(item)
    if isinstance(item, tuple):
        return joined(map(_nth, dict.fromkeys(item)), "or", _MOST_LISTED) or NOWHERE
    return _nth(item) if isinstance(item, int) else EVERYWHERE


def _nth(position: int) -> str:
    if position >= 0:
        return str(position)
    return "the last" if position == -1 else f"the {ordinal(-position)} from the end"


def _slice(item: Slice) -> str:
    step = item.step or 1
    if step < 0:
        return _backward(item.start, item.stop, -step)
    start = item.start or 0
    if _is_empty(start, item.stop):
        return NOWHERE
    return _span(start, item.stop) if step == 1 else _stepped(start, item.stop, step)


def _is_empty(start: int, stop: int | None) -> bool:
    """Whether a forward slice takes nothing, however long the dimension."""
    return stop is not None and (stop == 0 or ((start < 0) == (stop < 0) and start >= stop))


def _span(start: int, stop: int | None) -> str:
    """Return the positions of a forward slice that takes every one; one end or both may count from the end."""
    if stop is not None and stop - start == 1 and (start < 0) == (stop < 0):
        return _nth(start)
    if start < 0:
        of_last = "the last" if start == -1 else f"one of the last {-start}"
        if stop is None:
            return of_last
        return f"{of_last} but below {stop}" if stop > 0 else f"{of_last} but not of {_ends('last', -stop)}"
    if stop is None:
        return f"{start} or more" if start else EVERYWHERE
    if stop > 0:
        return f"{start} to {stop - 1}"
    first = f"{_ends('first', start)} and " if start else ""
    return f"any but {first}{_ends('last', -stop)}"


def _ends(which: str, count: int) -> str:
    return f"the {which}" if count == 1 else f"the {which} {count}"


def _stepped(start: int, stop: int | None, step: int) -> str:
    if start < 0:
        every = f"every {ordinal(step)} of {_ends('last', -start)}, counted from the first of these,"
        limit = "" if stop is None else f" below {stop}" if stop > 0 else f" without {_ends('last', -stop)}"
        return (every + limit).removesuffix(",")
    if stop is not None and stop > 0:
        return _run(range(start, stop, step))
    begun = f"{start}, {start + step}, {start + 2 * step} and so on"
    return begun if stop is None else f"{begun} without {_ends('last', -stop)}"


def _run(run: range) -> str:
    last = run[-1]
    if last >= run.start + 4 * run.step:
        return f"{run[0]}, {run[1]}, {run[2]} and so on to {last}"
    return joined(map(str, run), "or")


def _backward(start: int | None, stop: int | None, step: int) -> str:
    """Return the positions of a slice that runs backward: with step 1 those of a forward one, from the other end."""
    first = 0 if stop is None else stop + 1
    behind = None if start is None or start == -1 else start + 1
    if stop == -1 or (behind is not None and _is_empty(first, behind)):
        return NOWHERE
    return _span(first, behind) if step == 1 else _counted_down(start, first, step)


def _counted_down(start: int | None, lowest: int, step: int) -> str:
    top = "the last" if start is None else _nth(start)
    shorter = " (from the last, where there are fewer)" if start is not None and start >= 0 else ""
    limit = f", none below {lowest}" if lowest > 0 else f", among {_ends('last', -lowest)}" if lowest < 0 else ""
    return f"every {ordinal(step)} counted down from {top}{shorter}{limit}"


# --------------------------------------------------------------------------------------------------------------------
# Lists


def joined(parts: Iterable[str], word: str, most: int | None = None) -> str:
    """Return ``a, b and c``, or ``a, b and 7 more`` where there are more parts than `most`."""
    listed = list(parts)
    if most is not None and len(listed) > most:
        return f"{', '.join(listed[:most])} {word} one of {len(listed) - most} more"
    return f"{', '.join(listed[:-1])} {word} {listed[-1]}" if len(listed) > 1 else "".join(listed)
