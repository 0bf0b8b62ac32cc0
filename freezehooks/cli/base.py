"""The base checkpoint of `verify`: checks that it fits the rules, and returns what the frozen entries held in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .._errors import CheckpointError, FrozenValueError, RegionError, error_context
from .._held.parameter import FrozenParameter
from .._rules.rule import Keep, Rule
from .pairs import counterparts
from .selection import Names, chosen_by_numbers, frozen_by


class Base:
    """The checkpoint against which another one is verified; without one, the verified checkpoint itself.

    Args:
        tensors: The tensors of the checkpoint to verify.
        others: The tensors of the base, or None if there is none.
    """

    def __init__(self, tensors: Mapping[str, Tensor], others: Mapping[str, Tensor] | None) -> None:
        self._is_itself = others is None
        self._tensors, self._others = tensors, tensors if others is None else others
        self._names = counterparts(self._tensors, self._others)

    def check(self, selected: Mapping[str, Sequence[Rule]]) -> None:
        """Reject rules that cannot be verified with this base.

        Args:
            selected: The rules for each parameter of the checkpoint.

        Raises:
            CheckpointError: There is no base and a rule's value is `keep`; or one of the two files lacks a parameter
                that a rule names, or has it with another number of dimensions or dtype.
            FrozenValueError: A rule's number is not finite in the checkpoint's dtype.
            RegionError: A region depends on what the base contains, and there is no base or its shape differs.
        """
        seen: dict[Rule, set[str]] = {}
        for name, rules in selected.items():
            for rule in rules:
                with error_context(f"rule `{rule}`"):
                    self._check_comparable(name, rule)
                seen.setdefault(rule, set()).add(self._names[name])
        known = Names(self._others)
        for rule, names in seen.items():
            for other in known.freezable(rule):
                if other not in names:
                    raise self._unseen(other).within(f"rule `{rule}`")

    def _check_comparable(self, name: str, rule: Rule) -> None:
        if self._is_itself:
            _check_alone(rule)
        if name not in self._names:
            raise CheckpointError(f"the base has no `{name}`", "name parameters that both files have, or another base")
        tensor, base = self._both(name)
        shape, base_shape = tuple(tensor.shape), tuple(base.shape)
        if len(shape) != len(base_shape):
            raise CheckpointError(
                f"`{name}` has shape {shape}, and {base_shape} in the base",
                "name parameters that have the same dimensions in both files",
            )
        if base.dtype != tensor.dtype and (rule.value is Keep.KEEP or base.is_complex() or tensor.is_complex()):
            raise _of_two_dtypes(name, tensor, base)
        value = rule.value
        if isinstance(value, float) and not bool(torch.tensor(value, dtype=torch.float64).to(tensor.dtype).isfinite()):
            raise FrozenValueError(
                f"the value is not finite as {tensor.dtype}, the dtype of `{name}`",  # even if it is in the base's
                "correct the rule",
            )
        check_region(rule, name, tensor, base)

    def _unseen(self, other: str) -> CheckpointError:
        name = next((name for name, its in self._names.items() if its == other), None)
        if name is not None and self._tensors[name].dtype != self._others[other].dtype:
            return _of_two_dtypes(name, *self._both(name))
        return CheckpointError(
            f"the checkpoint has no `{other}`, which the base has",
            "name parameters that both files have, or the whole checkpoint",
        )

    def _both(self, name: str) -> tuple[Tensor, Tensor]:
        """Return a parameter in the checkpoint and in the base."""
        return self._tensors[name], self._others[self._names[name]]

    def reference(self, name: str, rules: Iterable[Rule]) -> Tensor:
        """Return a tensor of the parameter's shape with the entries of the base, as far as the base has them.

        Raises:
            CheckpointError: A rule keeps entries that the base does not have, or the checkpoint has no more.
        """
        tensor, base = self._both(name)
        if base.shape == tensor.shape:
            return base
        shapes = f"its shape is {tuple(base.shape)} in the base and {tuple(tensor.shape)} in the checkpoint"
        for rule in rules:
            if rule.value is Keep.KEEP:
                with error_context(f"rule `{rule}`"):
                    _check_has_all("base", base, frozen_by([rule], name, tensor), shapes)
                    _check_has_all("checkpoint", tensor, frozen_by([rule], name, base), shapes)
        box = overlap(tensor, base)
        copy = tensor.to(base.dtype, copy=True, memory_format=torch.contiguous_format)
        copy[box] = base[box]
        return copy


def _check_has_all(file: str, tensor: Tensor, kept: FrozenParameter, shapes: str) -> None:
    missing = kept.frozen
    missing[tuple(map(slice, tensor.shape))] = False
    if bool(missing.any()):
        raise CheckpointError(
            f"the {file} has no entry {missing.nonzero()[0].tolist()} of `{kept.name}`, {shapes}",
            "freeze what both files have, as in `wte[:50257]`",
        )


def _of_two_dtypes(name: str, tensor: Tensor, base: Tensor) -> CheckpointError:
    return CheckpointError(f"`{name}` is of {tensor.dtype}, and of {base.dtype} in the base", "convert one of them")


def _check_alone(rule: Rule) -> None:
    """Reject a rule that needs a base."""
    if rule.value is Keep.KEEP:
        raise CheckpointError("nothing tells what the entries held before", "name the base: --against BASE")
    if "zeros" in chosen_by_numbers(rule.region):
        raise RegionError(
            "`zeros` chosen on the checkpoint itself would hold for any checkpoint",
            "name the base that it is chosen on: --against BASE",
        )


def check_region(rule: Rule, name: str, tensor: Tensor, base: Tensor) -> None:
    """Reject a region that depends on what the base contains if the base has another shape.

    Raises:
        RegionError: There is a pattern that depends on it.
    """
    for pattern in chosen_by_numbers(rule.region) if tensor.shape != base.shape else ():
        raise RegionError(
            f"`{pattern}` is chosen on the base, where `{name}` has shape {tuple(base.shape)} "
            f"instead of {tuple(tensor.shape)}",
            "write the region as an index",
        )


def overlap(first: Tensor, second: Tensor) -> tuple[slice, ...]:
    """Return the box of entries that two tensors with the same number of dimensions have in common."""
    return tuple(slice(min(sizes)) for sizes in zip(first.shape, second.shape, strict=True))
