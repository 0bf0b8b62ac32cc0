"""The command line: `freezehooks explain`, `show`, `verify` and `diff`.

Exit codes: 0 is yes, 1 is no (an entry does not hold, two files differ), 2 is a question that cannot be answered.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from .._errors import FreezeError
from . import diff, explain, show, verify
from .checkpoints import lacks_memory
from .output import complain, silence

_INTERRUPTED: Final = 130
_PIPE_CLOSED: Final = 141
"""What a shell reports of a program that SIGINT, or SIGPIPE, has ended: neither is a yes."""

_DESCRIPTION: Final = "Say which entries of a PyTorch checkpoint are held fixed, and find out whether they were."

_RULES: Final = """\
rules:
  target [region] = value        one a line; `#` begins a comment

  target   a parameter's name, with * and ?; a module's name stands for its weight
  region   an index as Python writes it, or a pattern, in brackets; left out: the whole tensor
           patterns: center cross cross(3) border diagonal(k) triu(k) tril(k) zeros
           smallest(fraction) nm(n, m); joined by ~ (the others), | (either), & (both), ( )
  value    a number, keep (what the entries hold), or tied(dim); left out: keep

  conv.weight[:, :, 1, 1] = 0    the centre tap of every kernel is 0
  features.*[~cross] = 0         all but a cross
  wte[~50257:]                   all but the new rows keep what they hold

exit codes:
  0 yes    1 no: an entry does not hold, or the files differ    2 bad use, or a file that cannot be read
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments behind the program's name; left out, those of this process.

    Returns:
        The exit code: 0 for yes, 1 for no, 2 for a question that cannot be answered.

    Raises:
        SystemExit: The arguments ask for help or the version (code 0), or cannot be understood (code 2).

    Example:
        >>> from freezehooks.cli import main
        >>> main(["show", "missing.pt", "--rule", "conv[center] = 0"])
        2
    """
    options = _parser().parse_args(argv)
    try:
        code = _answer(options)
        if sys.stdout is not None:
            sys.stdout.flush()  # a pipe that is closed, or a disk that is full, says so here, not when Python ends
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        silence(sys.stdout)
        return _PIPE_CLOSED
    except OSError as error:
        silence(sys.stdout)
        complain(f"the answer cannot be written ({error.strerror or error}); write it elsewhere")
        return 2
    return code


def _answer(options: argparse.Namespace) -> int:
    try:
        code: int = options.run(options)
    except FreezeError as error:
        complain(str(error))
        return 2
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        complain("the tensors do not fit into memory; run it where there is more")
        return 2
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "freezehooks", description=_DESCRIPTION, epilog=_RULES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"freezehooks {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (explain, show, verify, diff):
        command.add_parser(commands)
    return parser


def _version() -> str:
    try:
        return version("freezehooks")
    except PackageNotFoundError:
        return "(run from source, not installed)"
