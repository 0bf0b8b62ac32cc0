"""`freezehooks explain`: what a rule means, in words, in numbers and as a drawing."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Iterator
from math import prod
from typing import Any, Final

import torch

from .._counted import counted
from .._errors import SpecError, error_context
from .._held.tied import Tie
from .._rules.patterns.matrices import MatrixPattern
from .._rules.rule import Rule, Tied
from .._rules.spec import rules_of
from .drawing import draw
from .extent import Extent, extent
from .output import say
from .words import has_pattern, in_words

_WIDTH: Final = 100
_MOST_DIMENSIONS: Final = 16

_DESCRIPTION: Final = """\
Say what a rule means: in words, and with --shape also how many entries of such a tensor it freezes, and which.
No model and no checkpoint is needed."""

_EPILOG: Final = """\
examples:
  freezehooks explain "conv.weight[~cross] = 0"
      in words alone
  freezehooks explain "conv.weight[~cross] = 0" --shape 64,32,3,3
      and how many of the 18,432 entries that are, with a drawing of the kernel
  freezehooks explain "wte[~50257:]" "bn.weight = 1"
      two rules, one after the other; quote each, for the shell has its own use for * and [ ]

Each rule is explained by itself. `freezehooks --help` has the language of rules."""

_SHAPE: Final = re.compile(r"\d{1,18}(\s*[,x]\s*\d{1,18})*", re.ASCII)


def add_parser(commands: Any) -> None:
    """Add the command to those of the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "explain",
        help="what a rule means: in words, counted and drawn",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("rules", nargs="+", metavar="RULE", help="a rule as text; several lines are several rules")
    parser.add_argument("--shape", metavar="SIZES", help="the tensor's shape, as 64,32,3,3 or 64x32x3x3")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Explain the rules that were given, and return the exit code.

    Raises:
        FreezeError: A rule cannot be read or does not fit the shape, or the shape cannot be read.
    """
    rules = rules_of(options.rules)
    if not rules:
        raise SpecError("there is no rule to explain", "write for instance `conv.weight[center] = 0`")
    shape = None if options.shape is None else _shape(options.shape)
    explained = ["\n".join(_explanation(rule, shape)) for rule in rules]  # all of them before the first word
    say("\n\n\n".join(explained))
    if shape is None:
        say("\nGive the shape of the tensor, as in --shape 64,32,3,3, to have the entries counted and drawn.")
    return 0


def _shape(text: str) -> tuple[int, ...]:
    bare = text.strip().removeprefix("torch.Size").strip("()[], ")
    if bare and not _SHAPE.fullmatch(bare):
        raise SpecError(f"`--shape` must be sizes with commas or x between them, found {text!r}", "write 64,32,3,3")
    shape = tuple(int(size) for size in re.findall(r"\d+", bare))
    if len(shape) > _MOST_DIMENSIONS:
        raise SpecError(f"`--shape` takes {_MOST_DIMENSIONS} dimensions at most, found {len(shape)}", "leave it out")
    return shape


def _explanation(rule: Rule, shape: tuple[int, ...] | None) -> Iterator[str]:
    yield str(rule)
    yield ""
    yield textwrap.fill(in_words(rule), _WIDTH, break_long_words=False, break_on_hyphens=False)
    if shape is not None:
        yield ""
        yield from _on_shape(rule, shape)


def _on_shape(rule: Rule, shape: tuple[int, ...]) -> list[str]:
    with error_context(f"rule `{rule}`", f"shape {shape}"):
        return list(_tied_lines(rule.value, rule, shape) if isinstance(rule.value, Tied) else _lines(rule, shape))


def _tied_lines(tied: Tied, rule: Rule, shape: tuple[int, ...]) -> Iterator[str]:
    Tie.resolve(rule, tied, torch.zeros([1 if size else 0 for size in shape]))  # of the shape, all that it looks at
    entries, copies = prod(shape), shape[tied.dim]
    slices = counted(copies, "slice", "slices")
    yield f"{_text(shape)}: {counted(entries, 'entry', 'entries')}, but the {slices} along dimension"
    one = "is one" if copies == 1 else "are one"
    yield f"{tied.dim % len(shape)} {one}: {counted(entries // copies, 'number', 'numbers')} to train"


def _lines(rule: Rule, shape: tuple[int, ...]) -> Iterator[str]:
    found = extent(rule.region, shape)
    yield f"{_text(shape)}: {counted(prod(shape), 'entry', 'entries')}, {_count(found, prod(shape))}"
    yield ""
    unknown = None if found.surely is found.possibly else found.possibly & ~found.surely
    if unknown is not None and bool(unknown.all()):
        yield "Which entries these are depends on the numbers: there is nothing to draw."
        return
    # triangles are those of the last two dimensions, also where these are no kernel
    matrices = len(shape) == 3 and has_pattern(rule.region, MatrixPattern)
    yield draw(found.surely, unknown, spatial=2 if matrices else None)


def _count(found: Extent, entries: int) -> str:
    if found.least == found.most:
        return f"{_share(found.most, entries)} frozen, {entries - found.most:,} free"
    if not found.least and found.most == entries:
        return "how many are frozen depends on the numbers"
    return f"{found.least:,} to {found.most:,} frozen: how many depends on the numbers"


def _share(part: int, whole: int) -> str:
    percent = f"{100 * part / whole:.1f}".removesuffix(".0")
    if part < whole and percent == "100":
        percent = "over 99.9"
    return f"{part:,} ({'under 0.1' if percent == '0' else percent} %)"


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) if len(shape) > 1 else f"shape {shape}"
