"""Freeze entries inside Lightning's Trainer and watch them: callbacks for `lightning.pytorch`, `pytorch_lightning`."""

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
    """Return the `Callback` of each installed Lightning: a Trainer asks for its own package's."""
    installed = [name for name in _PACKAGES if importlib.util.find_spec(name.split(".")[0]) is not None]
    if not installed:
        raise ModuleNotFoundError(
            "freezehooks.integrations.lightning needs Lightning: pip install 'freezehooks[lightning]'"
        )
    return tuple(importlib.import_module(name).Callback for name in installed)


_Callback: Any = type("_Callback", _callback_bases(), {})


class FreezeEntries(FreezingCallback, _Callback):
    """Hold some entries of the module's parameters through `Trainer.fit`.

    At the start of every fit the rules are read, the gradient hooks and forward hooks go onto the named layers, and
    every optimizer that steps one of them is guarded through its own step hooks: it stays the object that
    `configure_optimizers` returned. After the last step of every epoch each frozen entry is compared with its value,
    bit for bit. At the end of fit every hook comes off again.

    The rules, the regions they chose and the values go into the checkpoint. A run resumed from it takes them from
    there.

    For stages give the Trainer several callbacks, each with its epochs: what one lets go at the start of an epoch the
    next may hold in it, in whatever order they stand.

    Args:
        spec: The rules, as for `freeze_entries`; names are those of the LightningModule's parameters.
        train_only: In place of `spec`, what is to train alone, as for `freezehooks.train_only`.
        from_epoch: The epoch, counted from 0, before whose first step the entries are frozen, at what they hold then.
            Left out: from the start on.
        until_epoch: The epoch, counted from 0, at whose start all entries are let go. Left out: never.
        compact: Whether the optimizers hold and step the free entries alone, as `MaskedOptimizer` says.
            Checkpoints hold their state in the plain shapes.
        skip_gradients: Whether no gradient is computed for rows of an `nn.Linear` that are frozen whole, as
            `freeze_entries` says.

    Attributes:
        frozen: The handle of the latest fit, detached after it; None before any, and where all entries were let go.

    Raises:
        FreezeError: Text that is no rule, when the callback is made; anything else, at the start of fit.
        DriftError: After the last step of an epoch, where a frozen entry does not hold its value.
        UnguardedError: After the last step of an epoch, where all do, but a hook that holds them was stripped.
        StateMismatchError: On resuming from a checkpoint that was saved under other rules, or in another format.

    Example:
        >>> from freezehooks.integrations.lightning import FreezeEntries
        >>> callback = FreezeEntries("conv.weight[center] = 0", until_epoch=10)
        >>> print(*callback.rules)
        conv.weight[center] = 0
        >>> stages = [FreezeEntries("conv", until_epoch=5), FreezeEntries(train_only="head", from_epoch=5)]
    """

    _word_for_training: ClassVar[str] = "fit"

    def __init__(  # its annotations are what Lightning's command line reads
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
        """The name of this callback's state in a checkpoint: it says the rules, and the epochs where others share them.

        A run may so resume with another `until_epoch`.
        """
        return self.rules_key if self._is_alone else super().state_key

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget an earlier fit: what a checkpoint says of this one is loaded after this."""
        if stage == "fit":
            self._forget()
            self._saved = None
            self._is_alone = [each.rules_key for each in _stages(trainer)].count(self.rules_key) == 1

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Freeze the entries and guard the optimizers that step them."""
        if self._shall_freeze(trainer):
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
            with suppress(OptimizerMismatchError):  # the optimizer of another part of the module
                frozen.guard(optimizer, compact=compact)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Guard an optimizer that was made, or given frozen parameters, since the start of fit."""
        self._guard([optimizer])  # in the middle of its step: too late to be compact in this one

    def _guard_compactly(self, trainer: Any) -> None:
        """Have optimizers that were made since the start of fit hold the free entries alone, between two steps."""
        late = [each for each in trainer.optimizers if not is_compact(each)] if self.compact else []
        self._guard(late, compact=True)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Let the entries go, where the epoch for it has come."""
        self._release_if_due(trainer)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Freeze the entries, where the epoch for it has come, once all callbacks have let go what they were to.

        A resumed run may have begun its epoch without the hook for its start.
        """
        for stage in _stages(trainer):
            stage._release_if_due(trainer)
        if self._shall_begin(trainer):
            self._freeze(trainer, pl_module)
        if batch_idx == 0:
            self._hold_statistics(trainer, pl_module)
        self._guard_compactly(trainer)

    def _hold_statistics(self, trainer: Any, pl_module: Any) -> None:
        """Impose on the buffers that SWA has put in the place of those whose statistics it is about to gather anew.

        `keep` would take the numbers of a tensor that is put in another's place.
        """
        frozen = self._holding()
        if frozen is not None and any(getattr(callback, "momenta", None) for callback in trainer.callbacks):
            for name, buffer in pl_module.named_buffers():
                if name in frozen:
                    frozen[name].impose(buffer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Check after the last step of an epoch that every frozen entry holds its value, and its hooks are in place."""
        self._guard_compactly(trainer)
        if trainer.is_last_batch:
            self._check()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Impose before a callback puts its average in the place of the weights that are validated."""
        self._impose()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Impose, whether a callback has copied its average into the module already or is about to."""
        self._impose()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Impose once more and take the hooks off."""
        self._finish()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Take the hooks off."""
        self._break_off()

    def state_dict(self) -> dict[str, Any]:
        """Return rules, regions and values, and whether the entries were let go already."""
        return self._write_state(self._saved if self.frozen is None else self.frozen.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take regions and values from a checkpoint, at once or at the start of fit."""
        self._released, self._saved = self._read_state(state_dict)
        if self.frozen is not None and self._saved is not None:  # strategies that load after the start of fit
            if self._released:
                self._remove()
            else:
                for frozen in (self.frozen, *self._averages):
                    frozen.load_state_dict(self._saved)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume training from a checkpoint that was saved under other rules."""
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
        """Log a message once, under the package that the trainer comes from."""
        if training.is_global_zero:
            modules = [cls.__module__ for cls in type(training).__mro__]
            package = next(name for name in _PACKAGES if any(module.startswith(name) for module in modules))
            logging.getLogger(package).info(message)


def _stages(trainer: Any) -> list[FreezeEntries]:
    return [callback for callback in trainer.callbacks if isinstance(callback, FreezeEntries)]


def _averages(trainer: Any) -> list[nn.Module]:
    """Return the averages of the module that Lightning's callbacks form: copies made before anything was frozen."""
    found = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]  # it has no public name
    return [each.module if isinstance(each, AveragedModel) else each for each in found if each is not None]


class FrozenEntriesMonitor(_Callback):
    """Log how far frozen entries drifted, and the norms of their gradients, to every logger of the trainer.

    For each parameter of the module with frozen entries, be they frozen by a `FreezeEntries` callback or by hand:

    - ``freezehooks/<name>/drift``: the largest absolute difference of a frozen entry from its value, after the step.
      0 at every step, or something writes to them.
    - ``freezehooks/<name>/gradient_norm_frozen``: the 2-norm of the gradient over the frozen entries, as the optimizer
      is about to see it: unscaled, and not yet clipped. 0 at every step.
    - ``freezehooks/<name>/gradient_norm_free``: the same over the free entries. 0 at every step is a layer that does
      not learn.

    A parameter without a gradient has no norms, and one that was let go is logged no more. Steps that are not logged
    cost nothing. Of a parameter that is spread over ranks, the numbers are of the first rank's part.

    Args:
        every_n_steps: After how many steps the next is logged. Left out: as the trainer's `log_every_n_steps` says.

    Raises:
        SpecError: `every_n_steps` is no such number, when the callback is made; the trainer has no logger, at the
            start of training.

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
        """Refuse a trainer that has nowhere to log to, and forget an earlier fit."""
        self._has_stepped, self._metrics = False, {}
        if not trainer.loggers:
            raise SpecError(
                "`FrozenEntriesMonitor` needs a logger, and the Trainer has none",
                "make it with Trainer(logger=True) or a logger of your own, or leave the callback out",
            )

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Take the norms of the gradients that this optimizer is about to step with."""
        if not self._is_due(trainer):
            return
        self._has_stepped = True
        self._metrics |= figures(pl_module, before_step_of=optimizer)

    def _is_due(self, trainer: Any) -> bool:
        every = trainer.log_every_n_steps if self.every_n_steps is None else self.every_n_steps
        return every > 0 and (_steps_so_far(trainer) + 1) % every == 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log, where this batch came to a step that is due."""
        if not self._has_stepped:
            return
        self._metrics |= figures(pl_module)
        if self._metrics and trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(self._metrics, step=_steps_so_far(trainer))
        self._has_stepped, self._metrics = False, {}


def _steps_so_far(trainer: Any) -> int:
    """Return what Lightning's own metrics and monitors are logged at: it has no public name."""
    steps: int = trainer.fit_loop.epoch_loop._batches_that_stepped
    return steps
