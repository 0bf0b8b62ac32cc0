"""A count and the word that goes with it."""

from __future__ import annotations


def counted(count: int, one: str, several: str) -> str:
    """Return a count followed by the words for one or those for several.

    Example:
        >>> counted(1, "entry holds", "entries hold"), counted(2048, "entry holds", "entries hold")
        ('1 entry holds', '2,048 entries hold')
    """
    return f"{count:,} {one if count == 1 else several}"
