"""The copies that a tie makes of a tensor's entries, and the operations over all copies of an entry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, cast

import torch
from torch import Tensor

from .._entries.plain import as_tensor, oddity_of
from .._errors import RegionError
from .._rules.ties import Labeled, Mirrored, Symmetric, Tie, Tied


class Copies(ABC):
    """Tied entries of a tensor, called copies of each other; the first copy, row by row, represents the others."""

    @staticmethod
    def of(tie: Tie, parameter: Tensor) -> Copies:
        """Return the copies that a tie makes of a parameter's entries.

        Raises:
            RegionError: The tie does not fit the parameter's shape, or ties no entries.
        """
        tie.check(parameter.shape)
        return Slices(tie.dim, tie.groups) if isinstance(tie, Tied) else Scattered(_first_positions(tie, parameter))

    @abstractmethod
    def first(self, tensor: Tensor) -> Tensor:
        """Return the first copy of each entry, in a shape that expands to the tensor's."""

    @abstractmethod
    def spread_(self, tensor: Tensor) -> None:
        """Write the first copies into all others."""

    @abstractmethod
    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over the copies of each entry."""

    @abstractmethod
    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean over the copies of each entry."""

    def first_positions(self, shape: torch.Size, device: torch.device) -> Tensor:
        """Return the position of the first copy of each entry in the flat tensor."""
        return self.first(_positions(shape, device)).expand(shape)

    def others(self, shape: torch.Size, device: torch.device) -> Tensor:
        """Return the bool tensor that is True at all copies but the first ones."""
        return self.first_positions(shape, device) != _positions(shape, device)


class Slices(Copies):
    """All slices along a dimension are copies, or all slices within each of several equal groups.

    Args:
        dim: The dimension.
        groups: How many groups.
    """

    def __init__(self, dim: int, groups: int) -> None:
        self._groups = groups
        self._dim = dim
        self._along = dim if groups == 1 or dim < 0 else dim + 1
        """The dimension of the slices, after the groups are split off into one before it."""

    def _grouped(self, tensor: Tensor) -> Tensor:
        return tensor if self._groups == 1 else tensor.unflatten(self._dim, (self._groups, -1))

    def first(self, tensor: Tensor) -> Tensor:
        grouped = self._grouped(tensor)
        first = grouped.narrow(self._along, 0, 1)
        return first if self._groups == 1 else first.expand_as(grouped).reshape(tensor.shape)

    def spread_(self, tensor: Tensor) -> None:
        grouped = self._grouped(tensor)
        others = grouped.narrow(self._along, 1, grouped.shape[self._along] - 1)
        others.copy_(grouped.narrow(self._along, 0, 1).expand(others.shape))

    def sum(self, tensor: Tensor) -> Tensor:
        grouped = self._grouped(tensor)
        summed = grouped.sum(self._along, keepdim=True).expand(grouped.shape)
        return summed if self._groups == 1 else summed.reshape(tensor.shape)

    def mean(self, tensor: Tensor) -> Tensor:
        grouped = self._grouped(tensor)
        return grouped.mean(self._along, keepdim=True).expand(grouped.shape).reshape(tensor.shape)


class Scattered(Copies):
    """Copies anywhere in a tensor.

    Args:
        first: The position of the first copy of each entry, in the flat tensor.
    """

    def __init__(self, first: Tensor) -> None:
        self._others = (first != torch.arange(len(first), device=first.device)).nonzero().flatten()
        self._firsts = first[self._others]
        if not len(self._others):
            raise RegionError("no two entries are tied", "correct the labels, or leave the rule out")

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Move the positions to a device, and return those of the later copies and of their first ones."""
        if self._others.device != device:
            self._others, self._firsts = self._others.to(device), self._firsts.to(device)
        return self._others, self._firsts

    def first(self, tensor: Tensor) -> Tensor:
        others, firsts = self._on(tensor.device)
        flat = tensor.flatten()
        return flat.index_copy(0, others, flat[firsts]).view(tensor.shape)

    def spread_(self, tensor: Tensor) -> None:
        tensor.copy_(self.first(tensor))

    def sum(self, tensor: Tensor) -> Tensor:
        others, firsts = self._on(tensor.device)
        flat = tensor.flatten()
        exact = flat.to(torch.promote_types(flat.dtype, torch.float32))  # 16-bit sums would be rounded at each addition
        return self.first(exact.index_add(0, firsts, exact[others]).to(flat.dtype)).view(tensor.shape)

    def mean(self, tensor: Tensor) -> Tensor:
        return self.sum(tensor) / self.sum(torch.ones_like(tensor))


def _first_positions(tie: Tie, parameter: Tensor) -> Tensor:
    """Return the position of the first copy of each entry, in the flat parameter.

    Raises:
        RegionError: Labels are not integers, are below -1, or are not in a dense tensor.
    """
    positions = _positions(parameter.shape, parameter.device)
    if isinstance(tie, Mirrored):
        return positions.minimum(positions.flip(tie.dim)).flatten()
    if isinstance(tie, Symmetric):
        return positions.minimum(positions.mT).flatten()
    labels = _checked_labels(cast("Labeled", tie).labels)
    return _first_of_label(labels.to(parameter.device).flatten(), positions.flatten())


def _positions(shape: torch.Size, device: torch.device) -> Tensor:
    return torch.arange(shape.numel(), device=device).view(shape)


def _checked_labels(labels: Any) -> Tensor:
    found = as_tensor(labels)
    oddity = oddity_of(found) if isinstance(found, Tensor) else f"{type(labels).__name__} of {found.dtype}"
    if oddity:
        raise RegionError(
            f"labels must be a dense tensor of integers, found {oddity}",
            "convert it with `to_dense()`, or make it on a real device",
        )
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool or bool((found < -1).any()):
        raise RegionError(
            f"labels must be integers from -1 on, found {found.dtype}",
            "give tied entries the same number, and -1 where an entry is free",
        )
    whole: Tensor = found.long()
    return whole


def _first_of_label(labels: Tensor, positions: Tensor) -> Tensor:
    known, number = labels.unique(return_inverse=True)
    first = torch.full_like(known, len(labels)).scatter_reduce_(0, number, positions, "amin")
    return torch.where(labels < 0, positions, first[number])
