"""Compact mode: the optimizer steps flat tensors of the free entries only, and its state has their size.

The optimizer's groups always contain the model's own parameters, which are also the keys of its state; the state itself
consists of flat tensors. At each step the optimizer's own `step` runs on a proxy, whose groups contain the flat tensors
instead of the parameters. Whatever happens in a step, even an error, the optimizer's own groups stay as they are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._entries.flat_order import FlatOrder
from .._errors import UnsupportedOptimizerError, UnsupportedParameterError
from .._held.parameter import FrozenParameter
from .._ranks.sharding import is_sharded, local
from .bucket import Bucket, in_buckets
from .elementwise import ELEMENTWISE, is_elementwise, steps_like
from .flat_parameter import FlatParameter
from .flat_step import FlatStep
from .state_dict import (
    FlatState,
    compact_state_dict,
    convert_state,
    whole_state_dict,
)

_REFUSED: Final = {
    "Muon": "it orthogonalizes the update of a whole matrix",
    "Adafactor": "it keeps one number for each row and column, and scales by the size of the whole update",
    "SparseAdam": "it takes sparse gradients, and moves only what they name",
}


def check_elementwise(optimizer: Optimizer) -> None:
    """Reject an optimizer that would train the free entries differently in a flat tensor.

    Raises:
        UnsupportedOptimizerError: It would, or it is not known whether it would.
    """
    kind = type(optimizer)
    if not is_elementwise(optimizer) and not steps_like(kind, torch.optim.LBFGS):
        why = _REFUSED.get(kind.__name__, "it is not known to work entry by entry")
        raise UnsupportedOptimizerError(
            f"`{kind.__name__}` cannot be compacted to the free entries: {why}",
            "leave out compact=True, or use one of "
            f"{', '.join(kind.__name__ for kind in ELEMENTWISE)}, LBFGS (the same method in any subspace)",
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise UnsupportedOptimizerError(
            f"`{kind.__name__}(differentiable=True)` cannot be compacted to the free entries: its step is in a graph",
            "leave out compact=True",
        )


def check_spread(optimizer: Optimizer, held: Iterable[tuple[FrozenParameter, Tensor]]) -> None:
    """Reject sharded parameters if the optimizer needs numbers of all entries together, as LBFGS does.

    Raises:
        UnsupportedParameterError: A parameter is sharded.
    """
    for frozen, parameter in held:
        if is_sharded(parameter) and not is_elementwise(optimizer):
            raise UnsupportedParameterError(
                f"`{frozen.name}` is sharded ({type(parameter).__name__}), and with compact=True "
                f"`{type(optimizer).__name__}` would see the entries of one rank alone",
                "leave out compact=True, or train with DistributedDataParallel",
            )


class Compact:
    """The compact mode of one optimizer, shared by all handles that guard it."""

    def __init__(self) -> None:
        self._parameters: dict[Tensor, FlatParameter] = {}
        self._copied: list[FlatParameter | Bucket] = []
        self._step: FlatStep | None = None
        self._saves_compact = False
        self._addresses: list[int] = []

    def remove(self, optimizer: Optimizer) -> None:
        """Return the optimizer to whole parameters."""
        self.interrupt()
        self.convert(optimizer, [])

    def steps(self, parameter: Tensor) -> bool:
        """Return whether the optimizer steps only the free entries of a parameter, and never touches the others."""
        return parameter in self._parameters

    def order_of(self, parameter: Tensor) -> FlatOrder | None:
        """Return the order of the free entries in a parameter's state, or None if the state is whole."""
        flat = self._parameters.get(parameter)
        return None if flat is None else flat.free

    def is_current(self, optimizer: Optimizer) -> bool:
        """Return whether the optimizer's state is the converted one, and no parameter has moved to other memory since.

        One that is not frozen may have moved to where a frozen one is.
        """
        if not self._parameters:
            return True
        return isinstance(optimizer.state, FlatState) and self._addresses == _addresses(optimizer)

    @property
    def is_stepping(self) -> bool:
        """Whether a step has begun: the flat tensors may not be replaced before it ends."""
        return self._step is not None and self._step.has_begun

    @property
    def nbytes(self) -> int:
        """The memory that compact mode takes between steps, in bytes; contiguous free entries take none."""
        return sum(each.nbytes for each in self._copied)

    # State

    def convert(self, optimizer: Optimizer, held: Iterable[tuple[FrozenParameter, Tensor]]) -> None:
        """Convert the optimizer's state to the entries that are free now.

        Entries that stay free keep their state; those that become free start with fresh state, as if they had never
        moved.

        Raises:
            StateMismatchError: The state does not have the expected shapes; nothing is changed then.
        """
        if not isinstance(optimizer.state, FlatState):
            self._replace({})  # the state was replaced, by a load or by hand, so it is whole
        wanted, self._addresses = self._wanted(optimizer, held), _addresses(optimizer)
        if any(wanted.get(each) is not self._parameters.get(each) for each in {**wanted, **self._parameters}):
            before, after = _orders(self._parameters), _orders(wanted)
            optimizer.state.update(convert_state(optimizer, optimizer.state, before, after))
            self._replace(wanted)
            optimizer.state = FlatState(optimizer, after) if wanted else defaultdict(dict, optimizer.state)

    def _replace(self, parameters: dict[Tensor, FlatParameter]) -> None:
        self._parameters, self._copied = parameters, in_buckets(parameters.values())
        if self._step is not None:
            self._step.parameters, self._step.copied = self._parameters, self._copied

    def _wanted(
        self, optimizer: Optimizer, held: Iterable[tuple[FrozenParameter, Tensor]]
    ) -> dict[Tensor, FlatParameter]:
        """Return the flat parameters to step, reusing the present ones that still fit."""
        found: dict[Tensor, list[FrozenParameter]] = {}
        for frozen, parameter in held:
            found.setdefault(parameter, []).append(frozen)
        wanted = {}
        overlapping = _overlapping(parameter for group in optimizer.param_groups for parameter in group["params"])
        for parameter, frozen_by in found.items():
            # tied entries need the whole parameter; parameters that share memory are imposed after every step
            if parameter not in overlapping and not any(frozen.ties for frozen in frozen_by):
                wanted[parameter] = self._flat(parameter, frozen_by)
        wanted.update(self._beside(optimizer, wanted))
        others = any(parameter not in wanted for group in optimizer.param_groups for parameter in group["params"])
        if others or any(flat.free.count for flat in wanted.values()) or is_elementwise(optimizer):
            return wanted
        return {}  # nothing is free: LBFGS takes the largest gradient, and there must be one

    def _beside(self, optimizer: Optimizer, wanted: Mapping[Tensor, FlatParameter]) -> dict[Tensor, FlatParameter]:
        """Return the other sharded parameters: no kernel takes DTensors and plain tensors in one call."""
        if not any(map(is_sharded, wanted)):
            return {}
        every = (parameter for group in optimizer.param_groups for parameter in group["params"])
        others = [parameter for parameter in every if is_sharded(parameter) and parameter not in wanted]
        return {parameter: self._flat(parameter, []) for parameter in others}

    def _flat(self, parameter: Tensor, held: list[FrozenParameter]) -> FlatParameter:
        """Return the flat form of a parameter: the existing one if it still fits."""
        flat = self._parameters.get(parameter)
        return flat if flat is not None and flat.fits(held) else FlatParameter(parameter, held)

    def state_dict(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the optimizer's state dict with flat tensors of the free entries, and which entries those are."""
        self._saves_compact = True
        try:
            return optimizer.state_dict()
        finally:
            self._saves_compact = False

    def saved(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the state dict to save: with whole tensors, or compact ones inside a call of `state_dict`."""
        orders = _orders(self._parameters)
        if not self._saves_compact:
            return whole_state_dict(optimizer, state_dict, orders)
        held = {parameter: flat.held for parameter, flat in self._parameters.items()}
        return compact_state_dict(optimizer, state_dict, orders, held)

    # Steps

    def begin_step(self, optimizer: Optimizer) -> Any:
        """Return the proxy that steps instead of the optimizer."""
        self.interrupt()
        if self._step is None:
            self._step = FlatStep(optimizer, self._parameters, self._copied)
        return self._step.prepare(optimizer)

    def before_closure(self) -> None:
        """Write the current weights into the parameters for a closure: LBFGS moves them between closures."""
        if self._step is not None:
            self._step.scatter()

    def after_closure(self) -> None:
        """Read what a closure has written: gradients, and weights too."""
        if self._step is not None:
            self._step.gather_again()

    def end_step(self) -> None:
        """Write weights and state back to the parameters and the optimizer."""
        if self._step is not None:
            self._step.finish()

    def interrupt(self) -> None:
        """Abandon a step that has begun: it failed, or the flat tensors are about to change."""
        if self._step is not None and self._step.has_begun:
            self._step = None

    def impose(self) -> None:
        """Write the values into all parameters of which only the free entries are stepped."""
        for flat in self._parameters.values():
            flat.impose()


def _overlapping(parameters: Iterable[Tensor]) -> set[Tensor]:
    """Return the parameters that share memory with another one of the same optimizer."""
    found: set[Tensor] = set()
    furthest: dict[torch.device, tuple[int, Tensor]] = {}
    plain = (each for each in dict.fromkeys(parameters) if not is_sharded(each) and each.data_ptr())
    for parameter in sorted(plain, key=Tensor.data_ptr):
        last = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
        end = parameter.data_ptr() + (last + 1) * parameter.element_size()
        before, other = furthest.get(parameter.device, (0, parameter))
        if parameter.data_ptr() < before:
            found |= {parameter, other}
        if end > before:
            furthest[parameter.device] = end, parameter
    return found


def _addresses(optimizer: Optimizer) -> list[int]:
    """Return where the memory of each parameter begins, or of this rank's shard of it."""
    return [local(parameter).data_ptr() for group in optimizer.param_groups for parameter in group["params"]]


def _orders(parameters: dict[Tensor, FlatParameter]) -> dict[Tensor, FlatOrder]:
    return {parameter: flat.free for parameter, flat in parameters.items()}
