"""Entries that were let go under an optimizer that corrects its second moments for their start at 0.

Such an optimizer divides by ``1 - beta2 ** step``, where one `step` counts for the whole parameter. By the time entries
are let go that is near 1, and their moments are still 0: for want of a correction their first steps would be up to 6
learning rates long. So for a while the second moment is set, before each step, to what it would be had all earlier
gradients been like those since: to the mean of their squares, scaled as the optimizer is about to unscale it.
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
from .._ranks.sharding import local, local_gradient
from .elementwise import steps_like
from .state import is_plain

_CORRECTED: Final = (optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam)
"""Those that divide by a second moment that they correct; Adamax divides by the largest gradient so far."""

_STEPS: Final = 100
"""In so many steps: after these the mean is of enough gradients to go on from."""

_LEAST: Final = 0.25
"""At least this fraction of the present square: no gradient counts for more than two of its own size."""


def corrects_bias(optimizer: Optimizer) -> bool:
    """Return whether an optimizer divides by second moments that it corrects for their start at 0."""
    kind: Any = type(optimizer)
    return _corrects_bias(kind)


@cache
def _corrects_bias(kind: Any) -> bool:
    return any(steps_like(kind, known) for known in _CORRECTED)


class ThawedEntries:
    """Entries of one parameter that were let go together.

    Attributes:
        parameter: The parameter.
        is_over: Whether its second moments stand on their own now.
    """

    def __init__(self, parameter: Tensor, before: list[FrozenParameter], now: list[FrozenParameter]) -> None:
        self.parameter = parameter
        self._entries = EntrySet.like(local(parameter), _frozen(before, parameter) & ~_frozen(now, parameter))
        self._steps = 0

    @property
    def is_over(self) -> bool:
        return self._steps >= _STEPS or not self._entries.count

    def keep_free(self, held: list[FrozenParameter]) -> None:
        """Forget those that are frozen again."""
        if held:
            still = self._entries.mask(self.parameter.device) & ~_frozen(held, self.parameter)
            self._entries = EntrySet.like(local(self.parameter), still)

    def begin_step(self, optimizer: Optimizer, group: dict[str, Any], order: FlatOrder | None) -> None:
        """Take the gradient of the step that comes into the second moments.

        Args:
            optimizer: The optimizer.
            group: Its group of the parameter.
            order: How the parameter's state lies, where it is of free entries alone.
        """
        state = optimizer.state.get(self.parameter) or {}
        moment, gradient = state.get("exp_avg_sq"), local_gradient(self.parameter)
        if moment is None:
            self._steps = _STEPS  # it begins with the coming step, as that of a new optimizer
        elif gradient is not None and _can_take(moment, self.parameter, order) and not _is_captured(gradient):
            self._steps += 1
            seen = self._square(optimizer, group, gradient, local(moment).dtype)
            seen.mul_(1 - float(group["betas"][1]) ** float(state["step"]))
            self._take(local(moment), seen, order)

    def _square(self, optimizer: Optimizer, group: dict[str, Any], gradient: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the squares of what the optimizer will take for the gradient, at the thawed entries."""
        wide = torch.promote_types(dtype, torch.float32)
        seen = self._entries.gather(gradient).to(wide)
        scale = getattr(optimizer, "grad_scale", None)  # of a GradScaler, for fused kernels
        if scale is not None:
            seen = seen / scale.to(seen.device)
        if _decay(optimizer, group):
            weight = self._entries.gather(local(self.parameter.detach())).to(wide)
            seen = (-seen if group.get("maximize") else seen) + weight * _decay(optimizer, group)
        square = _real(seen).square()
        return square.where(square.isfinite(), 0)

    def _take(self, moment: Tensor, seen: Tensor, order: FlatOrder | None) -> None:
        entries = self._entries if order is None else EntrySet.of(order.gather(self._entries.mask(moment.device)))
        now = _real(entries.gather(moment)).to(seen.dtype)
        mean = torch.maximum(now + (seen - now) / self._steps, seen * _LEAST)
        entries.scatter_(moment, (torch.view_as_complex(mean) if moment.is_complex() else mean).to(moment.dtype))


def _can_take(moment: Tensor, parameter: Tensor, order: FlatOrder | None) -> bool:
    return is_plain(moment, parameter, is_flat=order is not None)


def _frozen(held: list[FrozenParameter], parameter: Tensor) -> Tensor:
    """Return the bool tensor that is True where any of the handles freezes an entry."""
    none = torch.zeros_like(local(parameter), dtype=torch.bool, requires_grad=False)
    return reduce(torch.logical_or, [each.frozen.to(none.device) for each in held], none)


def _decay(optimizer: Optimizer, group: dict[str, Any]) -> float:
    """Return the weight decay that is added to the gradient; that of AdamW is not."""
    is_decoupled = group.get("decoupled_weight_decay", steps_like(type(optimizer), optim.AdamW))
    return 0.0 if is_decoupled else float(group.get("weight_decay", 0.0))


def _is_captured(tensor: Tensor) -> bool:
    """Return whether a CUDA graph is being captured: no number can be read then."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
