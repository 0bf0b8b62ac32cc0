"""The frozen entries of one parameter: hold the values, impose, zero a gradient, find violations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .._counted import counted
from .._entries.places import bits
from .._errors import (
    ParameterChangedError,
    RuleConflictError,
    UnsupportedParameterError,
    error_context,
)
from .._ranks.sharding import Layout, cut, is_stand_in, joined, layout_of, local, local_gradient
from .._rules.rule import Rule
from .fixed import Piece
from .tied import Tie


@dataclass(frozen=True, slots=True)
class Violation:
    """Frozen entries of one parameter that do not hold their values.

    Attributes:
        name: The parameter's qualified name.
        count: How many of its frozen entries drifted.
        index: Where the entry lies that drifted most.
        found: What that entry holds.
        expected: What it should hold.
    """

    name: str
    count: int
    index: tuple[int, ...]
    found: float | complex
    expected: float | complex

    @property
    def drift(self) -> float:
        """The absolute difference between what that entry holds and what it should hold; infinite for nan."""
        drift = abs(self.found - self.expected)
        return math.inf if math.isnan(drift) else drift

    def __str__(self) -> str:
        place = ", ".join(map(str, self.index))
        drifted = counted(self.count, "entry", "entries")
        return f"`{self.name}[{place}]` holds {self.found!r} instead of {self.expected!r} ({drifted} drifted)"


class FrozenPart:
    """The frozen entries of one parameter and the values they are held at, or the copies in it that are one.

    It knows the parameter's shape but not the parameter, so that a copy of a model and its copied parts never reach
    back into the original. Of a parameter that is spread over ranks it holds this rank's part alone.

    Attributes:
        name: The parameter's qualified name; the first one of a tied parameter.
        names: All of its names.
        shape: The parameter's shape.
        pieces: What each rule freezes of it, in the order of the rules.
        tie: What a rule ties of it, or None.
    """

    def __init__(self, names: list[str], parameter: Tensor, members: Sequence[Piece | Tie]) -> None:
        self.name = names[0]
        self.names = tuple(names)
        self.shape = parameter.shape
        self._dtype, self._device = parameter.dtype, parameter.device
        # Python's weak references would keep torch from swapping a tensor (torch.utils.swap_tensors), as conversions do
        self._cleaned: tuple[int, StorageWeakRef, int] | None = None
        self._layout: Layout | None = None
        self._sharded: Tensor | None = None
        self._extent = parameter.shape
        self.replace(members)

    def replace(self, members: Sequence[Piece | Tie]) -> None:
        """Hold what other pieces, and perhaps a tie, say of the same parameter from here on.

        Raises:
            RuleConflictError: Two of them disagree about an entry; nothing is changed then.
        """
        pieces = [member for member in members if isinstance(member, Piece)]
        ties = [member for member in members if isinstance(member, Tie)]
        self._layout, self._extent = None, self.shape  # of the whole parameter, until it is seen again
        self._check_ties(ties, pieces)
        frozen = torch.zeros(self.shape, dtype=torch.bool, device=self._device)
        held = self._blank()
        for n, piece in enumerate(pieces):
            own, changed = self._frozen_by(piece), held.clone()
            piece.impose_(changed)
            if bool((_differ(held, changed) & frozen & own).any()):
                for earlier in pieces[:n]:
                    self._check_pair(earlier, piece)
            held, frozen = changed, frozen | own
        self._members = list(members)
        self.pieces = pieces
        self.tie = ties[0] if ties else None
        self.frozen_count = int(frozen.sum())

    def _check_ties(self, ties: list[Tie], pieces: list[Piece]) -> None:
        if len(ties) > 1:
            raise RuleConflictError(
                f"rules `{ties[0].rule}` and `{ties[1].rule}` both tie `{self.name}`", "leave one of them out"
            )
        for tie in ties:
            for piece in pieces:
                held = self._blank()
                piece.impose_(held)
                tie.check_beside(piece.rule, self._frozen_by(piece), held, self.name)

    def check_beside(self, other: FrozenPart) -> None:
        """Refuse what another handle freezes of the same parameter, where the two disagree about an entry.

        A kept entry that the other holds at a number is refused even where both are equal now: the kept one follows
        the next load, and the other does not.

        Raises:
            RuleConflictError: They disagree; the message names both rules.
        """
        ties = [tie for tie in (other.tie, self.tie) if tie is not None]
        self._check_ties(ties, [*other.pieces, *self.pieces])
        for theirs in other.pieces:
            for ours in self.pieces:
                self._check_pair(theirs, ours, must_follow_alike=True)

    def _check_pair(self, first: Piece, second: Piece, must_follow_alike: bool = False) -> None:
        shared = self._frozen_by(first) & self._frozen_by(second)
        if not bool(shared.any()):
            return
        held = self._blank()
        first.impose_(held)
        changed = held.clone()
        second.impose_(changed)
        disagreed = shared if must_follow_alike and first.keeps != second.keeps else _differ(held, changed) & shared
        if bool(disagreed.any()):
            raise RuleConflictError(
                f"rules `{first.rule}` and `{second.rule}` disagree about entry {disagreed.nonzero()[0].tolist()} "
                f"of `{self.name}`",
                "make their regions disjoint, or their values equal",
            )

    def __repr__(self) -> str:
        return (
            f"FrozenPart({self.name!r}, shape={tuple(self.shape)}, frozen={self.frozen_count}, free={self.free_count})"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_cleaned": None, "_sharded": None}

    def _blank(self) -> Tensor:
        return torch.zeros(self._extent, dtype=self._dtype, device=self._device)

    @property
    def frozen(self) -> Tensor:
        """Where the entries are frozen; of a parameter that is spread over ranks, where in this rank's part.

        Shape:
            ``(*shape)``, bool, True at the frozen entries.
        """
        frozen = torch.zeros(self._extent, dtype=torch.bool, device=self._device)
        for piece in self.pieces:
            frozen |= self._frozen_by(piece)
        return frozen

    def frozen_in_whole(self) -> Tensor:
        """Return where the entries of the whole parameter are frozen: gathered, where it is spread over ranks."""
        return self.frozen if self._layout is None else joined(self.frozen, self._layout, self.shape)

    def _frozen_by(self, piece: Piece) -> Tensor:
        """Return the bool tensor of what one piece freezes."""
        return piece.places.frozen(self._extent, self._device)

    @property
    def values(self) -> Tensor:
        """The values of the frozen entries, as ``parameter[part.frozen]`` reads them.

        Shape:
            ``(frozen_count,)``, row by row, in the parameter's dtype.
        """
        imposed = self._blank()
        self.impose_(imposed)
        return imposed[self.frozen]

    @property
    def is_spread(self) -> bool:
        """Whether it holds this rank's part alone of a parameter that is spread over ranks."""
        return self._layout is not None

    @property
    def free_count(self) -> int:
        """How many entries of the parameter train."""
        return self.shape.numel() - self.frozen_count

    @property
    def nbytes(self) -> int:
        """The memory that regions and values take, in bytes: none for a slice at a number."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for p in self.pieces for t in p.tensors()}
        return sum(storage.nbytes() for storage in storages.values())

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules that freeze entries of this parameter, or tie it."""
        return tuple(member.rule for member in self._members)

    def state(self) -> dict[str, Any]:
        """Return plain tensors and builtins that say what is frozen, in the order of the rules."""
        members = self._members if self._layout is None else self._whole_pieces()
        pieces = [{"rule": str(member.rule), **member.state()} for member in members]
        return {"shape": list(self.shape), "pieces": pieces}

    def impose_(self, tensor: Tensor) -> None:
        """Write the values into the frozen entries of a plain tensor of the parameter's shape; make copies one."""
        if self.tie is not None:
            self.tie.impose_(tensor)
        for piece in self.pieces:
            piece.impose_(tensor)

    def impose(self, parameter: Tensor) -> None:
        """Write the values into the parameter.

        The write goes through `.data`: autograd's version counter stays as it is, so that a module may be called
        twice in one graph, or once more without gradients before backward.

        Raises:
            ParameterChangedError: The parameter now has another shape.
        """
        if parameter.shape != self.shape or parameter.is_meta:
            self.check_shape(parameter)
            return  # on the meta device it has no numbers, on its way through `to_empty`
        if self._layout is None and type(parameter) is nn.Parameter:
            tensor = parameter.data
        elif self.follow(parameter):
            tensor = local(parameter).data
        else:
            return
        self._dtype, self._device = tensor.dtype, tensor.device
        self.impose_(tensor)

    def follow(self, parameter: Tensor) -> bool:
        """Become of the part of the parameter that lies on this rank, where it was spread over ranks or is otherwise.

        Returns:
            Whether the parameter is the one to write to: not the whole that FSDP2 gathers for a while from the parts.
        """
        layout = layout_of(parameter)
        if is_stand_in(layout, self._layout):
            return False
        if layout is not None:
            self._sharded = parameter
            if layout != self._layout:
                self._cut(local(parameter).data, layout)
        return True

    def _cut(self, part: Tensor, layout: Layout) -> None:
        if self.tie is not None:
            raise not_spread(self.tie.rule)
        pieces = self._whole_pieces()
        self.pieces = [piece.resized(self.shape, part, lambda full: cut(full, layout)) for piece in pieces]
        self._members, self._layout, self._extent = list(self.pieces), layout, part.shape

    def _whole_pieces(self) -> list[Piece]:
        """Return the pieces of the whole parameter: gathered, where it is spread over ranks."""
        layout = self._layout
        if layout is None:
            return self.pieces
        full = torch.empty((), dtype=self._dtype, device=self._device).expand(self.shape)
        return [
            piece.resized(self._extent, full, lambda part: joined(part, layout, self.shape)) for piece in self.pieces
        ]

    def current(self, parameter: Tensor) -> Tensor:
        """Return the spread parameter in whose place FSDP2 has put the whole for a while; any other as it is."""
        if self._sharded is None or not is_stand_in(layout_of(parameter), self._layout):
            return parameter
        return self._sharded

    def check_shape(self, parameter: Tensor) -> None:
        """Refuse a parameter that was put in the place of the frozen one and does not have its shape.

        Raises:
            ParameterChangedError: It has another.
        """
        if parameter.shape != self.shape:
            raise ParameterChangedError(
                f"`{self.name}` had shape {tuple(self.shape)} when it was frozen and has {tuple(parameter.shape)} now",
                "remove the frozen entries before the parameter is replaced, and freeze anew after",
            )

    def zero_gradient(self, parameter: Tensor) -> None:
        """Make the parameter's gradient exactly +0.0 at the frozen entries, whatever stands there (inf and nan too)."""
        if self._layout is None and type(parameter) is nn.Parameter:
            gradient = parameter.grad
        else:
            gradient = local_gradient(parameter) if self.follow(parameter) else None
        if gradient is None or gradient.is_meta:
            return
        if gradient.layout != torch.strided:
            self._zero_sparse(gradient)
        elif gradient.requires_grad:  # part of a graph (create_graph=True): what the graph remembers must stay
            frozen = torch.empty_like(gradient, dtype=torch.bool, requires_grad=False).copy_(self.frozen)
            parameter.grad = torch.where(frozen, torch.zeros_like(gradient), gradient)  # laid out like the gradient
        else:
            if not _owns_its_entries(gradient):
                parameter.grad = gradient = (
                    gradient.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
                )
            self.zero_(gradient)
            self._cleaned = None if self.tie is not None else _seen(gradient)  # a tie has sums to make up for

    def has_clean_gradient(self, parameter: Tensor) -> bool:
        """Return whether it has a gradient that nobody touched since it was zeroed, as far as autograd counts.

        Writes through `.data` and those of a reducer are not counted.
        """
        gradient = parameter.grad
        if gradient is None or self._cleaned is None or torch.compiler.is_compiling():
            return False
        number, storage, version = self._cleaned
        return (
            id(gradient) == number
            and gradient.untyped_storage()._cdata == storage.cdata
            and gradient._version == version
        )

    def zero_(self, tensor: Tensor) -> None:
        """Write +0.0 into the frozen entries of a tensor of the parameter's shape."""
        for piece in self.pieces:
            piece.places.zero_(tensor)

    def fill_(self, tensor: Tensor, number: float) -> None:
        """Write one number into the frozen entries of a tensor of the parameter's shape; make copies one."""
        if self.tie is not None:
            self.tie.impose_(tensor)
        for piece in self.pieces:
            piece.places.fill_(tensor, number)

    def check_start(self, parameter: Tensor) -> None:
        """Refuse a parameter of another shape, or tied copies that differ where no rule says which to take.

        Raises:
            ParameterChangedError: The parameter has another shape.
            FrozenValueError: The copies differ.
            UnsupportedParameterError: A tied parameter has a sparse gradient.
        """
        self.check_shape(parameter)
        if self.tie is not None:
            self.tie.check_start(parameter)
            if parameter.grad is not None:
                self.tie.check_gradient(parameter.grad)

    def begin(self, parameter: Tensor) -> None:
        """Take the parameter up: make copies one, impose, and clean a gradient from before."""
        if self.tie is not None:
            self.tie.begin_(parameter.data)
        self.impose(parameter)
        self.clean_gradient(parameter)

    def clean_gradient(self, parameter: Tensor) -> None:
        """Do to the parameter's gradient what its hooks do, where they were not there to do it."""
        if self.tie is not None:
            self.tie.sum_missed(parameter)
        self.zero_gradient(parameter)

    def _zero_sparse(self, gradient: Tensor) -> None:
        rows = gradient._indices()  # and `_values`: the public ones want a coalesced copy
        frozen = self.frozen.to(gradient.device)[tuple(rows)]
        gradient._values().masked_fill_(frozen, 0)

    def recapture(self, parameter: Tensor) -> None:
        """Let `keep` follow numbers that were loaded into the parameter; other values are imposed on them."""
        self.check_shape(parameter)
        if not self.follow(parameter):
            return
        if self.tie is not None:
            with error_context(f"rule `{self.tie.rule}`", f"loaded into `{self.name}`"):
                self.tie.check_start(parameter)
            self.tie.begin_(parameter.data)
        tensor = local(parameter).data
        if not tensor.is_meta:
            self._dtype, self._device = tensor.dtype, tensor.device
        for piece in self.pieces:
            if not piece.keeps:
                piece.impose_(tensor)
        for piece in self.pieces:
            if piece.keeps:
                piece.recapture(tensor)

    def violation(self, parameter: Tensor) -> Violation | None:
        """Return what of the parameter has drifted, bit for bit, or None where every frozen entry holds.

        Of a parameter that is spread over ranks, each rank looks at its own part.

        Raises:
            ParameterChangedError: The parameter is on the meta device now.
        """
        if parameter.is_meta:
            raise ParameterChangedError(
                f"`{self.name}` is on the meta device and has no numbers",
                "give it numbers with `to_empty`, and load or impose them, before you check",
            )
        if not self.follow(parameter):
            return None
        found = local(parameter.detach())
        held = found.clone()
        self.impose_(held)
        drifted = _differ(held, found)
        if not bool(drifted.any()):
            return None
        gap = (held - found).abs().nan_to_num(nan=torch.inf).where(drifted, -1)
        place = tuple(int(i) for i in torch.unravel_index(gap.argmax(), gap.shape))
        index = place if self._layout is None else _index_in_whole(place, self.shape, self._layout)
        return Violation(self.name, int(drifted.sum()), index, found[place].item(), held[place].item())


def _index_in_whole(place: tuple[int, ...], shape: torch.Size, layout: Layout) -> tuple[int, ...]:
    """Return where in the whole tensor an entry of this rank's part lies."""
    numbers = cut(torch.arange(shape.numel()).view(shape), layout)
    return tuple(int(i) for i in torch.unravel_index(numbers[place], shape))


def not_spread(rule: Rule) -> UnsupportedParameterError:
    """Return the error for tied copies in a parameter that is spread over ranks."""
    return UnsupportedParameterError(
        f"rule `{rule}`: the copies lie on several ranks, where their gradients are not summed",
        "tie parameters that FSDP2 and tensor parallelism leave whole, or use DistributedDataParallel",
    )


def _owns_its_entries(tensor: Tensor) -> bool:
    """Return whether each entry has memory of its own, which holds just that entry and may be written to.

    Not so in a lazy conjugate, an expanded tensor, and one made under torch.inference_mode.
    """
    return not (tensor.is_conj() or tensor.is_neg() or tensor.is_inference() or 0 in tensor.stride())


def _seen(gradient: Tensor) -> tuple[int, StorageWeakRef, int] | None:
    """Return by what to know a gradient that nobody has touched since, or None where that cannot be told.

    The storage tells it from a later tensor that Python puts in the same place.
    """
    if gradient.is_inference() or torch.compiler.is_compiling():  # the second with compiled autograd
        return None
    return id(gradient), StorageWeakRef(gradient.untyped_storage()), gradient._version


def _differ(first: Tensor, second: Tensor) -> Tensor:
    """Return where two tensors of one shape and dtype differ in their bits: nan equals nan, -0.0 is not 0.0."""
    differ = bits(first) != bits(second)
    return differ.any(dim=-1) if first.is_complex() else differ
