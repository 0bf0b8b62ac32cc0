"""What one handle does to one optimizer."""

from __future__ import annotations

from torch.optim import Optimizer

from .._held.held import HeldParameters
from .step import StepHooks, step_hooks_on


class Guard:
    """What one handle does to one optimizer. Made by `FrozenEntries.guard`.

    Attributes:
        hooks: The hooks on the optimizer, shared by all handles that guard it.
        inside: The guards of the optimizers inside it, which go with this one.
    """

    def __init__(self, hooks: StepHooks, held: HeldParameters) -> None:
        self.hooks = hooks
        self.inside: list[Guard] = []
        self._held = held
        self._compact = False
        self._is_removed = False

    @property
    def optimizer(self) -> Optimizer | None:
        """The guarded optimizer, or None where it or the guard is gone."""
        return None if self._is_removed else self.hooks.optimizer

    @property
    def nbytes(self) -> int:
        """The memory that compact mode takes between steps, in bytes, beside the optimizer's state."""
        return self.hooks.nbytes

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to guard: the guard was removed, or the optimizer is gone with its hooks."""
        return self._is_removed or self.hooks.is_over

    def ask(self, *, compact: bool) -> None:
        """Have the optimizer hold the free entries alone from the next `install` on; once asked for, that stays."""
        self._compact = self._compact or compact

    def install(self, *, compact: bool = False) -> None:
        """Hold the entries through the optimizer's steps, by its free entries alone where that is or was asked for."""
        optimizer = self.optimizer
        if optimizer is not None:
            self.hooks = step_hooks_on(optimizer) or self.hooks
            self.hooks.join(self._held, compact=self._compact or compact)

    def suspend(self) -> None:
        """Take this handle's part off the optimizer, until `install` puts it on again."""
        self.ask(compact=self.hooks.compact is not None)
        self.hooks.leave(self._held)

    def remove(self) -> None:
        """Stop guarding the optimizer for good; the frozen entries are then held by the model's own hooks alone."""
        for guard in [self, *self.inside]:
            guard.suspend()
            guard.hooks.let_be()
            guard._is_removed = True
