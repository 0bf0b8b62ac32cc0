"""An optimizer that holds the free entries alone: it steps flat tensors of them, and its state is of their size.

The optimizer's groups always hold the model's own parameters, and its state lies under them, as flat tensors. At each
step the optimizer's own `step` runs on a proxy, whose groups hold the flat tensors in the place of the parameters.
Whatever happens in a step, an error included, the optimizer itself never changes hands.
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
from .._ranks.sharding import is_sharded
from .elementwise import ELEMENTWISE, is_elementwise, steps_like
from .flat_step import FlatParameter, FlatStep
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
    """Refuse an optimizer whose free entries would train otherwise in a flat tensor of their own.

    Raises:
        UnsupportedOptimizerError: It is one, or it is not known that it is none.
    """
    kind = type(optimizer)
    if not is_elementwise(optimizer) and not steps_like(kind, torch.optim.LBFGS):
        why = _REFUSED.get(kind.__name__, "it is not known to work entry by entry")
        raise UnsupportedOptimizerError(
            f"`{kind.__name__}` cannot hold the free entries alone: {why}",
            "leave out compact=True, or take one of "
            f"{', '.join(kind.__name__ for kind in ELEMENTWISE)}, LBFGS (the same method in any subspace)",
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise UnsupportedOptimizerError(
            f"`{kind.__name__}(differentiable=True)` cannot hold the free entries alone: its step is part of a graph",
            "leave out compact=True",
        )


def check_spread(optimizer: Optimizer, held: Iterable[tuple[FrozenParameter, Tensor]]) -> None:
    """Refuse parameters that are spread over ranks, for an optimizer that asks for numbers of all entries together.

    Raises:
        UnsupportedParameterError: One is.
    """
    for frozen, parameter in held:
        if is_sharded(parameter) and not is_elementwise(optimizer):
            raise UnsupportedParameterError(
                f"`{frozen.name}` is spread over ranks ({type(parameter).__name__}), and compact=True would have "
                f"`{type(optimizer).__name__}` see the entries of one rank alone",
                "leave out compact=True, or train with DistributedDataParallel",
            )


class Compact:
    """What makes an optimizer hold the free entries alone, whichever handles ask for it."""

    def __init__(self) -> None:
        self._parameters: dict[Tensor, FlatParameter] = {}
        self._step: FlatStep | None = None
        self._saves_compact = False

    def remove(self, optimizer: Optimizer) -> None:
        """Let the optimizer hold whole parameters again."""
        self.interrupt()
        self.convert(optimizer, [])

    def steps(self, parameter: Tensor) -> bool:
        """Return whether the optimizer steps a parameter by its free entries, so never reads or writes the others."""
        return parameter in self._parameters

    def order_of(self, parameter: Tensor) -> FlatOrder | None:
        """Return how a parameter's state lies where it is of free entries alone, or None where it is whole."""
        flat = self._parameters.get(parameter)
        return None if flat is None else flat.free

    def is_current(self, optimizer: Optimizer) -> bool:
        """Return whether the optimizer's state is the one that was converted."""
        return isinstance(optimizer.state, FlatState) or not self._parameters

    @property
    def is_stepping(self) -> bool:
        """Whether a step has begun: what it steps may not change before its end."""
        return self._step is not None and self._step.has_begun

    @property
    def nbytes(self) -> int:
        """The memory that it takes between steps, in bytes: none where free entries lie in one piece."""
        return sum(flat.nbytes for flat in self._parameters.values())

    # State

    def convert(self, optimizer: Optimizer, held: Iterable[tuple[FrozenParameter, Tensor]]) -> None:
        """Bring the optimizer's state into line with what the handles hold now of the parameters that it steps.

        Entries that stay free keep their state; those that were frozen start anew, as if they had never moved.

        Raises:
            StateMismatchError: The state is not of the shapes that it should be of; nothing is changed then.
        """
        if not isinstance(optimizer.state, FlatState):
            self._parameters = {}  # it was replaced, by a load or by hand: it is whole
            if self._step is not None:
                self._step.parameters = self._parameters
        wanted = self._wanted(optimizer, held)
        if any(wanted.get(each) is not self._parameters.get(each) for each in {**wanted, **self._parameters}):
            before, after = _orders(self._parameters), _orders(wanted)
            optimizer.state.update(convert_state(optimizer, optimizer.state, before, after))
            self._parameters = wanted
            if self._step is not None:
                self._step.parameters = wanted
            optimizer.state = FlatState(optimizer, after) if wanted else defaultdict(dict, optimizer.state)

    def _wanted(
        self, optimizer: Optimizer, held: Iterable[tuple[FrozenParameter, Tensor]]
    ) -> dict[Tensor, FlatParameter]:
        """Return the parameters to step by their free entries: the present ones, where they still fit."""
        found: dict[Tensor, list[FrozenParameter]] = {}
        for frozen, parameter in held:
            found.setdefault(parameter, []).append(frozen)
        wanted = {}
        overlapping = _overlapping(parameter for group in optimizer.param_groups for parameter in group["params"])
        for parameter, frozen_by in found.items():
            # tied copies are summed and made one as whole parameters; what others step is imposed after every step
            if parameter not in overlapping and not any(frozen.ties for frozen in frozen_by):
                wanted[parameter] = self._flat(parameter, frozen_by)
        wanted.update(self._beside(optimizer, wanted))
        others = any(parameter not in wanted for group in optimizer.param_groups for parameter in group["params"])
        if others or any(flat.free.count for flat in wanted.values()) or is_elementwise(optimizer):
            return wanted
        return {}  # nothing is free: LBFGS asks for the largest gradient, and there must be one

    def _beside(self, optimizer: Optimizer, wanted: Mapping[Tensor, FlatParameter]) -> dict[Tensor, FlatParameter]:
        """Return the other parameters that are spread over ranks: no kernel takes these and plain tensors together."""
        if not any(map(is_sharded, wanted)):
            return {}
        every = (parameter for group in optimizer.param_groups for parameter in group["params"])
        others = [parameter for parameter in every if is_sharded(parameter) and parameter not in wanted]
        return {parameter: self._flat(parameter, []) for parameter in others}

    def _flat(self, parameter: Tensor, held: list[FrozenParameter]) -> FlatParameter:
        """Return a parameter's free entries as they are stepped: the present ones, where they still fit."""
        flat = self._parameters.get(parameter)
        return flat if flat is not None and flat.fits(held) else FlatParameter(parameter, held)

    def state_dict(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the optimizer's state dict with flat tensors of the free entries, and which those are."""
        self._saves_compact = True
        try:
            return optimizer.state_dict()
        finally:
            self._saves_compact = False

    def saved(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the optimizer's state dict as it is to be saved: whole, unless it was asked for compact."""
        orders = _orders(self._parameters)
        if not self._saves_compact:
            return whole_state_dict(optimizer, state_dict, orders)
        held = {parameter: flat.held for parameter, flat in self._parameters.items()}
        return compact_state_dict(optimizer, state_dict, orders, held)

    # Steps

    def begin_step(self, optimizer: Optimizer) -> Any:
        """Return what steps in the optimizer's place."""
        self.interrupt()
        if self._step is None:
            self._step = FlatStep(optimizer, self._parameters)
        return self._step.prepare(optimizer)

    def before_closure(self) -> None:
        """Let a closure see the weights of this moment: LBFGS moves them between its closures."""
        if self._step is not None:
            self._step.scatter()

    def after_closure(self) -> None:
        """Let the step see the gradients that a closure made."""
        if self._step is not None:
            self._step.gather_gradients()

    def end_step(self) -> None:
        """Hand weights and state over to the optimizer."""
        if self._step is not None:
            self._step.finish()

    def interrupt(self) -> None:
        """Leave off a step that has begun: it failed, or what it steps is about to change."""
        if self._step is not None and self._step.has_begun:
            self._step = None

    def impose(self) -> None:
        """Write the values into all parameters that are stepped by their free entries."""
        for flat in self._parameters.values():
            flat.impose()


def _overlapping(parameters: Iterable[Tensor]) -> set[Tensor]:
    """Return the parameters that lie in memory which another one, stepped by the same optimizer, lies in too."""
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


def _orders(parameters: dict[Tensor, FlatParameter]) -> dict[Tensor, FlatOrder]:
    return {parameter: flat.free for parameter, flat in parameters.items()}
