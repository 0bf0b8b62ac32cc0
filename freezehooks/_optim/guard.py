"""The guard of one optimizer by one handle."""

from __future__ import annotations

from torch.optim import Optimizer

from .._held.held import HeldParameters
from .step import StepHooks, step_hooks_on


class Guard:
    """Holds the entries of one handle through the steps of one optimizer. Made by `FrozenEntries.guard`.

    Attributes:
        hooks: The hooks on the optimizer, shared by all handles that guard it.
        inside: The guards of the optimizers inside it, which are removed with this one.
    """

    def __init__(self, hooks: StepHooks, held: HeldParameters) -> None:
        self.hooks = hooks
        self.inside: list[Guard] = []
        self._held = held
        self._compact = False
        self._is_removed = False

    @property
    def optimizer(self) -> Optimizer | None:
        """The guarded optimizer, or None if it is gone or the guard was removed."""
        return None if self._is_removed else self.hooks.optimizer

    @property
    def nbytes(self) -> int:
        """The memory that compact mode takes between steps, in bytes, beside the optimizer's state."""
        return self.hooks.nbytes

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to guard: the guard was removed, or the optimizer is gone."""
        return self._is_removed or self.hooks.is_over

    def ask(self, *, compact: bool) -> None:
        """Ask for compact mode from the next `install` on; once asked for, it stays."""
        self._compact = self._compact or compact

    def install(self, *, compact: bool = False) -> None:
        """Hold the entries through the optimizer's steps, in compact mode if that is or was asked for."""
        optimizer = self.optimizer
        if optimizer is not None:
            self.hooks = step_hooks_on(optimizer) or self.hooks
            self.hooks.join(self._held, compact=self._compact or compact)

    def suspend(self) -> None:
        """Stop holding this handle's entries through the optimizer's steps until `install` is called again."""
        self.ask(compact=self.hooks.compact is not None)
        self.hooks.leave(self._held)

    def remove(self) -> None:
        """Stop guarding the optimizer for good; from then on only the model's own hooks hold the frozen entries."""
        for guard in [self, *self.inside]:
            guard.suspend()
            guard.hooks.uninstall_if_unused()
            guard._is_removed = True
