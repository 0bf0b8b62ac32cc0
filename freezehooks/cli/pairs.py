"""Pairs the tensors of two files, regardless of names of wrappers and of shared tensors with several names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .._errors import CheckpointError
from .._held.names import unwrapped


@dataclass(frozen=True, slots=True)
class Pairing:
    """The tensors that two files have in common, and those that only one of them has.

    A tensor that has more names in one file than in the other still counts as being in both.

    Attributes:
        pairs: The common tensors, in the order of the first file: the first name there, and the name in the other.
        also: The further names in the first file of tensors that are shared in both, by the first name.
        alone: The names that only the first file has.
        missing: The names that only the other file has.
    """

    pairs: dict[str, str]
    also: dict[str, list[str]]
    alone: tuple[str, ...]
    missing: tuple[str, ...]

    @staticmethod
    def of(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> Pairing:
        """Pair the tensors of two files.

        Raises:
            CheckpointError: Two names of a file are the same without the names of wrappers.
        """
        names, ours, theirs = counterparts(tensors, others), first_names(tensors), first_names(others)
        groups: dict[tuple[str, str], list[str]] = {}
        for name, other in names.items():
            groups.setdefault((ours[name], theirs[other]), []).append(name)
        also = {name: more for name, *more in groups.values()}
        pairs = {name: names[name] for name in also}
        return Pairing(pairs, also, _unpaired(ours, names), _unpaired(theirs, names.values()))


def _unpaired(first: Mapping[str, str], paired: Iterable[str]) -> tuple[str, ...]:
    """Return the first names of the tensors that have no name in `paired`."""
    known = {first[name] for name in paired}
    return tuple(dict.fromkeys(name for name in first.values() if name not in known))


def first_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Map each name to the first name of the same tensor, which is another one if the tensor is shared."""
    firsts: dict[object, str] = {}
    return {name: firsts.setdefault(_memory(tensor) or name, name) for name, tensor in tensors.items()}


def _memory(tensor: Tensor) -> object:
    """Return the address and layout of a tensor in memory, or None if it is empty."""
    return (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else None


def counterparts(tensors: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, str]:
    """Map each name of one file to the name of the same tensor in the other, with or without names of wrappers.

    Raises:
        CheckpointError: Two names of a file are the same without the names of wrappers.
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
    """Return the names that only one file has, by what they are without the names of wrappers."""
    found: dict[str, list[str]] = {}
    for name in tensors:
        if name not in others:
            found.setdefault(unwrapped(name), []).append(name)
    return found
