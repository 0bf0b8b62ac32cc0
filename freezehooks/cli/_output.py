"""What the command line writes: the one place that does."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Final, TextIO

_IN_ASCII: Final = str.maketrans(
    # U+00D7 is the sign of multiplication, U+2013 and U+2014 are dashes
    {"■": "#", "█": "#", "●": "#", "□": ".", "░": ".", "·": ".", "○": ".", "\u00d7": "x", "\u2013": "-", "\u2014": "-"}
)


def say(text: str) -> None:
    """Write a line, or several, to the standard output."""
    sys.stdout.write(_sayable(text, sys.stdout) + "\n")


def complain(text: str) -> None:
    """Write an error to the standard error, as one line."""
    line = " ".join(text.split())
    sys.stderr.write(_sayable(f"freezehooks: error: {line}", sys.stderr) + "\n")


def _sayable(text: str, stream: TextIO) -> str:
    """Return a text with nothing in it that the stream cannot encode, or that would command a terminal."""
    # names come from files: an escape sequence in one would otherwise be obeyed
    plain = "".join(sign if sign.isprintable() or sign == "\n" else _escaped(sign) for sign in text)
    encoding = stream.encoding or "utf-8"
    try:
        plain.encode(encoding)
    except UnicodeEncodeError:
        return plain.translate(_IN_ASCII).encode(encoding, "backslashreplace").decode(encoding)
    return plain


def shown(name: str) -> str:
    """Return a name from a file as text that stays on its line."""
    return "".join(sign if sign.isprintable() else _escaped(sign) for sign in name)


def _escaped(sign: str) -> str:
    return sign.encode("unicode_escape").decode("ascii")


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Return rows as text with aligned columns, the first row being the head; `right`: columns of numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            text.rjust(width) if n in right else text.ljust(width)
            for n, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
