"""The command `show`: what rules select of a checkpoint, or what is in it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._counted import counted
from .._held.parameter import FrozenParameter
from .._held.tied import Tie
from .._report.table import aligned
from .._rules.rule import Rule
from .checkpoints import open_checkpoint
from .comparison import compare, differ
from .output import say, shown
from .rules_file import add_rules_arguments, asked_rules
from .selection import part_of, rules_by_name

_EXAMPLES = """\
examples:
  freezehooks show model.pt
      names, shapes and dtypes of what is in the file

  freezehooks show model.pt --rule 'conv*.weight[center] = 0'
      which parameters have a centre tap that would be held at 0, and what it holds now

  freezehooks show epoch=9.ckpt --rules rules.yaml
      the same for a file of rules; the tensors of a Lightning checkpoint are found under `state_dict`
"""


def add_parser(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command to those of the command line."""
    parser = commands.add_parser(
        "show",
        help="what rules select of a checkpoint, or what is in it",
        description="Show which entries of a checkpoint some rules select, and what these hold now. Without rules: "
        "what is in the file.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a file of torch.save or of safetensors")
    add_rules_arguments(parser)
    parser.add_argument("--key", help="where in the file the tensors are, with dots between nested keys")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    rules = asked_rules(options)
    tensors = open_checkpoint(options.checkpoint, options.key)
    say(_selected(tensors, rules) if rules else _listed(tensors))
    return 0


def _listed(tensors: Mapping[str, Tensor]) -> str:
    rows = [("tensor", "shape", "dtype", "entries")]
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        rows.append((shown(name), str(tuple(tensor.shape)), dtype, f"{tensor.numel():,}"))
    return f"{aligned(rows, right=(3,))}\n{_counts(tensors)}"


def _counts(tensors: Mapping[str, Tensor]) -> str:
    return f"{counted(len(tensors), 'tensor', 'tensors')}, {counted(_entries(tensors), 'entry', 'entries')}"


def _entries(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def _selected(tensors: Mapping[str, Tensor], rules: Sequence[Rule]) -> str:
    rows: list[tuple[str, ...]] = [("parameter", "shape", "rules", "frozen", "free", "hold now")]
    frozen = 0
    for name, own in rules_by_name(tensors, rules).items():
        part = part_of(name, tensors[name], own)
        frozen += part.frozen_count
        rows.append(_row(part, tensors[name], own))
    total = _entries(tensors)
    share = f"{100 * frozen / max(total, 1):.3g} %"
    entries = counted(total, "entry", "entries")
    return f"{aligned(rows, right=(3, 4))}\nfrozen: {frozen:,} of all {entries} of the file ({share})"


def _row(part: FrozenParameter, tensor: Tensor, rules: Sequence[Rule]) -> tuple[str, ...]:
    said = ", ".join(map(str, rules))
    held = [_range(tensor[part.frozen])] if part.frozen_count else []
    held += [_copies(tensor, part.tie)] if part.tie is not None else []
    counts = f"{part.frozen_count:,}", f"{part.free_count:,}"
    return shown(part.name), str(tuple(part.shape)), said, *counts, "; ".join(held)


def _range(numbers: Tensor) -> str:
    """Say what some entries hold: the one number, or the lowest to the highest."""
    if not bool(differ(numbers, numbers[:1].expand_as(numbers)).any()):
        return repr(numbers[0].item())
    size = numbers.abs() if numbers.is_complex() else numbers
    clear = size[~size.isnan()]
    ends = f"{clear.min().item():g} to {clear.max().item():g}" if len(clear) else "nan"
    told = f"magnitudes {ends}" if numbers.is_complex() else ends
    return f"{told}, and nan" if 0 < len(clear) < len(size) else told


def _copies(tensor: Tensor, tie: Tie) -> str:
    count = tensor.shape[tie.dim]
    one = tensor.clone(memory_format=torch.contiguous_format)
    tie.impose_(one)
    gap = compare(tensor, one, limit=0)
    if gap.count:
        return f"{count} copies differ, by up to {gap.gap:g} from the first"
    return counted(count, "copy is one", "copies are one")
