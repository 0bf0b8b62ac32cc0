"""The checkpoint whose numbers are kept: what it must have, and what the frozen entries held in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from .._errors import CheckpointError, FrozenValueError, RegionError, TargetError
from .._held.names import Targets
from .._held.parameter import FrozenParameter
from .._rules.rule import Keep, Rule
from .checkpoints import counterparts, freezable
from .selection import part_of
from .words import chosen_by_numbers


class Base:
    """The checkpoint that another one is verified against, or none.

    Args:
        tensors: The tensors of the checkpoint that is verified.
        others: Those of the base, or None where there is none.
    """

    def __init__(self, tensors: Mapping[str, Tensor], others: Mapping[str, Tensor] | None) -> None:
        self._others = others
        self._names = counterparts(tensors, others) if others is not None else {}
        self._bases = {name: others[other] for name, other in self._names.items()} if others is not None else {}

    def check(self, name: str, tensor: Tensor, rules: Sequence[Rule]) -> None:
        """Refuse rules about a parameter that cannot be verified with this base, or without one.

        Raises:
            CheckpointError: The base lacks the parameter, or has it with another number of dimensions or dtype, or
                there is none and a rule keeps what it held.
            RegionError: A region is chosen by numbers that there are none of.
        """
        for rule in rules:
            if self._others is None:
                _check_alone(rule)
            else:
                self._check_beside(name, tensor, rule)

    def _check_beside(self, name: str, tensor: Tensor, rule: Rule) -> None:
        if name not in self._bases:
            raise CheckpointError(
                f"rule `{rule}`: the base has no `{name}`", "name parameters that both files have, or another base"
            )
        base = self._bases[name]
        if base.ndim != tensor.ndim:
            raise CheckpointError(
                f"rule `{rule}`: `{name}` has shape {tuple(tensor.shape)}, and {tuple(base.shape)} in the base",
                "name parameters that have the same dimensions in both files",
            )
        if base.dtype != tensor.dtype and (rule.value is Keep.KEEP or base.is_complex() or tensor.is_complex()):
            raise _of_two_dtypes(rule, name, tensor, base)
        _check_finite(rule, name, tensor)
        chosen = chosen_by_numbers(rule.region)
        if chosen and base.shape != tensor.shape:
            raise RegionError(
                f"rule `{rule}`: `{sorted(chosen)[0]}` is chosen on the base, where `{name}` has shape "
                f"{tuple(base.shape)} instead of {tuple(tensor.shape)}",
                "write the region as an index",
            )

    def check_all_seen(self, tensors: Mapping[str, Tensor], selected: Mapping[str, Sequence[Rule]]) -> None:
        """Refuse rules that speak of a parameter of the base that the checkpoint has not, or has as integers.

        Args:
            tensors: The tensors of the checkpoint.
            selected: For each of its parameters the rules that speak of it.

        Raises:
            CheckpointError: A rule does.
        """
        if self._others is None:
            return
        targets = Targets(freezable(self._others))
        for rule in dict.fromkeys(rule for own in selected.values() for rule in own):
            seen = {self._names[name] for name, own in selected.items() if rule in own}
            for other in _spoken_of(rule, targets):
                if other not in seen:
                    raise self._unseen(rule, other, self._others[other], tensors)

    def _unseen(self, rule: Rule, other: str, base: Tensor, tensors: Mapping[str, Tensor]) -> CheckpointError:
        for name, its in self._names.items():
            if its == other and tensors[name].dtype != base.dtype:
                return _of_two_dtypes(rule, name, tensors[name], base)
        return CheckpointError(
            f"rule `{rule}`: the checkpoint has no `{other}`, which the base has",
            "name parameters that both files have, or the whole checkpoint",
        )

    def reference(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor of the parameter's shape that holds what the base does, where the base has it."""
        if self._others is None:
            return tensor
        base = self._bases[name]
        return base if base.shape == tensor.shape else laid_over(tensor, base)

    def check_kept(self, name: str, tensor: Tensor, part: FrozenParameter) -> None:
        """Refuse to keep entries that the base has not, or that the checkpoint has no longer.

        Raises:
            CheckpointError: A rule does; the message names the first.
        """
        if self._others is None or self._bases[name].shape == tensor.shape:
            return
        base = self._bases[name]
        shapes = f"its shape is {tuple(base.shape)} in the base and {tuple(tensor.shape)} in the checkpoint"
        for rule, entry in _kept_beyond(part, base):
            raise CheckpointError(f"rule `{rule}`: the base has no entry {entry} of `{name}`, {shapes}", _BOTH)
        kept = [piece.rule for piece in part.pieces if piece.keeps]
        for rule, entry in _kept_beyond(part_of(name, base, kept), tensor) if kept else ():
            raise CheckpointError(f"rule `{rule}`: the checkpoint has no entry {entry} of `{name}`, {shapes}", _BOTH)

    def notes(self, rules: Sequence[Rule]) -> Iterator[str]:
        """Yield what a reader must know about how rules were understood."""
        for rule in rules if self._others is None else ():
            for pattern in sorted(chosen_by_numbers(rule.region)):
                yield f"note: `{rule}`: `{pattern}` was chosen on the checkpoint itself, for want of --against BASE"


_BOTH: Final = "freeze what both files have, as in `wte[:50257]`"


def _kept_beyond(part: FrozenParameter, other: Tensor) -> Iterator[tuple[Rule, list[int]]]:
    """Yield the rules that keep entries outside another tensor of as many dimensions, each with the first of these."""
    for piece in part.pieces:
        missing = piece.places.frozen(part.shape, other.device)
        missing[tuple(map(slice, other.shape))] = False
        if piece.keeps and bool(missing.any()):
            yield piece.rule, missing.nonzero()[0].tolist()


def _spoken_of(rule: Rule, targets: Targets) -> list[str]:
    try:
        return targets.find(rule.target)
    except TargetError:  # what the checkpoint has as numbers, the base has as integers
        return []


def _of_two_dtypes(rule: Rule, name: str, tensor: Tensor, base: Tensor) -> CheckpointError:
    return CheckpointError(
        f"rule `{rule}`: `{name}` is of {tensor.dtype}, and of {base.dtype} in the base", "convert one of them"
    )


def _check_alone(rule: Rule) -> None:
    if rule.value is Keep.KEEP:
        raise CheckpointError(
            f"rule `{rule}`: there is nothing that says what the entries held before", "name the base: --against BASE"
        )
    if "zeros" in chosen_by_numbers(rule.region):
        raise RegionError(
            f"rule `{rule}`: `zeros` chosen on the checkpoint itself would be true of anything",
            "name the base that it is chosen on: --against BASE",
        )


def _check_finite(rule: Rule, name: str, tensor: Tensor) -> None:
    """Refuse a number that the base's dtype can hold and the parameter's cannot."""
    value = rule.value
    if isinstance(value, float) and not bool(torch.tensor(value, dtype=torch.float64).to(tensor.dtype).isfinite()):
        raise FrozenValueError(
            f"rule `{rule}`: the value is not finite as {tensor.dtype}, the dtype of `{name}`", "correct the rule"
        )


def overlap(first: Tensor, second: Tensor) -> tuple[slice, ...]:
    """Return the box of entries that two tensors of as many dimensions both have."""
    return tuple(slice(min(sizes)) for sizes in zip(first.shape, second.shape, strict=True))


def laid_over(tensor: Tensor, base: Tensor) -> Tensor:
    """Return a copy of a tensor that holds, where the base has entries too, what the base does."""
    box = overlap(tensor, base)
    copy = tensor.to(base.dtype, copy=True, memory_format=torch.contiguous_format)
    copy[box] = base[box]
    return copy
