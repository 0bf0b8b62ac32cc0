"""The command line: `freezehooks explain`, `show`, `verify`, `diff` and `demo`.

Exit codes: 0 is yes, 1 is no (an entry does not hold, two files differ), 2 is a question that cannot be answered.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from .._errors import FreezeError
from . import demo, diff, explain, show, verify
from .checkpoints import lacks_memory
from .output import Answer, complain, say, silence

_COMMANDS: Final = {"explain": explain, "show": show, "verify": verify, "diff": diff, "demo": demo}

_INTERRUPTED: Final = 130
_PIPE_CLOSED: Final = 141
"""The exit codes that a shell reports for a program ended by SIGINT or SIGPIPE: neither means yes."""

_DESCRIPTION: Final = "Show which entries of a PyTorch checkpoint rules freeze, and check that they hold their values."

_RULES: Final = """\
rules:
  target [region] = value        one a line; `#` begins a comment

  target   a tensor's name, with * and ?; a module's name stands for its weight
  region   an index as Python writes it, or a pattern, in brackets; left out: the whole tensor
           patterns: center cross cross(3) border diagonal(k) triu(k) tril(k) band(l, u)
           block_diagonal(n) zeros smallest(fraction) largest(fraction) nm(n, m)
           random(fraction, seed=n) each(k, region); joined by ~ (the others), | (either),
           & (both), ( )
  value    a number, a list of numbers, keep (what the entries hold), tied(dim),
           mirrored(dim) or symmetric; left out: keep

  conv.weight[:, :, 1, 1] = 0    the center of every 3x3 kernel of `conv` is 0
  layer*.conv?.weight[center]    the centers of all kernels in resnet18's layers keep their values
  conv?.weight[~cross] = 0       everything outside a cross is 0, in conv1, conv2 and so on
  wte[~50257:]                   all rows but the new ones keep their values

exit codes:
  0 yes    1 no: an entry does not hold, or the files differ    2 wrong usage, or a file that cannot be read
"""


def _count(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, found {text!r}") from None
    if number < 0:
        raise argparse.ArgumentTypeError(f"expected 0 or more, found {number}")
    return number


_FILE: Final = {"help": "a file of torch.save or of safetensors"}
_SEVERAL: Final = {"action": "append", "default": []}
_FLAG: Final = {"action": "store_true"}

_ARGUMENTS: Final[dict[str, dict[str, Any]]] = {
    "rule_texts": {"metavar": "RULE", "nargs": "+", "help": "a rule as text; several lines are several rules"},
    "--shape": {"metavar": "SIZES", "help": "the tensor's shape, as 64,32,3,3 or 64x32x3x3"},
    "checkpoint": _FILE | {"metavar": "CHECKPOINT"},
    "a": _FILE | {"metavar": "A"},
    "b": _FILE | {"metavar": "B"},
    "--rules": _SEVERAL | {"metavar": "FILE", "help": "rules: one a line, or YAML in .yaml or .yml"},
    "--rule": _SEVERAL | {"metavar": "RULE", "help": "one rule, such as 'conv[center] = 0'; repeatable"},
    "--against": {"metavar": "BASE", "help": "the checkpoint whose numbers are kept"},
    "--train-only": _SEVERAL | {"metavar": "RULE", "help": "what may differ from BASE, and nothing else; repeatable"},
    "--frozen": {"metavar": "FILE", "help": "a saved FrozenEntries.state_dict(), to check instead of rules"},
    "--limit": {
        "metavar": "N",
        "type": _count,
        "help": "how many entries to list of each tensor (verify: 10, diff: 0)",
    },
    "--key": {"help": "where in the file the tensors are, with dots between nested keys"},
    "--key-b": {"metavar": "KEY", "help": "where they are in B, if not under --key ('': where usual)"},
    "--against-key": {"metavar": "KEY", "help": "where they are in BASE, if not under --key ('': where usual)"},
    "--steps": {"metavar": "N", "type": _count, "default": 100, "help": "steps after freezing (%(default)s)"},
    "--rules-only": _FLAG | {"help": "print only the rules, as a file for --rules"},
    "--quiet": _FLAG | {"help": "print nothing; the exit code is the answer"},
    "--json": _FLAG | {"help": "print the answer as JSON"},
}
"""The options of argparse for each argument, by its name."""

_FORMS: Final = ("--rules-only", "--quiet", "--json")
"""The arguments for the form of the answer, which exclude each other."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments after the program's name. Left out: those of this process.

    Returns:
        The exit code: 0 for yes, 1 for no, 2 for a question that cannot be answered.

    Raises:
        SystemExit: The arguments ask for help or the version (code 0), or are invalid (code 2).

    Example:
        >>> from freezehooks.cli import main
        >>> main(["show", "missing.pt", "--rule", "conv[center] = 0"])
        2
    """
    options = _options(sys.argv[1:] if argv is None else list(argv))
    try:
        code = _answered(options)
        if sys.stdout is not None:
            sys.stdout.flush()  # raise for a closed pipe or a full disk here, not when Python exits
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


def _options(arguments: list[str]) -> argparse.Namespace:
    """Parse the arguments.

    Raises:
        SystemExit: There are none (which prints the help), they ask for help, or they are invalid.
    """
    parser = _parser()
    if not arguments:
        parser.print_help(sys.stderr)
        parser.exit(2)
    verb = arguments[0]
    if not verb.startswith("-") and verb not in _COMMANDS:
        close = difflib.get_close_matches(verb.lower(), _COMMANDS, n=1)
        advice = f"did you mean `{close[0]}`?" if close else f"the commands are {', '.join(_COMMANDS)}"
        parser.error(f"there is no command {verb!r}; {advice}")
    return parser.parse_args(arguments)


def _answered(options: argparse.Namespace) -> int:
    """Run the command, print its answer, and return the exit code."""
    try:
        answer: Answer = options.run(options)
    except FreezeError as error:
        complain(str(error))
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        complain("the tensors do not fit into memory; run it where there is more")
    else:
        if not options.quiet:
            say(answer.to_json() if options.json else "\n".join(answer.lines))
        return answer.code
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "freezehooks", description=_DESCRIPTION, epilog=_RULES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"freezehooks {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in _COMMANDS.items():
        subparser = commands.add_parser(
            name,
            help=command.BRIEF,
            description=command.ABOUT,
            epilog=f"examples:\n{command.EXAMPLES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        form = subparser.add_mutually_exclusive_group()
        for argument in command.ARGUMENTS:
            (form if argument in _FORMS else subparser).add_argument(argument, **_ARGUMENTS[argument])
        subparser.set_defaults(run=command.run)
    return parser


def _version() -> str:
    try:
        return version("freezehooks")
    except PackageNotFoundError:
        return "(run from source, not installed)"
