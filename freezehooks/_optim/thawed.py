"""Corrects the second moments of thawed entries, under optimizers with bias correction such as Adam.

Such an optimizer divides the second moment by ``1 - beta2 ** step``, with one `step` for the whole parameter. By the
time entries are thawed, that is close to 1, while their moments are still 0: uncorrected, their first steps would be up
to 6 learning rates long. So for a number of steps the second moment is set, before each step, to what it would be if
all earlier gradients had been like those since the thaw: the mean of their squares, times the divisor of that step.
"""

from __future__ import annotations

from functools import cache, reduce
from typing import Any, Final

import torch
from torch import Tensor, optim
from torch.optim import Optimizer

from .._entries.entry_set import EntrySet
from .._entries.flat_order import FlatOrder
from .._held.parameter import FrozenParameter
from .._ranks.sharding import local, summed_gradient
from .elementwise import steps_like
from .state import is_plain

_CORRECTED: Final = (optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam)
"""The optimizers with a corrected second moment; Adamax uses the largest gradient so far instead."""

_STEPS: Final = 100
"""For how many steps moments are corrected: after these, the mean is over enough gradients."""

_LEAST: Final = 0.25
"""The moment is at least this fraction of the present square, so that no step is longer than two learning rates."""


def corrects_bias(optimizer: Optimizer) -> bool:
    """Return whether an optimizer corrects its second moments for their start at 0."""
    kind: Any = type(optimizer)
    return _corrects_bias(kind)


@cache
def _corrects_bias(kind: Any) -> bool:
    return any(steps_like(kind, known) for known in _CORRECTED)


class ThawedEntries:
    """Entries of one parameter that were thawed together.

    Attributes:
        parameter: The parameter.
        is_over: Whether their second moments need no correction any more.
    """

    def __init__(self, parameter: Tensor, before: list[FrozenParameter], now: list[FrozenParameter]) -> None:
        self.parameter = parameter
        self._entries = EntrySet.like(local(parameter), _frozen(before, parameter) & ~_frozen(now, parameter))
        self._steps = 0

    @property
    def is_over(self) -> bool:
        return self._steps >= _STEPS or not self._entries.count

    def keep_free(self, held: list[FrozenParameter]) -> None:
        """Drop the entries that are frozen again."""
        if held:
            still = self._entries.mask(self.parameter.device) & ~_frozen(held, self.parameter)
            self._entries = EntrySet.like(local(self.parameter), still)

    def begin_step(self, optimizer: Optimizer, group: dict[str, Any], order: FlatOrder | None) -> None:
        """Correct the second moments by the gradient of the coming step.

        Args:
            optimizer: The optimizer.
            group: The parameter's group.
            order: The order of the free entries in the parameter's state in compact mode, or None if it is whole.
        """
        state = optimizer.state.get(self.parameter) or {}
        moment, gradient = state.get("exp_avg_sq"), summed_gradient(self.parameter)
        if moment is None:
            self._steps = _STEPS  # it begins with the coming step, as that of a new optimizer
        elif gradient is not None and _can_take(moment, self.parameter, order) and not _is_captured(gradient):
            self._steps += 1
            seen = self._square(optimizer, group, gradient, local(moment).dtype)
            seen.mul_(1 - float(group["betas"][1]) ** float(state["step"]))
            self._correct(local(moment), seen, order)

    def _square(self, optimizer: Optimizer, group: dict[str, Any], gradient: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the squares of the gradient at the thawed entries, as the optimizer will compute them."""
        wide = torch.promote_types(dtype, torch.float32)
        seen = self._entries.gather(gradient).to(wide)
        scale = getattr(optimizer, "grad_scale", None)  # set by GradScaler for fused kernels
        if scale is not None:
            seen = seen / scale.to(seen.device)
        if _decay(optimizer, group):
            weight = self._entries.gather(local(self.parameter.detach())).to(wide)
            seen = (-seen if group.get("maximize") else seen) + weight * _decay(optimizer, group)
        square = _real(seen).square()
        return square.where(square.isfinite(), 0)

    def _correct(self, moment: Tensor, seen: Tensor, order: FlatOrder | None) -> None:
        entries = self._entries if order is None else EntrySet.of(order.gather(self._entries.mask(moment.device)))
        now = _real(entries.gather(moment)).to(seen.dtype)
        mean = torch.maximum(now + (seen - now) / self._steps, seen * _LEAST)
        entries.scatter_(moment, (torch.view_as_complex(mean) if moment.is_complex() else mean).to(moment.dtype))


def _can_take(moment: Tensor, parameter: Tensor, order: FlatOrder | None) -> bool:
    return is_plain(moment, parameter, is_flat=order is not None)


def _frozen(held: list[FrozenParameter], parameter: Tensor) -> Tensor:
    """Return the bool tensor that is True at the entries that any of the handles freezes."""
    none = torch.zeros_like(local(parameter), dtype=torch.bool, requires_grad=False)
    return reduce(torch.logical_or, [each.frozen.to(none.device) for each in held], none)


def _decay(optimizer: Optimizer, group: dict[str, Any]) -> float:
    """Return the weight decay that is added to the gradient; 0 if it is decoupled, as in AdamW."""
    is_decoupled = group.get("decoupled_weight_decay", steps_like(type(optimizer), optim.AdamW))
    return 0.0 if is_decoupled else float(group.get("weight_decay", 0.0))


def _is_captured(tensor: Tensor) -> bool:
    """Return whether a CUDA graph is being captured, during which no number can be read."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
