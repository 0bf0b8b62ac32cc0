"""The constraint that holds entries at fixed values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._entries.bits import differ
from .._entries.entry_set import EntrySet, is_plus_zero
from .._entries.plain import as_tensor
from .._entries.select import select
from .._entries.writes import Writes
from .._errors import RuleConflictError, StateMismatchError, shortened
from .._rules.region import Index
from .._rules.rule import Keep, Rule
from .constraint import SAME_TENSORS, Constraint
from .rounding import numbers_of_16_bits, rounded
from .value import value_of


class FixedEntries(Constraint):
    """Entries that one rule holds at a number, at the values of a tensor, or at what they contained when frozen.

    It stores the value as it was given, and rounds it once, to the dtype that the parameter has at the time.
    """

    def __init__(self, rule: Rule, entries: EntrySet, source: float | Tensor) -> None:
        self.rule = rule
        self.entries = entries
        self._source = source
        self._cast: Tensor | None = None
        self._narrow = {} if isinstance(source, Tensor) else numbers_of_16_bits(source)

    @staticmethod
    def resolve(rule: Rule, parameter: Tensor) -> FixedEntries:
        """Return the entries and values of a rule for a parameter, without changing the parameter.

        Raises:
            RegionError: The region does not fit the parameter, or selects none of its entries.
            FrozenValueError: The value does not fit the region or the dtype.
            SpecError: The region or the value has an unsupported type.
        """
        frozen = select(rule.region, parameter)
        entries = EntrySet.like(parameter, frozen)
        return FixedEntries(rule, entries, value_of(rule, entries, frozen, parameter.detach()))

    @staticmethod
    def from_state(rule: Rule, state: dict[str, Any], parameter: Tensor) -> FixedEntries:
        """Restore what `state` returned, for a parameter and the rule that it was saved under.

        The chosen entries and the values of `keep` come from the state. Masks, indices and given values come from the
        rule, and the state must agree with them.

        Raises:
            StateMismatchError: It does not.
        """
        entries = EntrySet.from_state(state["entries"], parameter)
        frozen = entries.mask(parameter.device)
        given = isinstance(as_tensor(rule.region), Tensor | Index)
        if given and not bool((frozen == select(rule.region, parameter)).all()):
            raise StateMismatchError("it was saved with another mask", SAME_TENSORS)
        if rule.value is Keep.KEEP:
            source = state["value"].detach().clone()
            entries.check_values(source)
            return FixedEntries(rule, entries, source)
        own = value_of(rule, entries, frozen, parameter.detach())
        if isinstance(own, Tensor) and not own.cpu().equal(state["value"].cpu()):
            raise StateMismatchError("it was saved with other values", SAME_TENSORS)
        return FixedEntries(rule, entries, own)

    def for_shard(self, shard: Tensor, cut: Callable[[Tensor], Tensor]) -> FixedEntries:
        entries = EntrySet.like(shard, cut(self.entries.mask(shard.device)))
        if not isinstance(self._source, Tensor):
            return FixedEntries(self.rule, entries, self._source)
        values = torch.zeros(self.entries.shape, dtype=self._source.dtype, device=shard.device)
        self.entries.write_(values, self._source.to(shard.device))
        laid_out = torch.empty_like(shard, dtype=values.dtype).copy_(cut(values))
        return FixedEntries(self.rule, entries, entries.read(laid_out))

    def cut_to(self, still: Tensor, full: Tensor, region: Any) -> FixedEntries:
        """Return the constraint restricted to some of its entries.

        Args:
            still: The bool tensor of those entries.
            full: The whole parameter.
            region: The region that the new rule has for them.
        """
        cut = self.for_shard(full, lambda each: each.masked_fill(~still, 0))
        value = self.rule.value
        if isinstance(cut._source, Tensor) and not isinstance(value, complex | Keep):
            value = torch.zeros(full.shape, dtype=cut._source.dtype, device=full.device)  # it had the region's shape
            cut.entries.write_(value, cut._source)
        cut.rule = Rule(self.rule.target, region, value)
        return cut

    def tensors(self) -> tuple[Tensor, ...]:
        values = [value for value in (self._source, self._cast) if isinstance(value, Tensor)]
        return *self.entries.tensors(), *values

    @property
    def keeps(self) -> bool:  # type: ignore[override]  # a constant in other constraints
        """Whether the value is `keep`: what the entries held when they were frozen or last loaded."""
        return self.rule.value is Keep.KEEP

    def capture_kept(self, tensor: Tensor) -> None:
        if self.keeps:
            self._source, self._cast = self.entries.read(tensor), None

    def impose_(self, tensor: Tensor) -> None:
        if isinstance(self._source, float):
            self.entries.fill_(tensor, self._number_like(self._source, tensor))
        else:
            self.entries.write_(tensor, self._values_like(self._source, tensor))

    def add_impose(self, writes: Writes, tensor: Tensor) -> None:
        if not isinstance(self._source, float):
            self.entries.add_write(writes, tensor, self._values_like(self._source, tensor))
            return
        number = self._number_like(self._source, tensor)
        if is_plus_zero(number):
            self.entries.add_zero(writes, tensor)
        else:
            self.entries.add_fill(writes, tensor, number)

    def _number_like(self, number: float, tensor: Tensor) -> float:
        """Return the number in the precision of the tensor's dtype if torch would round it twice."""
        return self._narrow.get(tensor.dtype, number)

    def _values_like(self, source: Tensor, tensor: Tensor) -> Tensor:
        """Return the values in the tensor's dtype and on its device, rounded once from those given."""
        if self._cast is None or self._cast.dtype != tensor.dtype or self._cast.device != tensor.device:
            self._cast = rounded(source, tensor.dtype).to(tensor.device)
        return self._cast

    def check_beside(self, other: Constraint, like: Tensor, name: str) -> None:
        """Reject another constraint that holds one of the same entries at another value.

        `FrozenParameter` also rejects `keep` beside a given value, if the two come from different handles.

        Raises:
            RuleConflictError: It does; the message names both rules.
        """
        super().check_beside(other, like, name)
        shared = self.entries.mask(like.device) & other.entries.mask(like.device)
        if bool(shared.any()):
            refuse_disagreement(self, other, differ(self.held_in(like), other.held_in(like)) & shared, name)

    def state(self) -> dict[str, Any]:
        source = self._source if isinstance(self._source, float) else self._source.clone()
        return {"entries": self.entries.state(), "value": source}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_cast": None}


def refuse_disagreement(first: Constraint, second: Constraint, disagreed: Tensor, name: str) -> None:
    """Raise for two constraints on a parameter if a bool tensor is True anywhere, where they disagree.

    Raises:
        RuleConflictError: They disagree about an entry; the message names both rules.
    """
    if bool(disagreed.any()):
        raise RuleConflictError(
            f"rules `{shortened(first.rule)}` and `{shortened(second.rule)}` disagree about entry "
            f"{disagreed.nonzero()[0].tolist()} of `{name}`",
            "make their regions disjoint, or their values equal",
        )
