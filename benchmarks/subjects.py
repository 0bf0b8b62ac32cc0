"""The subjects of a comparison: a task, plain training, and training with this library."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from freezehooks import MaskedOptimizer, freeze_entries

from ._measure import Clock, Timing
from ._memory import held_bytes


@dataclass(frozen=True)
class Held:
    """Entries of one parameter to hold.

    Attributes:
        name: The parameter's qualified name.
        index: The entries, as an index of the parameter: slices, or a bool tensor.
        value: A number, or a tensor of the parameter's shape.
    """

    name: str
    index: Any
    value: float | Tensor = 0.0

    def frozen(self, parameter: Tensor) -> Tensor:
        """Return the bool tensor that is True at the held entries."""
        frozen = torch.zeros(parameter.shape, dtype=torch.bool, device=parameter.device)
        frozen[self.index] = True
        return frozen

    def values(self) -> Any:
        """Return what an indexed assignment writes: a number, or the values of the held entries."""
        return self.value[self.index] if isinstance(self.value, Tensor) else self.value


@dataclass(frozen=True)
class Task:
    """What every subject of a comparison trains, on its own copy of the model.

    Attributes:
        model: The model, with the initial weights.
        batches: The data; each round uses the next batch.
        loss: A function from the model and a batch to the loss.
        optimizer: A function from the parameters to their optimizer.
        held: The entries to hold.
        spec: The same entries as a user of this library would write them.
        steps: How many training steps make a turn. Short steps come several at a time, as in training, so that the
            figures do not depend on caches that other subjects left cold.
    """

    model: nn.Module
    batches: Sequence[Any]
    loss: Callable[[nn.Module, Any], Tensor]
    optimizer: Callable[[Iterable[Tensor]], Optimizer]
    held: Sequence[Held]
    spec: Any
    steps: int = 1


class Plain:
    """Trains with nothing frozen, as the reference."""

    name = "plain"
    freezes = False

    def __init__(self, task: Task) -> None:
        self.task = task
        self.model = copy.deepcopy(task.model)
        self.prepare()
        self.optimizer = task.optimizer([p for p in self.model.parameters() if p.requires_grad])
        self.protect()

    @classmethod
    def missing(cls) -> str | None:
        """Return why the subject cannot be measured here, or None."""
        return None

    def prepare(self) -> None:
        """Change the model, before its optimizer is made."""

    def protect(self) -> None:
        """Change the optimizer."""

    def before_forward(self) -> None:
        """Do what the subject does before each forward."""

    def step_optimizer(self) -> None:
        """Step the optimizer, with what comes right before and after."""
        self.optimizer.step()

    def turn(self, number: int, clock: Clock) -> Timing:
        """Run the training steps of a turn and return how long one took."""
        batch = self.task.batches[number % len(self.task.batches)]
        start = clock()
        steps = [self._train_on(batch, clock) for _ in range(self.task.steps)]
        whole = clock() - start  # not read in between: synchronizing after each step would leave a GPU idle
        return Timing(whole / len(steps), sum(steps) / len(steps))

    def step(self) -> None:
        """Train on the first batch, without timing it."""
        self._train_on(self.task.batches[0], Clock(torch.device("cpu")))

    def _train_on(self, batch: Any, clock: Clock) -> float:
        """Run a training step and return how long the optimizer's part of it took."""
        self.optimizer.zero_grad()
        self.before_forward()
        self.task.loss(self.model, batch).backward()
        start = clock.between()
        self.step_optimizer()
        return clock.between() - start

    def extra_bytes(self) -> int:
        """Return how many bytes freezing keeps between steps, in addition to model and optimizer."""
        return 0

    def parameter(self, held: Held) -> Tensor:
        """Return the tensor that the optimizer steps and a checkpoint would store."""
        return self.model.get_parameter(held.name)

    def computed(self, held: Held) -> Tensor:
        """Return the weight that the next forward would compute with."""
        return self.parameter(held)

    def owner(self, held: Held) -> tuple[nn.Module, str]:
        """Return the module that has the parameter, and the parameter's name there."""
        path, _, key = held.name.rpartition(".")
        return self.model.get_submodule(path), key


class PlainAgain(Plain):
    """Plain training again: differences no larger than between the two are noise."""

    name = "plain again"


class FreezeHooks(Plain):
    """This library."""

    name = "freezehooks"
    freezes = True
    options: dict[str, Any] = {}  # noqa: RUF012  # read only

    skips: dict[str, Any] = {}  # noqa: RUF012  # read only

    def prepare(self) -> None:
        self.frozen = freeze_entries(self.model, self.task.spec, **self.skips)

    optimizer: MaskedOptimizer

    def protect(self) -> None:
        self.optimizer = MaskedOptimizer(self.optimizer, self.frozen, **self.options)

    def extra_bytes(self) -> int:
        return held_bytes(self.frozen)


def _without(function: Callable[..., Any], argument: str) -> str | None:
    """Return that an older version of this library lacks an argument, or None if it has it."""
    takes_it = argument in inspect.signature(function).parameters
    return None if takes_it else f"this version's {function.__name__} does not take `{argument}`"


class FreezeHooksCompact(FreezeHooks):
    """This library, with optimizer state for the free entries only."""

    name = "freezehooks compact"
    options = {"compact": True}  # noqa: RUF012  # read only

    @classmethod
    def missing(cls) -> str | None:
        return _without(MaskedOptimizer, "compact")

    def extra_bytes(self) -> int:
        guard = self.frozen.guard(self.optimizer.inner, compact=True)  # the one that guards it already
        return held_bytes(self.frozen) + guard.nbytes


class FreezeHooksSkipping(FreezeHooks):
    """This library, with no gradient computed for frozen rows."""

    name = "freezehooks skipping"
    skips = {"skip_gradients": True}  # noqa: RUF012  # read only

    @classmethod
    def missing(cls) -> str | None:
        return _without(freeze_entries, "skip_gradients")


class FreezeHooksSkippingCompact(FreezeHooksSkipping, FreezeHooksCompact):
    """This library, with neither gradient nor optimizer state for frozen rows."""

    name = "freezehooks skipping compact"

    @classmethod
    def missing(cls) -> str | None:
        return FreezeHooksSkipping.missing() or FreezeHooksCompact.missing()


OURS: tuple[type[Plain], ...] = (Plain, PlainAgain, FreezeHooks, FreezeHooksCompact)
