"""An optimizer that holds the free entries alone: it steps flat tensors of them, and its state is of their size.

The optimizer's groups always hold the model's own parameters, and its state lies under them, as flat tensors. At each
step the optimizer's own `step` runs on a stand-in for the optimizer, whose groups hold the flat tensors in the place
of the parameters. Whatever happens in a step, an error included, the optimizer itself never changes hands.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .._entries.free import FreeEntries
from .._errors import StateMismatchError, UnsupportedOptimizerError, UnsupportedParameterError
from .._held.parameter import FrozenPart
from .._ranks.sharding import is_sharded
from .elementwise import ELEMENTWISE, is_elementwise, steps_like
from .flat_step import Slot, Stage, stand_in
from .state import stepped_by
from .state_dict import (
    NarrowState,
    check_in_plain_shapes,
    compact_state_dict,
    read_state_dict,
    reformed,
    whole_state_dict,
)

Held: TypeAlias = "Callable[[], Iterable[tuple[FrozenPart, Tensor]]]"
"""Returns each part with the parameter that it holds now."""

_REFUSED: Final = {
    "Muon": "it orthogonalises the update of a whole matrix",
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


def check_whole(held: Iterable[tuple[FrozenPart, Tensor]]) -> None:
    """Refuse parameters that are spread over ranks: how many entries are free differs from rank to rank.

    Raises:
        UnsupportedParameterError: One is.
    """
    for part, parameter in held:
        if is_sharded(parameter):
            raise UnsupportedParameterError(
                f"`{part.name}` is spread over ranks ({type(parameter).__name__}), and compact=True needs it whole",
                "leave out compact=True, or train with DistributedDataParallel",
            )


class Compaction:
    """What makes an optimizer hold the free entries alone; shared by the guards of all handles on it.

    Attributes:
        members: What each handle holds.
    """

    def __init__(self) -> None:
        self.members: list[Held] = []
        self._slots: dict[Tensor, Slot] = {}
        self._stage: Stage | None = None
        self._saves_compact = False
        self._is_behind = False
        self._handles: list[RemovableHandle] = []

    def join(self, held: Held, optimizer: Optimizer) -> None:
        """Step what a handle holds by its free entries too."""
        self.members.append(held)
        try:
            self.settle(optimizer)
        except StateMismatchError:
            self.members.remove(held)
            raise
        if not self._handles:
            # first of all such hooks: every other one sees a whole state that is saved, and a settled one after a load
            self._handles = [
                optimizer.register_state_dict_post_hook(self._after_saving, prepend=True),
                optimizer.register_load_state_dict_pre_hook(self._before_loading),
                optimizer.register_load_state_dict_post_hook(self._after_loading, prepend=True),
            ]

    def leave(self, held: Held, optimizer: Optimizer) -> None:
        """Let go what a handle holds; with the last one the optimizer holds whole parameters again."""
        self.members.remove(held)
        self._interrupt()
        self.settle(optimizer)
        if not self.members:
            for handle in self._handles:
                handle.remove()
            self._handles = []

    def holds(self, parameter: Tensor) -> bool:
        """Return whether the optimizer steps a parameter by its free entries, so never reads or writes the others."""
        return parameter in self._slots

    @property
    def nbytes(self) -> int:
        """The memory that positions of free entries take, in bytes: none where they lie in a few runs."""
        return sum(slot.free.nbytes for slot in self._slots.values())

    # State

    def settle(self, optimizer: Optimizer) -> None:
        """Bring the optimizer's state into line with what the handles hold now.

        Entries that stay free keep their state; those that were frozen start anew, as if they had never moved. A step
        that has begun ends with what it began with; what a closure changes waits for its end.
        """
        self._is_behind = self._stage is not None and self._stage.has_begun
        if self._is_behind:
            return
        if not isinstance(optimizer.state, NarrowState):
            self._slots = {}  # it was replaced, by a load or by hand: it is whole
        wanted = self._wanted(optimizer)
        if any(wanted.get(parameter) is not self._slots.get(parameter) for parameter in {**wanted, **self._slots}):
            changed = reformed(optimizer.param_groups, optimizer.state, _free(self._slots), _free(wanted))
            optimizer.state.update(changed)
            self._slots = wanted
            optimizer.state = NarrowState(optimizer, _free(wanted)) if wanted else defaultdict(dict, optimizer.state)

    def _wanted(self, optimizer: Optimizer) -> dict[Tensor, Slot]:
        """Return a slot for each parameter to step by its free entries: the present one, where it still fits."""
        wanted = {}
        for parameter, parts in self._frozen_in(optimizer).items():
            slot = self._slots.get(parameter)
            wanted[parameter] = slot if slot is not None and slot.fits(parts) else Slot(parameter, parts)
        others = any(parameter not in wanted for group in optimizer.param_groups for parameter in group["params"])
        if others or any(slot.free.count for slot in wanted.values()) or is_elementwise(optimizer):
            return wanted
        return {}  # nothing is free: LBFGS asks for the largest gradient, and there must be one

    def _frozen_in(self, optimizer: Optimizer) -> dict[Tensor, list[FrozenPart]]:
        stepped = stepped_by(optimizer)
        found: dict[Tensor, list[FrozenPart]] = {}
        for member in self.members:
            held = list(member())
            check_whole(held)
            for part, parameter in held:
                if id(parameter) in stepped:
                    found.setdefault(parameter, []).append(part)
        # tied copies are summed and made one as whole parameters
        return {parameter: parts for parameter, parts in found.items() if all(part.tie is None for part in parts)}

    def _before_loading(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a state that is to be loaded in the plain shapes, or refuse it."""
        whole = read_state_dict(optimizer, state_dict)
        check_in_plain_shapes(optimizer, whole)
        return whole

    def _after_loading(self, optimizer: Optimizer) -> None:
        """Take over a state that was loaded."""
        self._interrupt()
        self.settle(optimizer)

    def compact_state_dict(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the optimizer's state dict with flat tensors of the free entries, and which those are."""
        self._saves_compact = True
        try:
            return optimizer.state_dict()
        finally:
            self._saves_compact = False

    def _after_saving(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the optimizer's state dict as it is to be saved: whole, unless it was asked for compact."""
        if not self._saves_compact:
            return whole_state_dict(optimizer, state_dict, _free(self._slots))
        places = {
            parameter: [piece.places for part in slot.parts for piece in part.pieces]
            for parameter, slot in self._slots.items()
        }
        return compact_state_dict(optimizer, state_dict, _free(self._slots), places)

    # Steps

    def begin_step(self, optimizer: Optimizer) -> Any:
        """Return what steps in the optimizer's place."""
        self._interrupt()
        self.settle(optimizer)
        self._stage = Stage(optimizer, lambda: self._slots)
        return stand_in(optimizer, self._stage)

    def before_closure(self) -> None:
        """Let a closure see the weights of this moment: LBFGS moves them between its closures."""
        if self._stage is not None:
            self._stage.write_weights()

    def after_closure(self) -> None:
        """Let the step see the gradients that a closure made."""
        if self._stage is not None:
            self._stage.renew_gradients()

    def end_step(self, optimizer: Optimizer) -> None:
        """Hand weights and state over to the optimizer."""
        if self._stage is not None:
            self._stage.end()
            self._stage = None
            if self._is_behind:  # a closure has frozen more, or less
                self.settle(optimizer)
                for slot in self._slots.values():
                    slot.impose()

    def _interrupt(self) -> None:
        """Leave off a step that has begun: it failed, or what it steps is about to change."""
        if self._stage is not None and self._stage.has_begun:
            self._stage = None


def _free(slots: dict[Tensor, Slot]) -> dict[Tensor, FreeEntries]:
    return {parameter: slot.free for parameter, slot in slots.items()}
