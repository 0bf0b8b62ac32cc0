"""All output of the command line."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, TextIO

_IN_ASCII: Final = str.maketrans(
    # U+00D7 is the multiplication sign, U+2013 and U+2014 are dashes
    {"■": "#", "█": "#", "●": "#", "□": ".", "░": ".", "·": ".", "○": ".", "\u00d7": "x", "\u2013": "-", "\u2014": "-"}
)


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer of a command.

    Attributes:
        code: The exit code.
        lines: The lines to print.
        found: The same for programs, made of dataclasses, lists and dicts with text keys.
    """

    code: int
    lines: Sequence[str]
    found: dict[str, Any]

    def to_json(self) -> str:
        """Return the exit code and what was found as JSON."""
        return json.dumps({"code": self.code, **self.found}, indent=2, allow_nan=False, default=_builtins)


def _builtins(found: Any) -> dict[str, Any]:
    """Convert a dataclass to builtins, with None for an infinite number, which JSON does not have."""
    return asdict(found, dict_factory=lambda items: {key: None if item == math.inf else item for key, item in items})


def say(text: str) -> None:
    """Print one or more lines to the standard output."""
    _write(text, sys.stdout)


def complain(text: str) -> None:
    """Print an error to the standard error as one line; if that is closed, the exit code still tells."""
    line = " ".join(text.split())
    try:
        _write(f"freezehooks: error: {line}", sys.stderr)
    except OSError:
        silence(sys.stderr)


def _write(text: str, stream: TextIO | None) -> None:
    if stream is not None:  # None if the process was started with the stream closed
        stream.write(_printable(text, stream) + "\n")


def silence(stream: TextIO) -> None:
    """Redirect a stream to the null device, so that flushing it when Python exits raises no error."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def _printable(text: str, stream: TextIO) -> str:
    """Replace what the stream cannot encode, and escape what a terminal would interpret."""
    plain = "\n".join(map(shown, text.split("\n")))
    encoding = stream.encoding or "utf-8"
    try:
        plain.encode(encoding)
    except UnicodeEncodeError:
        return plain.translate(_IN_ASCII).encode(encoding, "backslashreplace").decode(encoding)
    return plain


def shown(name: str) -> str:
    """Escape a name from a file so that it stays on one line, and a terminal does not interpret it."""
    if name.isprintable():
        return name
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode("ascii") for sign in name)
