"""Freeze entries inside the Trainer of Hugging Face transformers, and watch them: two callbacks."""

from __future__ import annotations

import logging
import uuid
from pathlib import Path
from typing import Any, ClassVar, Final

import torch

from .._errors import FreezeError, StateMismatchError
from .._rules.spec import Spec
from ._base import FreezingCallback
from ._figures import figures

try:
    from accelerate.optimizer import AcceleratedOptimizer
    from transformers import TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "freezehooks.integrations.transformers needs transformers and accelerate: "
        "pip install 'freezehooks[transformers]'"
    ) from error

_FILE: Final = "freezehooks.pt"
"""The file with regions and values in a checkpoint folder; the Trainer's own JSON file cannot contain them."""


class FreezeEntriesCallback(FreezingCallback, TrainerCallback):
    """Hold some entries of the model's parameters through `Trainer.train`.

    At the start of every training the rules are applied: the named layers get gradient hooks and forward hooks, and
    the optimizer is guarded through its own step hooks, while it stays the object that the Trainer made or was given.
    At the end of every epoch each frozen entry is compared with its value, bit for bit. At the end of training every
    hook is removed.

    Regions and values are saved in the file `freezehooks.pt` in every checkpoint folder. A run that resumes from it
    restores them.

    For stages, give the Trainer several callbacks, each with its epochs: entries that one thaws at the start of an
    epoch may be frozen by another in the same epoch, whatever the order of the callbacks.

    Args:
        spec: The rules, as for `freeze_entries`; names are those of the model's parameters.
        train_only: Instead of `spec`, what trains, as for `freezehooks.train_only`.
        from_epoch: The epoch, counted from 0, before whose first step the entries are frozen; `keep` is what they hold
            then. Left out: at the start.
        until_epoch: The epoch, counted from 0, at whose start all entries are thawed. Left out: never.
        compact: Whether the optimizer holds and steps only the free entries; see `FrozenEntries.guard`.
        skip_gradients: Whether gradients are skipped for frozen rows of `nn.Linear` layers; see `freeze_entries`.

    Attributes:
        frozen: The handle of the latest training, removed at its end or at `until_epoch`; None before any, and if the
            training began after `until_epoch`.
            The Trainer does not tell callbacks about exceptions: after one, the entries are held until
            `frozen.remove()` is called or the callback's next training starts.

    Raises:
        FreezeError: When the callback is made, for text that is not a rule; at the start of training, for anything
            else.
        DriftError: At the end of an epoch, if a frozen entry does not hold its value.
        UnguardedError: At the end of an epoch, if all of them do, but a hook that holds them is missing.
        StateMismatchError: When resuming from a checkpoint that was saved under other rules or in another format, or
            whose `freezehooks.pt` cannot be found.

    Example:
        >>> from freezehooks.integrations.transformers import FreezeEntriesCallback
        >>> callback = FreezeEntriesCallback("transformer.wte[~50257:]", until_epoch=2)
        >>> print(*callback.rules)
        transformer.wte[~50257:] = keep
        >>> callback = FreezeEntriesCallback(train_only=["transformer.wte[50257:]", "lm_head[50257:]"])
    """

    _word_for_training: ClassVar[str] = "training"

    def __init__(
        self,
        spec: Spec | None = None,
        *,
        train_only: Spec | None = None,
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
        self._run = ""
        self._pass: int | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Freeze the entries and guard the optimizer, after the Trainer has loaded any checkpoint."""
        self._forget()
        self._run, self._pass = uuid.uuid4().hex, None
        key = self._key_in(state.stateful_callbacks)
        entry = state.stateful_callbacks.get(key)  # None in a new run, or if the saved run froze nothing
        if entry is not None:
            self._released, _ = self._read_state(entry)
        if self._starts_frozen(state):
            saved = self._saved(args, state, key, entry) if entry is not None and entry.get("begun", True) else None
            self._freeze(state, model, optimizer, saved)

    def _key_in(self, saved: dict[str, Any]) -> str:
        """Return the key of this callback's state in a checkpoint, which may have the same rules with other epochs.

        Raises:
            StateMismatchError: The checkpoint has other rules and not those of this callback.
        """
        others = [key for key in saved if key.startswith(self.rules_key)]
        if self.state_key not in saved and len(others) == 1:
            return others[0]
        self._check_saved_rules(saved)
        return self.state_key

    def _saved(self, args: Any, state: Any, key: str, entry: dict[str, Any]) -> dict[str, Any] | None:
        """Return regions and values from the checkpoint from which the run resumes.

        The Trainer does not tell callbacks its folder. Every folder that it may be is searched for a file with the
        identifier of the run.

        Raises:
            StateMismatchError: There is no such file.
        """
        folders = [_checkpoint(args.output_dir, state), _checkpoint(entry["output_dir"], state)]
        if isinstance(args.resume_from_checkpoint, str):
            folders.insert(0, Path(args.resume_from_checkpoint))
        for folder in folders:
            saved = _read(folder).get(key, {})
            if saved.get("run") == entry["run"]:
                _, frozen = self._read_state(saved)  # the entry tells whether it was thawed: the file may be newer
                return frozen
        raise StateMismatchError(
            f"the `{_FILE}` of the checkpoint is not in {', '.join(dict.fromkeys(map(str, folders)))}",
            "name its folder, as in TrainingArguments(resume_from_checkpoint=folder), or copy the file from another "
            "checkpoint of the same run",
        )

    def _freeze(self, state: Any, model: Any, optimizer: Any, saved: dict[str, Any] | None) -> None:
        frozen = self._hold(model, saved)
        options: dict[str, Any] = {"compact": True} if self.compact else {}
        try:
            frozen.guard(_unwrapped(optimizer), **options)
        except Exception:
            frozen.remove()
            raise
        self.frozen = frozen
        self._report(state, model, frozen)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Thaw the entries if the epoch for it has come."""
        self._pass = self._epoch(state) if self._pass is None else self._pass + 1
        self._release_if_due(state)
        self._note(args, state)  # not at the start of training, when other callbacks still read the checkpoint's state

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Freeze the entries if the epoch for it has come, after all callbacks have thawed what is due."""
        if self._begins_now(state):
            self._freeze(state, model, optimizer, None)
            self._note(args, state)
        self._check_untrained()

    def _note(self, args: Any, state: Any) -> None:
        """Write into the Trainer's state what its checkpoints are to contain."""
        state.stateful_callbacks[self.state_key] = {
            **self._write_state(None),  # this becomes JSON: what is frozen goes into the file
            "begun": self.frozen is not None,
            "run": self._run,
            "output_dir": str(Path(args.output_dir).resolve()),
        }

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that every frozen entry holds its value, and that no hook is missing."""
        try:
            self._check()
        except FreezeError:
            self._abort()
            raise

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write regions and values beside the weights, in the processes that save weights."""
        folder = _checkpoint(args.output_dir, state)
        if args.should_save and folder.is_dir() and self.frozen is not None:
            saved = {**self._write_state(self.frozen.state_dict()), "run": self._run}
            _write(folder, {**_read(folder), self.state_key: saved})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Impose once more and remove the hooks."""
        self._finish()

    def _epoch(self, training: Any) -> int:
        # counted, as the Trainer does not know where an epoch ends in a dataset without a length
        return int(training.epoch or 0) if self._pass is None else self._pass

    def _log(self, training: Any, message: str) -> None:
        if training.is_world_process_zero:
            logging.getLogger("transformers").info(message)


class FrozenEntriesMonitor(TrainerCallback):  # type: ignore[misc]  # untyped
    """Log how far frozen entries drifted, and the norms of their gradients, to all that `report_to` names.

    For each parameter of the model with frozen entries, be they frozen by a callback or by hand, at every step that
    the Trainer logs (`logging_steps`, `logging_first_step`):

    - ``freezehooks/<name>/drift``: the largest absolute difference of a frozen entry from its value, after the step.
    - ``freezehooks/<name>/gradient_norm_frozen``: the 2-norm of the gradient over the frozen entries, as the optimizer
      is about to see it: clipped, where the Trainer clips. 0 at every step.
    - ``freezehooks/<name>/gradient_norm_free``: the same over the free entries.

    The Trainer tells its reporters before its other callbacks, so this one has it log once more: it is given the
    Trainer, and is added to it. Under ``logging_strategy="epoch"`` the drift alone is logged.

    Args:
        trainer: The Trainer.

    Example:
        >>> from freezehooks.integrations.transformers import FrozenEntriesMonitor
        >>> def watch(trainer):
        ...     trainer.add_callback(FrozenEntriesMonitor(trainer))
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._norms: dict[str, float] = {}

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Take the norms of the gradients that the optimizer is about to step with."""
        if _is_logged(args, state, state.global_step + 1):
            self._norms = figures(model, before_step_of=_unwrapped(optimizer))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Log, where the Trainer is about to log."""
        self._log_before_trainer(control, model)

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Log, where the Trainer logs at the end of epochs."""
        self._log_before_trainer(control, model)

    def _log_before_trainer(self, control: Any, model: Any) -> None:
        if not control.should_log:
            return
        norms, self._norms = self._norms, {}
        found = {**norms, **figures(model)}
        if found:
            self.trainer.log(found)
            control.should_log = True  # which logging has reset: the Trainer's own numbers are still to come


def _is_logged(args: Any, state: Any, step: int) -> bool:
    """Return whether the Trainer logs a step, as its own callback for that decides."""
    is_first = step == 1 and args.logging_first_step
    return bool(is_first or (args.logging_strategy == "steps" and step % state.logging_steps == 0))


def _unwrapped(optimizer: Any) -> Any:
    """Return the optimizer inside Accelerate's wrapper, which has no step hooks of its own."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _checkpoint(output_dir: str, state: Any) -> Path:
    """Return the folder of the Trainer's checkpoint for the current step."""
    return Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _read(folder: Path) -> dict[str, Any]:
    """Return what the callbacks wrote into a checkpoint folder, by their keys; an empty dict without a file."""
    path = folder / _FILE
    return torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else {}


def _write(folder: Path, items: dict[str, Any]) -> None:
    """Write the file atomically, so that a process that is killed leaves no unfinished one."""
    unfinished = folder / f"{_FILE}.tmp"
    torch.save(items, unfinished)
    unfinished.replace(folder / _FILE)
