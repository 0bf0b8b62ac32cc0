"""The command `show`: what rules select in a checkpoint, or what is in it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from .._counted import counted
from .._held.parameter import FrozenParameter
from .._held.tied import TiedEntries
from .._report.table import aligned
from .._rules.rule import Rule
from .checkpoints import open_checkpoint
from .comparison import all_alike, compare
from .output import Answer, shown
from .rules_file import given_rules
from .selection import frozen_by, rules_by_name

BRIEF: Final = "what rules select in a checkpoint, or what is in it"
ABOUT: Final = (
    "Show which entries of a checkpoint some rules select, and what these hold now. Without rules: what is in the file."
)
EXAMPLES: Final = """\
  freezehooks show model.pt
      names, shapes and dtypes of what is in the file
  freezehooks show model.pt --rule 'layer*.conv?.weight[center] = 0'
      which parameters have a center tap that would be held at 0, and what it holds now
  freezehooks show epoch=9.ckpt --rules rules.yaml
      the same for a file of rules; the tensors of a Lightning checkpoint are found under `state_dict`
"""
ARGUMENTS: Final = ("checkpoint", "--rules", "--rule", "--key", "--quiet", "--json")


def run(options: argparse.Namespace) -> Answer:
    """Run the command."""
    rules = given_rules(options)
    tensors = open_checkpoint(options.checkpoint, options.key)
    return _selected(tensors, rules) if rules else _listed(tensors)


def _listed(tensors: Mapping[str, Tensor]) -> Answer:
    rows = [("tensor", "shape", "dtype", "entries")]
    told = []
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        rows.append((shown(name), str(tuple(tensor.shape)), dtype, f"{tensor.numel():,}"))
        told.append({"name": name, "shape": list(tensor.shape), "dtype": dtype, "entries": tensor.numel()})
    total = _total(tensors)
    entries = counted(total, "entry", "entries")
    lines = [aligned(rows, right=(3,)), f"{counted(len(tensors), 'tensor', 'tensors')}, {entries}"]
    return Answer(0, lines, {"entries": total, "tensors": told})


def _total(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def _selected(tensors: Mapping[str, Tensor], rules: Sequence[Rule]) -> Answer:
    rows: list[tuple[str, ...]] = [("parameter", "shape", "rules", "frozen", "free", "hold now")]
    told: list[dict[str, Any]] = []
    for name, own in rules_by_name(tensors, rules).items():
        parameter = frozen_by(own, name, tensors[name])
        shape, said, held = tuple(parameter.shape), list(map(str, own)), _held(parameter, tensors[name])
        frozen, free = parameter.frozen_count, parameter.free_count
        rows.append((shown(name), str(shape), ", ".join(said), f"{frozen:,}", f"{free:,}", held))
        told.append({"name": name, "shape": list(shape), "rules": said, "frozen": frozen, "free": free, "hold": held})
    total, count = _total(tensors), sum(each["frozen"] for each in told)
    share = f"{100 * count / max(total, 1):.3g} %"
    summary = f"frozen: {count:,} of all {counted(total, 'entry', 'entries')} of the file ({share})"
    return Answer(0, [aligned(rows, right=(3, 4)), summary], {"entries": total, "frozen": count, "parameters": told})


def _held(parameter: FrozenParameter, tensor: Tensor) -> str:
    held = [_range(tensor[parameter.frozen])] if parameter.frozen_count else []
    return "; ".join([*held, *(_copies(tensor, tie) for tie in parameter.ties)])


def _range(numbers: Tensor) -> str:
    """Describe what some entries hold: one number, or a range."""
    if all_alike(numbers):
        return repr(numbers[0].item())
    size = numbers.abs() if numbers.is_complex() else numbers
    clear = size[~size.isnan()]
    ends = f"{clear.min().item():g} to {clear.max().item():g}" if len(clear) else "nan"
    told = f"magnitudes {ends}" if numbers.is_complex() else ends
    return f"{told}, and nan" if 0 < len(clear) < len(size) else told


def _copies(tensor: Tensor, tie: TiedEntries) -> str:
    one = tensor.clone(memory_format=torch.contiguous_format)
    tie.impose_(one)
    gap = compare(tensor, one, limit=0)
    if gap.count:
        return f"{tie.tie.in_words(tensor.shape)} differ, by up to {gap.gap:g} from the first"
    return tie.tie.are_tied_in_words(tensor.shape)
