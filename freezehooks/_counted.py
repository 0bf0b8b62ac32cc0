"""Formats counts and ordinal numbers for messages."""

from __future__ import annotations


def counted(count: int, one: str, several: str) -> str:
    """Return a count followed by the singular or the plural.

    Example:
        >>> counted(1, "entry holds", "entries hold"), counted(2048, "entry holds", "entries hold")
        ('1 entry holds', '2,048 entries hold')
    """
    return f"{count:,} {one if count == 1 else several}"


def share_of(count: int, entries: int, one: str, several: str) -> str:
    """Return ``count of entries`` followed by the singular or the plural of a verb.

    Example:
        >>> share_of(1, 8, "is frozen", "are frozen"), share_of(8, 2048, "is frozen", "are frozen")
        ('1 of 8 entries is frozen', '8 of 2,048 entries are frozen')
    """
    of = f"of {counted(entries, 'entry', 'entries')}"
    return counted(count, f"{of} {one}", f"{of} {several}")


def ordinal(number: int) -> str:
    """Return ``1st``, ``2nd``, ``3rd``, ``4th`` and so on."""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
