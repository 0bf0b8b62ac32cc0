"""The frozen entries of one parameter: hold the values, impose, zero a gradient, find violations."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._errors import (
    FrozenValueError,
    ParameterChangedError,
    RuleConflictError,
    SpecError,
    StateMismatchError,
    UnsupportedParameterError,
)
from ._expressions import Index, Pattern
from ._places import Places, bits
from ._regions import kernel_center, positions, select
from ._rules import Keep, Rule
from ._shards import Layout, cut, is_stand_in, joined, layout_of, local, local_gradient
from ._tie import Tie


class Piece:
    """What one rule freezes of one parameter.

    Attributes:
        rule: The rule, as it was given.
        places: Where its entries lie.
    """

    __slots__ = ("_cast", "_is_zero", "_source", "places", "rule")

    def __init__(self, rule: Rule, places: Places, source: float | Tensor) -> None:
        self.rule = rule
        self.places = places
        self._source = source
        self._is_zero = isinstance(source, float) and source == 0 and math.copysign(1, source) > 0
        self._cast: Tensor | None = None

    @staticmethod
    def resolve(rule: Rule, parameter: Tensor) -> Piece:
        """Work out where and at what `rule` holds `parameter`, without changing it.

        Raises:
            RegionError: The region does not fit the parameter, or selects nothing of it.
            FrozenValueError: The value does not fit the region or the dtype.
            SpecError: The region or the value is of a kind that cannot be understood.
        """
        frozen = select(rule.region, parameter)
        places = Places.like(parameter, frozen)
        return Piece(rule, places, _source(rule, places, frozen, parameter.detach()))

    @staticmethod
    def from_state(rule: Rule, state: dict[str, Any], parameter: Tensor) -> Piece:
        """Return the piece that `state` wrote down, for a parameter and the rule that it was saved under.

        Where the entries lie, and what kept ones hold, is the state's to say; masks, indices and values are the
        rule's, and the state must agree.

        Raises:
            StateMismatchError: It does not.
        """
        places = Places.from_state(state["places"], parameter)
        frozen = places.frozen(parameter.shape, parameter.device)
        given = isinstance(rule.region, Tensor | Index)
        if given and not bool((frozen == select(rule.region, parameter)).all()):
            raise StateMismatchError("it was saved with another mask", _SAME_TENSORS)
        if rule.value is Keep.KEEP:
            source = state["value"].detach().clone()
            places.write_(torch.empty_like(parameter.detach()), source.to(parameter.device, parameter.dtype))  # it fits
            return Piece(rule, places, source)
        own = _source(rule, places, frozen, parameter.detach())
        if isinstance(own, Tensor) and not own.cpu().equal(state["value"].cpu()):
            raise StateMismatchError("it was saved with other values", _SAME_TENSORS)
        return Piece(rule, places, own)

    def resized(self, before: torch.Size, after: Tensor, change: Callable[[Tensor], Tensor]) -> Piece:
        """Return the piece on another part of the parameter.

        Args:
            before: The shape of the part that this piece is of.
            after: The part that the new one is of.
            change: From a tensor of the first shape to one of the second.
        """
        frozen = self.places.frozen(before, after.device)
        places = Places.like(after, change(frozen))
        if not isinstance(self._source, Tensor):
            return Piece(self.rule, places, self._source)
        values = torch.zeros(before, dtype=self._source.dtype, device=after.device)
        self.places.write_(values, self._source.to(after.device))
        return Piece(self.rule, places, places.read(torch.empty_like(after, dtype=values.dtype).copy_(change(values))))

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors that it holds in memory."""
        values = [value for value in (self._source, self._cast) if isinstance(value, Tensor)]
        return *self.places.tensors(), *values

    @property
    def keeps(self) -> bool:
        """Whether the value is whatever the entries held when they were frozen, or loaded since."""
        return self.rule.value is Keep.KEEP

    def recapture(self, parameter: Tensor) -> None:
        """Make what the entries of a plain tensor hold now the value to keep."""
        self._source, self._cast = self.places.read(parameter), None

    def impose_(self, tensor: Tensor) -> None:
        """Write the value into the frozen entries of a tensor of the parameter's shape."""
        if self._is_zero:
            self.places.zero_(tensor)
        elif isinstance(self._source, float):
            self.places.fill_(tensor, self._source)
        else:
            self.places.write_(tensor, self._values_like(tensor))

    def _values_like(self, tensor: Tensor) -> Tensor:
        """Return the values in the tensor's dtype, rounded once from those first given, and on its device."""
        if self._cast is None or self._cast.dtype != tensor.dtype or self._cast.device != tensor.device:
            self._cast = torch.as_tensor(self._source).to(tensor.device, tensor.dtype)
        return self._cast

    def state(self) -> dict[str, Any]:
        """Return plain tensors and builtins from which `from_state` makes the same piece."""
        source = self._source if isinstance(self._source, float) else self._source.clone()
        return {"places": self.places.state(), "value": source}

    def __getstate__(self) -> Any:
        return None, {"_cast": None, **{name: getattr(self, name) for name in self.__slots__ if name != "_cast"}}


_SAME_TENSORS = "use the tensors of the saved run, or start from its weights alone"


def _source(rule: Rule, places: Places, frozen: Tensor, parameter: Tensor) -> float | Tensor:
    """Return the value of a rule: a number, or a tensor in the places' own shape."""
    value = rule.value
    if value is Keep.KEEP:
        return places.read(parameter)
    if isinstance(value, float):
        _check_finite(torch.tensor(value, dtype=torch.float64), parameter)
        return value
    if isinstance(value, complex):
        value = torch.tensor(value, dtype=torch.complex128)
    if not isinstance(value, Tensor):
        raise SpecError(
            f"a value is a number, `keep` or a tensor, found {type(value).__name__}",
            "give a number, or convert it with torch.as_tensor",
        )
    if value.is_meta or value.layout != torch.strided:
        raise FrozenValueError(
            f"a value must be a dense tensor with numbers, found {value.layout} on {value.device}",
            "convert it with `to_dense()`, or make it on a real device",
        )
    if value.is_complex() and not parameter.is_complex():
        raise FrozenValueError(f"a complex value for a parameter of {parameter.dtype}", "give its real part")
    spread = _spread(value.detach().to(parameter.device), rule.region, frozen, parameter)
    source = places.read(torch.empty_like(parameter, dtype=spread.dtype).copy_(spread))  # laid out like the parameter
    _check_finite(source, parameter)
    return source


def _check_finite(value: Tensor, parameter: Tensor) -> None:
    finite = value.to(parameter.dtype).isfinite()
    if not bool(finite.all()):
        raise FrozenValueError(
            f"the value {value[~finite][0].item():g} is not finite as {parameter.dtype}",
            "give a value that the parameter's dtype can hold",
        )


def _spread(value: Tensor, region: Any, frozen: Tensor, parameter: Tensor) -> Tensor:
    """Return a tensor of the parameter's shape that holds the value's numbers inside the region, where it is frozen."""
    spread = torch.zeros(parameter.shape, dtype=value.dtype, device=parameter.device)
    region = kernel_center(parameter.shape) if region == Pattern("center") else region
    if isinstance(region, Index):
        where = positions(region, parameter.shape).to(parameter.device)
    else:
        where = frozen.flatten().nonzero().flatten()
    if _fits(value.shape, where.shape):
        spread.view(-1)[where] = value.expand(where.shape)
        _check_one_value_each(spread.view(-1)[where], value)
    elif value.shape == parameter.shape:
        spread.copy_(value)
    else:
        raise FrozenValueError(
            f"a value of shape {tuple(value.shape)} does not fit the region of shape {tuple(where.shape)}",
            f"give a number, a tensor that broadcasts to the region's shape, or one of shape {tuple(parameter.shape)}",
        )
    return spread


def _check_one_value_each(written: Tensor, value: Tensor) -> None:
    """Refuse an index that names an entry twice, with another value each time."""
    if bool(((written != value) & (value == value)).any()):
        raise FrozenValueError("the region names an entry twice, with two values", "name every entry once")


def _fits(shape: torch.Size, target: torch.Size) -> bool:
    """Return whether a tensor of the first shape broadcasts to the second."""
    pairs = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(size in (1, wanted) for size, wanted in pairs)


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

    def __str__(self) -> str:
        place = ", ".join(map(str, self.index))
        return (
            f"`{self.name}[{place}]` holds {self.found!r} instead of {self.expected!r} ({self.count} entries drifted)"
        )


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

    __slots__ = (
        "_cleaned",
        "_device",
        "_dtype",
        "_extent",
        "_layout",
        "_members",
        "_sharded",
        "frozen_count",
        "name",
        "names",
        "pieces",
        "shape",
        "tie",
    )

    def __init__(self, names: list[str], parameter: Tensor, members: Sequence[Piece | Tie]) -> None:
        self.name = names[0]
        self.names = tuple(names)
        self.shape = parameter.shape
        self._dtype, self._device = parameter.dtype, parameter.device
        self._cleaned: tuple[weakref.ref[Tensor], int] | None = None
        self._layout: Layout | None = None
        self._sharded: weakref.ref[Tensor] | None = None
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

    def __getstate__(self) -> Any:
        kept = {name: getattr(self, name) for name in self.__slots__ if name not in ("_cleaned", "_sharded")}
        return None, {"_cleaned": None, "_sharded": None, **kept}

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
        if self.tie is not None:
            self.tie.impose_(tensor)
        for piece in self.pieces:
            piece.impose_(tensor)

    def follow(self, parameter: Tensor) -> bool:
        """Become of the part of the parameter that lies on this rank, where it was spread over ranks or is otherwise.

        Returns:
            Whether the parameter is the one to write to: not the whole that FSDP2 gathers for a while from the parts.
        """
        layout = layout_of(parameter)
        if is_stand_in(layout, self._layout):
            return False
        if layout is not None:
            self._sharded = weakref.ref(parameter)
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
        sharded = self._sharded()
        return parameter if sharded is None else sharded

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
            for piece in self.pieces:
                piece.places.zero_(gradient)
            self._cleaned = weakref.ref(gradient), gradient._version

    def has_clean_gradient(self, parameter: Tensor) -> bool:
        """Return whether nobody has touched the parameter's gradient since it was zeroed, as far as autograd counts.

        Writes through `.data` and those of a reducer are not counted.
        """
        if self._cleaned is None:
            return parameter.grad is None
        gradient, version = self._cleaned
        return gradient() is parameter.grad and (parameter.grad is None or parameter.grad._version == version)

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
            try:
                self.tie.check_start(parameter)
            except FrozenValueError as error:
                raise error.within(f"rule `{self.tie.rule}`", f"loaded into `{self.name}`") from None
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
        """
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
    """Return whether each entry has memory of its own, which holds just that entry: no lazy conjugate, no expansion."""
    return not (tensor.is_conj() or tensor.is_neg() or 0 in tensor.stride())


def _differ(first: Tensor, second: Tensor) -> Tensor:
    """Return where two tensors of one shape and dtype differ in their bits: nan equals nan, -0.0 is not 0.0."""
    differ = bits(first) != bits(second)
    return differ.any(dim=-1) if first.is_complex() else differ
