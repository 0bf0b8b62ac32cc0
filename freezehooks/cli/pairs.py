"""Two files side by side: which tensor of one is which of the other, names of wrappers and tied names aside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .._errors import CheckpointError
from .._held.names import unwrapped


@dataclass(frozen=True, slots=True)
class Pairing:
    """What two files have in common, and what one of them has alone.

    A tensor that one file has under more names than the other is in both all the same.

    Attributes:
        pairs: The tensors of both, in the order of the one file: its first name there, and its name in the other.
        also: Its further names in the one file, where it is tied in both.
        alone: The names that the one file has alone.
        missing: Those that the other file has alone.
    """

    pairs: dict[str, str]
    also: dict[str, list[str]]
    alone: tuple[str, ...]
    missing: tuple[str, ...]

    @staticmethod
    def of(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> Pairing:
        """Pair the tensors of two files.

        Raises:
            CheckpointError: Without the names of wrappers, two names of a file are one.
        """
        names, ours, theirs = counterparts(tensors, others), first_names(tensors), first_names(others)
        groups: dict[tuple[str, str], list[str]] = {}
        for name, other in names.items():
            groups.setdefault((ours[name], theirs[other]), []).append(name)
        also = {name: more for name, *more in groups.values()}
        pairs = {name: names[name] for name in also}
        return Pairing(pairs, also, _unpaired(ours, names), _unpaired(theirs, names.values()))


def _unpaired(first: Mapping[str, str], paired: Iterable[str]) -> tuple[str, ...]:
    """Return the tensors, by their first names, of which no name is in `paired`."""
    known = {first[name] for name in paired}
    return tuple(dict.fromkeys(name for name in first.values() if name not in known))


def first_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return for each name the first name of the same tensor: another one where it is tied."""
    firsts: dict[object, str] = {}
    return {name: firsts.setdefault(_place(tensor) or name, name) for name, tensor in tensors.items()}


def _place(tensor: Tensor) -> object:
    """Return where a tensor lies in memory, and how; None where it has no entry."""
    return (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else None


def counterparts(tensors: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, str]:
    """Pair the names of two files: each name of the first that the second knows, perhaps but for names of wrappers.

    Raises:
        CheckpointError: Without the names of wrappers, two names of a file are one.
    """
    ours, theirs = _by_core(tensors, others), _by_core(others, tensors)
    paired = {name: name for name in tensors if name in others}
    for core, names in ours.items():
        found, advice = theirs.get(core, []), "save both models with the same wrappers"
        if len(found) > 1:
            raise CheckpointError(f"`{names[0]}` may be `{found[0]}` or `{found[1]}` of the other file", advice)
        if found and len(names) > 1:
            raise CheckpointError(f"`{found[0]}` of the other file may be `{names[0]}` or `{names[1]}`", advice)
        paired.update(zip(names, found, strict=False))
    return {name: paired[name] for name in tensors if name in paired}


def _by_core(tensors: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the names that one file alone has, under what they are without the names of wrappers."""
    found: dict[str, list[str]] = {}
    for name in tensors:
        if name not in others:
            found.setdefault(unwrapped(name), []).append(name)
    return found
