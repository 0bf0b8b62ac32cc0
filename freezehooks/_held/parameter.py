"""One frozen parameter: its names, and the constraints that hold its entries."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from .._counted import counted
from .._entries.bits import count_true, differ
from .._entries.entry_set import Strided
from .._entries.plain import owns_its_entries
from .._entries.writes import Writes
from .._errors import ParameterChangedError, error_context
from .._ranks.sharding import Layout, cut, index_in_whole, joined, layout_of, local, local_gradient
from .._rules.rule import Rule
from .constraint import Constraint
from .fixed import refuse_disagreement
from .tied import TiedEntries
from .violation import Violation


class FrozenParameter:
    """The frozen entries of one parameter with their values, or its tied entries.

    It stores the parameter's shape, dtype and device but no reference to the parameter, so that a copy of a model
    never reaches back into the original. It is immutable: for a parameter that was moved, cast or sharded,
    `for_tensor` returns another one, which for a sharded parameter holds only this rank's shard.

    Attributes:
        name: The parameter's qualified name; the first one if modules share the parameter.
        names: All of its names.
        shape: The shape of the whole parameter.
        constraints: What each rule holds in it, in the order of the rules.
        frozen_count: How many entries of the whole parameter are frozen.
        layout: The mesh and placements of a sharded parameter, else None.
        ties: The constraints that tie entries; at most one.
    """

    def __init__(
        self,
        names: Sequence[str],
        parameter: Tensor,
        constraints: Sequence[Constraint],
        *,
        whole: FrozenParameter | None = None,
    ) -> None:
        self.name = names[0]
        self.names = tuple(names)
        self.shape = parameter.shape
        self.constraints = tuple(constraints)
        self.layout: Layout | None = layout_of(parameter) if whole is not None else None
        here = local(parameter) if self.layout is not None else parameter
        self._extent, self._dtype, self._device = here.shape, here.dtype, here.device
        self.ties = tuple(constraint for constraint in constraints if isinstance(constraint, TiedEntries))
        self._fixed = [constraint for constraint in constraints if not constraint.is_tie]
        self._ties_first: list[Constraint] = [*self.ties, *self._fixed]
        self._add_zero = [constraint.entries.add_zero for constraint in constraints if constraint.entries.count]
        is_plain = self.layout is None and not self._dtype.is_complex and len(constraints) == 1
        only = constraints[0].entries if is_plain else None
        self._only_box = only if isinstance(only, Strided) else None
        self.frozen_count: int = self._count_frozen() if whole is None else whole.frozen_count
        self._frozen_rows: Tensor | None = None if whole is None else whole._frozen_rows
        self._held_count = self.frozen_count

    def _count_frozen(self) -> int:
        """Count the frozen entries of a whole parameter, and reject rules that disagree about an entry.

        Raises:
            RuleConflictError: Two rules disagree; the message names both.
        """
        if len(self.constraints) == 1:
            return self.constraints[0].entries.count
        for tie in self.ties:
            for other in self.constraints:
                if other is not tie:
                    tie.check_beside(other, self._blank(), self.name)
        frozen = torch.zeros(self._extent, dtype=torch.bool, device=self._device)
        for n, constraint in enumerate(self._fixed):
            own = constraint.entries.mask(self._device)
            shared = frozen & own
            if bool(shared.any()):
                self._check_shared(n, shared)
            frozen |= own
        return count_true(frozen)

    def _check_shared(self, number: int, shared: Tensor) -> None:
        """Reject a constraint that disagrees with an earlier one about an entry that they share."""
        held = self._blank()
        for earlier in self._fixed[:number]:
            earlier.impose_(held)
        changed = held.clone()
        self._fixed[number].impose_(changed)
        if bool((differ(held, changed) & shared).any()):
            for earlier in self._fixed[:number]:
                earlier.check_beside(self._fixed[number], self._blank(), self.name)

    def check_beside(self, other: FrozenParameter) -> None:
        """Reject what another handle freezes in the same parameter if the two disagree about an entry.

        `keep` beside a given value is rejected even if the two are equal now: a kept value follows the next load, and
        a given one does not.

        Raises:
            RuleConflictError: They disagree; the message names both rules.
        """
        for theirs in other.constraints:
            for ours in self.constraints:
                theirs.check_beside(ours, self._blank(), self.name)
                if theirs.keeps != ours.keeps:
                    shared = theirs.entries.mask(self._device) & ours.entries.mask(self._device)
                    refuse_disagreement(theirs, ours, shared, self.name)

    def __repr__(self) -> str:
        shape = tuple(self.shape)
        return f"FrozenParameter({self.name!r}, shape={shape}, frozen={self.frozen_count}, free={self.free_count})"

    # Entries and values

    def _blank(self) -> Tensor:
        return torch.zeros(self._extent, dtype=self._dtype, device=self._device)

    def alone(self) -> Tensor:
        """Return zeros of the parameter's (or shard's) shape, with the values in the frozen entries."""
        held = self._blank()
        self.impose_(held)
        return held

    @property
    def frozen(self) -> Tensor:
        """The mask of the frozen entries; for a sharded parameter, the mask of this rank's shard.

        Shape:
            ``(*shape)``, bool, True at the frozen entries.
        """
        masks = [constraint.entries.mask(self._device) for constraint in self.constraints]
        return reduce(torch.logical_or, masks, self._blank().bool())

    def frozen_in_whole(self) -> Tensor:
        """Return the mask of the frozen entries in the whole parameter, gathered from all ranks if it is sharded."""
        return self.frozen if self.layout is None else joined(self.frozen, self.layout, self.shape)

    @property
    def frozen_rows(self) -> Tensor:
        """Which rows of the whole parameter, its slices along the first dimension, are frozen entirely.

        Shape:
            ``(shape[0],)``, bool.
        """
        if self._frozen_rows is None:
            self._frozen_rows = self.frozen_in_whole().reshape(self.shape[0], -1).all(1)
        return self._frozen_rows.to(self._device)

    @property
    def values(self) -> Tensor:
        """The values of the frozen entries, as ``parameter[this.frozen]`` reads them.

        Shape:
            ``(frozen_count,)``, row by row, in the parameter's dtype.
        """
        return self.alone()[self.frozen]

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules that freeze entries of this parameter, or tie it."""
        return tuple(constraint.rule for constraint in self.constraints)

    @property
    def is_sharded(self) -> bool:
        """Whether the parameter is sharded, so that this holds only the shard of this rank."""
        return self.layout is not None

    @property
    def free_count(self) -> int:
        """How many entries of the parameter train: those that no handle holds.

        For a sharded parameter, those that this handle does not hold.
        """
        return self.shape.numel() - self._held_count

    def named(self, names: Sequence[str]) -> FrozenParameter:
        """Return a copy with other names."""
        renamed = copy.copy(self)
        renamed.name, renamed.names = names[0], tuple(names)
        return renamed

    def beside(self, others: Sequence[FrozenParameter]) -> FrozenParameter:
        """Return a copy whose `free_count` also leaves out what other handles freeze in the same parameter."""
        if not others or self.is_sharded:  # counts over all shards would need every rank
            return self
        held = reduce(torch.logical_or, [other.frozen.to(self._device) for other in others], self.frozen)
        counted = copy.copy(self)
        counted._held_count = count_true(held)
        return counted

    def count_shared(self, others: Sequence[FrozenParameter]) -> int:
        """Count the entries that others freeze too; for a sharded parameter, those in this rank's shard."""
        theirs = reduce(torch.logical_or, [other.frozen.to(self._device) for other in others])
        return count_true(self.frozen & theirs)

    @property
    def nbytes(self) -> int:
        """The memory that regions and values take, in bytes; a slice held at a number takes none."""
        tensors = [tensor for constraint in self.constraints for tensor in constraint.tensors()]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        return sum(storage.nbytes() for storage in storages.values())

    def state(self) -> dict[str, Any]:
        """Return what is frozen as plain tensors and builtins, in the order of the rules."""
        constraints = self.whole_constraints()
        saved = [{"rule": str(constraint.rule), **constraint.state()} for constraint in constraints]
        return {"shape": list(self.shape), "constraints": saved}

    # For another tensor

    def for_tensor(self, parameter: Tensor) -> FrozenParameter:
        """Return the frozen parameter for a tensor that was moved, cast or sharded since, or itself if it was not.

        Raises:
            UnsupportedParameterError: The parameter has tied entries and is sharded now.
        """
        here, layout = local(parameter), layout_of(parameter)
        if here.is_meta:
            return self  # it is being moved, and has no data meanwhile
        if layout is not None and layout != self.layout:
            whole = self.whole_constraints()
            constraints = [constraint.for_shard(here.data, lambda full: cut(full, layout)) for constraint in whole]
        elif (here.dtype, here.device) != (self._dtype, self._device):
            constraints = list(self.constraints)
        else:
            return self
        return FrozenParameter(self.names, parameter, constraints, whole=self)

    def whole_constraints(self) -> Sequence[Constraint]:
        """Return the constraints on the whole parameter, gathered from all ranks if it is sharded."""
        layout = self.layout
        if layout is None:
            return self.constraints
        full = torch.empty((), dtype=self._dtype, device=self._device).expand(self.shape)
        return [
            constraint.for_shard(full, lambda shard: joined(shard, layout, self.shape))
            for constraint in self.constraints
        ]

    def check_shape(self, parameter: Tensor) -> None:
        """Reject a parameter that has another shape than the frozen one.

        Raises:
            ParameterChangedError: The shapes differ.
        """
        if parameter.shape != self.shape:
            raise ParameterChangedError(
                f"`{self.name}` had shape {tuple(self.shape)} when it was frozen and has {tuple(parameter.shape)} now",
                "remove the frozen entries before the parameter is replaced, and freeze again afterwards",
            )

    # Imposing

    def impose_(self, tensor: Tensor) -> None:
        """Write the values into the frozen entries of a plain tensor of the shard's shape; make tied entries equal."""
        for constraint in self._ties_first:
            constraint.impose_(tensor)

    def impose(self, parameter: Tensor) -> None:
        """Write the values into the frozen entries of the parameter.

        The write goes through `.data`, which leaves autograd's version counter alone, so that a module may be called
        twice in one graph, or once more without gradients before backward.

        Raises:
            ParameterChangedError: The parameter now has another shape.
        """
        self.check_shape(parameter)
        if not parameter.is_meta:  # no data, as in the middle of `to_empty`
            self.impose_(local(parameter).data)

    def add_impose(self, writes: Writes, tensor: Tensor) -> None:
        """Add to `writes` what `impose_` does."""
        for constraint in self._ties_first:
            constraint.add_impose(writes, tensor)

    def zero_(self, tensor: Tensor) -> None:
        """Write +0.0 into the frozen entries of a tensor of the shard's shape."""
        for constraint in self.constraints:
            constraint.entries.zero_(tensor)

    def fill_(self, tensor: Tensor, number: float) -> None:
        """Write one number into the frozen entries of a tensor of the shard's shape, and make tied entries equal."""
        for tie in self.ties:
            tie.impose_(tensor)
        for constraint in self.constraints:
            constraint.entries.fill_(tensor, number)

    # Freezing, and loading

    def check_start(self, parameter: Tensor) -> None:
        """Reject a parameter of another shape, or one that a constraint cannot start from.

        Raises:
            ParameterChangedError: The parameter has another shape.
            FrozenValueError: Tied entries differ, and the rule does not say which to start from.
            UnsupportedParameterError: A tied parameter has a sparse gradient.
        """
        self.check_shape(parameter)
        for constraint in self.constraints:
            constraint.check_start(parameter)

    def begin(self, parameter: Tensor) -> None:
        """Freeze the parameter: make tied entries equal, and impose the values."""
        for constraint in self.ties:
            constraint.begin_(parameter.data)
        self.impose(parameter)

    def capture_kept(self, parameter: Tensor) -> None:
        """Update the values of `keep` to what was loaded into the parameter, and impose all other values on it."""
        self.check_shape(parameter)
        for tie in self.ties:
            with error_context(f"rule `{tie.rule}`", f"loaded into `{self.name}`"):
                tie.check_start(parameter)
            tie.begin_(parameter.data)
        tensor = local(parameter).data
        for constraint in self._fixed:
            if not constraint.keeps:
                constraint.impose_(tensor)
        for constraint in self.constraints:
            constraint.capture_kept(tensor)

    def follow(self, parameter: Tensor, dtype: torch.dtype) -> None:
        """Treat a parameter that replaced another like one that was loaded into.

        If it holds the values, perhaps converted, nothing changes: they stay in the precision in which they were
        given.

        Args:
            parameter: The new parameter.
            dtype: The dtype of the one that it replaced.

        Warns:
            UserWarning: A given value is imposed on entries that held something else.
        """
        came = local(parameter).detach().clone()
        before = came.to(dtype, copy=True)
        self.impose_(before)
        numbers, held = came.clone(), came.clone()
        self.impose_(held)
        is_new = differ(held, came) & differ(before.to(came.dtype), came)
        if not bool(is_new.any()):
            return
        for constraint in self._fixed:
            if not constraint.keeps:
                constraint.impose_(numbers)
        self.capture_kept(parameter)
        self._warn_of_replaced(count_true(differ(numbers, came) & is_new))

    def _warn_of_replaced(self, count: int) -> None:
        if count:
            warnings.warn(
                f"`{self.name}` was replaced by another parameter, which held other numbers in "
                f"{counted(count, 'frozen entry', 'frozen entries')}; the values of "
                f"{', '.join(f'`{rule}`' for rule in self.rules)} are imposed on it, as on what is loaded: call "
                "remove() before you fold, merge or export the model",
                stacklevel=2,
            )

    # Gradients

    def add_zero_gradient(self, writes: Writes, parameter: Tensor) -> None:
        """Make the parameter's gradient exactly +0.0 at the frozen entries, even where it is inf or nan.

        Args:
            writes: Where to add the write for a plain gradient, to be run later; other gradients are written at once.
            parameter: The parameter.
        """
        gradient = parameter.grad if self.layout is None else local_gradient(parameter)
        if gradient is None or gradient.is_meta:
            return
        if gradient.layout != torch.strided:
            self._zero_sparse(gradient)
            return
        if gradient.requires_grad:  # it is in a graph (create_graph=True), which must not see an in-place write
            frozen = torch.empty_like(gradient, dtype=torch.bool, requires_grad=False).copy_(self.frozen)
            parameter.grad = torch.where(frozen, torch.zeros_like(gradient), gradient)  # keeps the memory layout
            return
        if not owns_its_entries(gradient):
            gradient = gradient.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
            parameter.grad = gradient
        for add_zero in self._add_zero:
            add_zero(writes, gradient)

    def add_zero_accumulated(self, writes: Writes, parameter: Tensor) -> Tensor | None:
        """Do what `add_zero_gradient` does, more quickly, for a gradient that autograd has just accumulated.

        Such a gradient is never expanded, and never made under torch.inference_mode.

        Returns:
            The gradient that the parameter has afterwards.
        """
        gradient, box = parameter.grad, self._only_box
        if gradient is None or box is None or not _is_plain(gradient):
            self.add_zero_gradient(writes, parameter)
            return parameter.grad
        writes.zero(box.view(gradient))
        return gradient

    def zero_gradient(self, parameter: Tensor) -> None:
        """Make the parameter's gradient exactly +0.0 at the frozen entries, now."""
        writes = Writes()
        self.add_zero_gradient(writes, parameter)
        writes.run()

    def complete_gradient(self, parameter: Tensor) -> None:
        """Sum a tied parameter's gradient over the copies if the hook that does so was not called for it."""
        for constraint in self.ties:
            constraint.complete_gradient(parameter)

    def _zero_sparse(self, gradient: Tensor) -> None:
        rows = gradient._indices()  # the public methods would need a coalesced copy
        frozen = self.frozen.to(gradient.device)[tuple(rows)]
        gradient._values().masked_fill_(frozen, 0)

    # Checking

    def violation(self, parameter: Tensor) -> Violation | None:
        """Compare the frozen entries with their values bit for bit; return the violation, or None if all hold.

        For a sharded parameter, each rank checks its own shard.

        Raises:
            ParameterChangedError: The parameter is on the meta device now.
        """
        if parameter.is_meta:
            raise ParameterChangedError(
                f"`{self.name}` is on the meta device and has no numbers",
                "give it numbers with `to_empty`, and load or impose them, before you check",
            )
        found = local(parameter.detach())
        held = found.clone()
        self.impose_(held)
        drifted = differ(held, found)
        if not bool(drifted.any()):
            return None
        gap = (held - found).abs().nan_to_num(nan=torch.inf).where(drifted, -1)
        worst = tuple(int(i) for i in torch.unravel_index(gap.argmax(), gap.shape))
        index = worst if self.layout is None else index_in_whole(worst, self.shape, self.layout)
        return Violation(self.name, count_true(drifted), index, found[worst].item(), held[worst].item())


def _is_plain(accumulated: Tensor) -> bool:
    return accumulated.layout is torch.strided and not (accumulated.requires_grad or accumulated.is_neg())
