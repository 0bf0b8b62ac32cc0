"""Callbacks for Lightning that freeze entries during fit and log figures on them."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from contextlib import suppress
from typing import Any, ClassVar, Final

from torch import nn
from torch.optim.swa_utils import AveragedModel

from .._errors import OptimizerMismatchError, SpecError
from .._handle import FrozenEntries, freeze_entries
from .._optim.step import is_compact
from ._base import FreezingCallback, check_whole_number
from ._figures import figures

_PACKAGES: Final = ("lightning.pytorch", "pytorch_lightning")


def _callback_bases() -> tuple[type, ...]:
    """Return the `Callback` class of each installed Lightning package, since a Trainer requires that of its own."""
    installed = [name for name in _PACKAGES if importlib.util.find_spec(name.split(".")[0]) is not None]
    if not installed:
        raise ModuleNotFoundError(
            "freezehooks.integrations.lightning needs Lightning: pip install 'freezehooks[lightning]'"
        )
    return tuple(importlib.import_module(name).Callback for name in installed)


_Callback: Any = type("_Callback", _callback_bases(), {})


class FreezeEntries(FreezingCallback, _Callback):
    """Hold some entries of the module's parameters through `Trainer.fit`.

    At the start of every fit the rules are applied: the named layers get gradient hooks and forward hooks, and every
    optimizer that steps one of them is guarded through its own step hooks, while it stays the object that
    `configure_optimizers` returned. After the last step of every epoch each frozen entry is compared with its value,
    bit for bit. At the end of fit every hook is removed.

    The rules, the regions they selected and the values are saved in the checkpoint. A run that resumes from it restores
    them.

    For stages, give the Trainer several callbacks, each with its epochs: entries that one thaws at the start of an
    epoch may be frozen by another in the same epoch, whatever the order of the callbacks.

    Args:
        spec: The rules, as for `freeze_entries`; names are those of the LightningModule's parameters.
        train_only: Instead of `spec`, what trains, as for `freezehooks.train_only`.
        from_epoch: The epoch, counted from 0, before whose first step the entries are frozen; `keep` is what they hold
            then. Left out: at the start.
        until_epoch: The epoch, counted from 0, at whose start all entries are thawed. Left out: never.
        compact: Whether the optimizers hold and step only the free entries; see `MaskedOptimizer`. Checkpoints still
            contain their state in the parameters' shapes.
        skip_gradients: Whether gradients are skipped for frozen rows of `nn.Linear` layers; see `freeze_entries`.

    Attributes:
        frozen: The handle of the latest fit, removed at its end or at `until_epoch`; None before any, and if the
            fit began after `until_epoch`.

    Raises:
        FreezeError: When the callback is made, for text that is not a rule; at the start of fit, for anything else.
        DriftError: After the last step of an epoch, if a frozen entry does not hold its value.
        UnguardedError: After the last step of an epoch, if all of them do, but a hook that holds them is missing.
        StateMismatchError: When resuming from a checkpoint that was saved under other rules, or in another format.

    Example:
        >>> from freezehooks.integrations.lightning import FreezeEntries
        >>> callback = FreezeEntries("conv.weight[center] = 0", until_epoch=10)
        >>> print(*callback.rules)
        conv.weight[center] = 0
        >>> stages = [FreezeEntries("conv", until_epoch=5), FreezeEntries(train_only="head", from_epoch=5)]
    """

    _word_for_training: ClassVar[str] = "fit"

    def __init__(  # Lightning's command line reads these annotations
        self,
        spec: str | list[Any] | dict[str, Any] | Any | None = None,
        *,
        train_only: str | list[Any] | dict[str, Any] | Any | None = None,
        from_epoch: int | None = None,
        until_epoch: int | None = None,
        compact: bool = False,
        skip_gradients: bool = False,
    ) -> None:
        super().__init__(
            spec,
            train_only=train_only,
            from_epoch=from_epoch,
            until_epoch=until_epoch,
            compact=compact,
            skip_gradients=skip_gradients,
        )
        self._saved: dict[str, Any] | None = None
        self._averages: list[FrozenEntries] = []
        self._is_alone = False

    @property
    def state_key(self) -> str:
        """The name of this callback's state in a checkpoint: the rules, with the epochs if other callbacks share them.

        So a run may resume with another `until_epoch`.
        """
        return self.rules_key if self._is_alone else super().state_key

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget an earlier fit; Lightning loads the state from a checkpoint after this."""
        if stage == "fit":
            self._forget()
            self._saved = None
            self._is_alone = [each.rules_key for each in _stages(trainer)].count(self.rules_key) == 1

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Freeze the entries and guard the optimizers that step them."""
        if self._starts_frozen(trainer):
            self._freeze(trainer, pl_module)

    def _freeze(self, trainer: Any, pl_module: Any) -> None:
        self.frozen = self._hold(pl_module, self._saved)
        self._averages = [
            freeze_entries(each, self.frozen.rules, state=self.frozen.state_dict()) for each in _averages(trainer)
        ]
        self._guard(trainer.optimizers, compact=self.compact)
        self._report(trainer, pl_module, self.frozen)

    def _guard(self, optimizers: list[Any], compact: bool = False) -> None:
        frozen = self._holding()
        if frozen is None:
            return
        for optimizer in optimizers:
            with suppress(OptimizerMismatchError):  # it steps other parameters of the module
                frozen.guard(optimizer, compact=compact)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Guard an optimizer that was created, or given frozen parameters, since the start of fit."""
        self._guard([optimizer])  # its step has begun: too late for compact mode in this one

    def _guard_compactly(self, trainer: Any) -> None:
        """Switch optimizers that were created since the start of fit to compact mode, between two steps."""
        late = [each for each in trainer.optimizers if not is_compact(each)] if self.compact else []
        self._guard(late, compact=True)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Thaw the entries if the epoch for it has come."""
        self._release_if_due(trainer)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Freeze the entries if the epoch for it has come, after all callbacks have thawed what is due.

        They are asked again here since a resumed run may skip `on_train_epoch_start` of its first epoch.
        """
        for stage in _stages(trainer):
            stage._release_if_due(trainer)
        if self._begins_now(trainer):
            self._freeze(trainer, pl_module)
        if batch_idx == 0:
            self._hold_statistics(trainer, pl_module)
        self._check_untrained()
        self._guard_compactly(trainer)

    def _hold_statistics(self, trainer: Any, pl_module: Any) -> None:
        """Impose on the buffers that SWA has assigned, to collect the statistics of BatchNorm again.

        Otherwise `keep` would adopt what those contain, as it does for any tensor that was replaced.
        """
        frozen = self._holding()
        if frozen is not None and any(getattr(callback, "momenta", None) for callback in trainer.callbacks):
            for name, buffer in pl_module.named_buffers():
                if name in frozen:
                    frozen[name].impose(buffer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Check after the last step of an epoch that every frozen entry holds its value and no hook is missing."""
        self._guard_compactly(trainer)
        if trainer.is_last_batch:
            self._check()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Impose before a callback replaces the weights by their average for validation."""
        self._impose()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Impose on the module and on averages, as a callback may copy the average into the module before or after."""
        self._impose()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Impose once more and remove the hooks."""
        self._finish()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Remove the hooks."""
        self._abort()

    def state_dict(self) -> dict[str, Any]:
        """Return rules, regions and values, and whether the entries were thawed already."""
        return self._write_state(self._saved if self.frozen is None else self.frozen.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore regions and values from a checkpoint, now or at the start of fit."""
        self._released, self._saved = self._read_state(state_dict)
        if self.frozen is not None and self._saved is not None:  # some strategies load after the start of fit
            if self._released:
                self._remove()
            else:
                for frozen in (self.frozen, *self._averages):
                    frozen.load_state_dict(self._saved)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Raise if training would resume from a checkpoint that was saved under other rules."""
        if trainer.state.fn == "fit":
            present = {callback.state_key for callback in trainer.callbacks}
            self._check_saved_rules(checkpoint.get("callbacks", {}), present)

    def _impose(self) -> None:
        super()._impose()
        for average in self._averages:
            average.impose()

    def _remove(self) -> None:
        super()._remove()
        for average in self._averages:
            average.remove()
        self._averages = []

    def _epoch(self, training: Any) -> int:
        return int(training.current_epoch)

    def _log(self, training: Any, message: str) -> None:
        """Log a message in one process, with the logger of the trainer's package."""
        if training.is_global_zero:
            modules = [cls.__module__ for cls in type(training).__mro__]
            package = next(name for name in _PACKAGES if any(module.startswith(name) for module in modules))
            logging.getLogger(package).info(message)


def _stages(trainer: Any) -> list[FreezeEntries]:
    return [callback for callback in trainer.callbacks if isinstance(callback, FreezeEntries)]


def _averages(trainer: Any) -> list[nn.Module]:
    """Return the averages of the module that Lightning's callbacks keep, which were copied before freezing."""
    found = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]  # it has no public name
    return [each.module if isinstance(each, AveragedModel) else each for each in found if each is not None]


class FrozenEntriesMonitor(_Callback):
    """Log the drift of frozen entries and the norms of their gradients to every logger of the trainer.

    These are logged for each parameter with entries frozen by a `FreezeEntries` callback or by hand:

    - ``freezehooks/<name>/drift``: the largest absolute difference of a frozen entry from its value, after the step.
      It is 0 at every step, unless something writes to them.
    - ``freezehooks/<name>/gradient_norm_frozen``: the 2-norm of the gradient over the frozen entries, as the optimizer
      is about to see it: unscaled, and not yet clipped. It is 0 at every step.
    - ``freezehooks/<name>/gradient_norm_free``: the same over the free entries. If it is 0 at every step, the layer
      does not learn.

    A parameter without a gradient has no norms, and one that was thawed is not logged any more. Steps that are not
    logged cost nothing. For a sharded parameter, the figures are those of the first rank's shard.

    Args:
        every_n_steps: How many steps apart figures are logged. Left out: the trainer's `log_every_n_steps`.

    Raises:
        SpecError: When the callback is made, if `every_n_steps` is not a positive integer; at the start of training,
            if the trainer has no logger.

    Example:
        >>> from freezehooks.integrations.lightning import FreezeEntries, FrozenEntriesMonitor
        >>> callbacks = [FreezeEntries("conv.weight[center] = 0"), FrozenEntriesMonitor(every_n_steps=10)]
        >>> callbacks[1].every_n_steps
        10
    """

    def __init__(self, *, every_n_steps: int | None = None) -> None:
        check_whole_number("every_n_steps", every_n_steps, "a number of steps", least=1)
        self.every_n_steps = every_n_steps
        self._has_stepped = False
        self._metrics: dict[str, float] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Reject a trainer without loggers, and forget an earlier fit."""
        self._has_stepped, self._metrics = False, {}
        if not trainer.loggers:
            raise SpecError(
                "`FrozenEntriesMonitor` needs a logger, and the Trainer has none",
                "give it one with Trainer(logger=True) or a logger of your own, or leave the callback out",
            )

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Record the norms of the gradients with which this optimizer is about to step."""
        if not self._is_due(trainer):
            return
        self._has_stepped = True
        self._metrics |= figures(pl_module, before_step_of=optimizer)

    def _is_due(self, trainer: Any) -> bool:
        every = trainer.log_every_n_steps if self.every_n_steps is None else self.every_n_steps
        return every > 0 and (_steps_so_far(trainer) + 1) % every == 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the figures if this batch ended in a step that is due."""
        if not self._has_stepped:
            return
        self._metrics |= figures(pl_module)
        if self._metrics and trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(self._metrics, step=_steps_so_far(trainer))
        self._has_stepped, self._metrics = False, {}


def _steps_so_far(trainer: Any) -> int:
    """Return the step at which Lightning logs its own metrics, which has no public name."""
    steps: int = trainer.fit_loop.epoch_loop._batches_that_stepped
    return steps
