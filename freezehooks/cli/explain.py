"""The command `explain`: what a rule means, in a sentence, in numbers and as a drawing."""

from __future__ import annotations

import argparse
import re
import textwrap
from math import prod
from typing import Final

import torch
from torch import Tensor

from .._counted import counted
from .._entries.select import select
from .._errors import RegionError, SpecError, error_context
from .._rules.patterns.matrices import MatrixPattern
from .._rules.patterns.pattern import Pattern, patterns_in
from .._rules.region import WHOLE, Not, Region
from .._rules.rule import Keep, Rule
from .._rules.spec import rules_of
from .._rules.ties import Tie
from .drawing import draw
from .output import Answer
from .selection import chosen_by_numbers

_WIDTH: Final = 100
_MOST_DIMENSIONS: Final = 16
_MOST_ENTRIES: Final = 2**31  # a bool takes a byte for each

BRIEF: Final = "what a rule means: in a sentence, counted and drawn"
ABOUT: Final = """\
Explain what a rule means; with --shape, also how many entries of such a tensor it freezes, and which.
No model and no checkpoint is needed."""
EXAMPLES: Final = """\
  freezehooks explain "conv.weight[~cross] = 0"
      in a sentence
  freezehooks explain "conv.weight[~cross] = 0" --shape 64,32,3,3
      and how many of the 18,432 entries that are, with a drawing of the kernel
  freezehooks explain "wte[~50257:]" "bn.weight = 1"
      two rules, one after the other; quote each, since * and [ ] are special in a shell

Each rule is explained by itself. `freezehooks --help` shows the syntax of rules."""
ARGUMENTS: Final = ("rule_texts", "--shape", "--quiet", "--json")

_SHAPE: Final = re.compile(r"\d{1,18}(\s*[,x]\s*\d{1,18})*", re.ASCII)


def run(options: argparse.Namespace) -> Answer:
    """Run the command."""
    rules = rules_of(options.rule_texts)
    if not rules:
        raise SpecError("there is no rule to explain", "write for instance `conv.weight[center] = 0`")
    shape = None if options.shape is None else _shape(options.shape)
    told = [_explained(rule, shape) for rule in rules]
    lines = ["\n\n\n".join(map(_in_lines, told))]
    if shape is None:
        lines.append("\nGive the shape of the tensor, as in --shape 64,32,3,3, to have the entries counted and drawn.")
    return Answer(0, lines, {"rules": told})


def _shape(text: str) -> tuple[int, ...]:
    bare = text.strip().removeprefix("torch.Size").strip("()[], ")
    if bare and not _SHAPE.fullmatch(bare):
        raise SpecError(f"`--shape` must be sizes with commas or x between them, found {text!r}", "write 64,32,3,3")
    shape = tuple(int(size) for size in re.findall(r"\d+", bare))
    if len(shape) > _MOST_DIMENSIONS:
        raise SpecError(f"`--shape` takes {_MOST_DIMENSIONS} dimensions at most, found {len(shape)}", "leave it out")
    return shape


def _explained(rule: Rule, shape: tuple[int, ...] | None) -> dict[str, str]:
    """Return a rule and what it means and, for a given shape, the count of frozen entries and a drawing."""
    told = {"rule": str(rule), "means": in_words(rule)}
    if shape is not None:
        with error_context(f"rule `{rule}`", f"shape {shape}"):
            found = _tied(rule.value, shape) if isinstance(rule.value, Tie) else _frozen(rule.region, shape)
        size = "x".join(map(str, shape)) if len(shape) > 1 else f"shape {shape}"
        told["of_shape"] = f"{size}: {counted(prod(shape), 'entry', 'entries')}, {found}"
    return told


def _in_lines(told: dict[str, str]) -> str:
    means = textwrap.fill(told["means"], _WIDTH, break_long_words=False, break_on_hyphens=False)
    return "\n\n".join(filter(None, [told["rule"], means, told.get("of_shape")]))


def in_words(rule: Rule) -> str:
    """Describe a rule in a sentence, with the meaning of its patterns; an index is shown as it is written.

    Example:
        >>> from freezehooks import parse_rule
        >>> in_words(parse_rule("conv.weight[~center] = 0"))
        'Every entry of `conv.weight` outside the middle of the kernel is held at 0.'
    """
    target, region, value = rule.target, rule.region, rule.value
    if isinstance(value, Tie):
        what = value.in_words()
        return f"{what[0].upper()}{what[1:]} of `{target}` are tied: they hold the same numbers."
    held = (
        "what it holds when the model is frozen"
        if value is Keep.KEEP
        else str(Rule(target, value=value)).split(" = ")[1]
    )
    leaf, outside = _signed(region)
    if isinstance(leaf, Pattern):
        return f"Every entry of `{target}` {leaf.in_words(outside)} is held at {held}."
    patterns = dict.fromkeys(patterns_in(region))
    written = str(Rule(target, region)).removesuffix(" = keep")
    meant = [f"`{pattern}`: every entry {pattern.in_words()}." for pattern in patterns]
    return " ".join([f"Every entry of `{written}` is held at {held}.", *meant])


def _signed(region: Region) -> tuple[Region, bool]:
    """Strip the signs `~` from a region, and return the rest and whether the region is its complement."""
    outside = False
    while isinstance(region, Not):
        region, outside = region.operand, not outside
    return region, outside


def _tied(tie: Tie, shape: tuple[int, ...]) -> str:
    tie.check(shape)
    return f"but {tie.are_tied_in_words(shape)}: {counted(tie.count(shape), 'number', 'numbers')} to train"


def _frozen(region: Region, shape: tuple[int, ...]) -> str:
    """Describe how many entries of a tensor a region freezes, with a drawing."""
    if prod(shape) > _MOST_ENTRIES:
        raise RegionError(
            f"`--shape` of {prod(shape):,} entries is too large to count here, which takes {_MOST_ENTRIES:,}",
            "give a smaller shape of the same kind, or leave it out for words only",
        )
    tensor = torch.zeros(()).expand(shape)  # only its shape is used, so it needs no memory
    if chosen_by_numbers(region):
        drawn = "Which entries these are depends on the numbers: there is nothing to draw."
        return f"{_share(_count_by_numbers(region, tensor), prod(shape))}\n\n{drawn}"
    frozen = select(region, tensor)
    # matrix patterns apply to the last two dimensions, even of three that would be drawn as kernels of one
    matrices = len(shape) == 3 and any(isinstance(leaf, MatrixPattern) for leaf in region.leaves())
    count = int(frozen.count_nonzero())  # `sum` would first convert all of them to integers
    return f"{_share(count, prod(shape))}\n\n{draw(frozen, spatial=2 if matrices else None)}"


def _count_by_numbers(region: Region, tensor: Tensor) -> int | None:
    """Count the entries of a region that depends on what a tensor contains, or return None if even the count does."""
    for leaf in region.leaves():  # all must fit the shape
        if isinstance(leaf, Pattern):
            leaf.check(tensor.shape)
        else:
            select(leaf | WHOLE, tensor)  # joined with the whole, since by itself it may select nothing
    leaf, outside = _signed(region)
    count = leaf.count(tensor.numel()) if isinstance(leaf, Pattern) else None
    if not tensor.numel() or count == (tensor.numel() if outside else 0):
        raise RegionError("the region selects no entry", "correct it, or leave the rule out")
    return tensor.numel() - count if outside and count is not None else count


def _share(frozen: int | None, entries: int) -> str:
    if frozen is None:
        return "how many are frozen depends on the numbers"
    percent = f"{100 * frozen / entries:.1f}".removesuffix(".0")
    share = {"0": "under 0.1", "100": "over 99.9" if frozen < entries else "100"}.get(percent, percent)
    return f"{frozen:,} ({share} %) frozen, {entries - frozen:,} free"
