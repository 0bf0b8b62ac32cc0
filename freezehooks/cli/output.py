"""What the command line writes: the one place that does."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, TextIO

_IN_ASCII: Final = str.maketrans(
    # U+00D7 is the sign of multiplication, U+2013 and U+2014 are dashes
    {"■": "#", "█": "#", "●": "#", "□": ".", "░": ".", "·": ".", "○": ".", "\u00d7": "x", "\u2013": "-", "\u2014": "-"}
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command has found.

    Attributes:
        code: The exit code.
        lines: What it says.
        found: The same for programs: what dataclasses, lists and dicts with text as keys are made of.
    """

    code: int
    lines: Sequence[str]
    found: dict[str, Any]

    def to_json(self) -> str:
        """Return what was found, with the exit code before it, as JSON."""
        return json.dumps({"code": self.code, **self.found}, indent=2, allow_nan=False, default=_builtins)


def _builtins(found: Any) -> dict[str, Any]:
    """Return a dataclass as builtins; None stands for an infinite number, which JSON does not have."""
    return asdict(found, dict_factory=lambda items: {key: None if item == math.inf else item for key, item in items})


def say(text: str) -> None:
    """Write a line, or several, to the standard output."""
    _write(text, sys.stdout)


def complain(text: str) -> None:
    """Write an error to the standard error, as one line; where nobody can read that, the exit code still says it."""
    line = " ".join(text.split())
    try:
        _write(f"freezehooks: error: {line}", sys.stderr)
    except OSError:
        silence(sys.stderr)


def _write(text: str, stream: TextIO | None) -> None:
    if stream is not None:  # as Python has it in a process that was started with the stream closed
        stream.write(_sayable(text, stream) + "\n")


def silence(stream: TextIO) -> None:
    """Let what Python still wants to write there when it ends go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _sayable(text: str, stream: TextIO) -> str:
    """Return a text with nothing in it that the stream cannot encode, or that would command a terminal."""
    plain = "\n".join(map(shown, text.split("\n")))
    encoding = stream.encoding or "utf-8"
    try:
        plain.encode(encoding)
    except UnicodeEncodeError:
        return plain.translate(_IN_ASCII).encode(encoding, "backslashreplace").decode(encoding)
    return plain


def shown(name: str) -> str:
    """Return a name from a file as text that stays on its line: an escape sequence in it would otherwise be obeyed."""
    if name.isprintable():
        return name
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode("ascii") for sign in name)
