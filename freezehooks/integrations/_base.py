"""The base class of the callbacks that freeze entries. It imports no framework."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from typing import Any, ClassVar

from torch import nn

from .._counted import share_of
from .._errors import FreezeError, SpecError, StateMismatchError
from .._handle import FrozenEntries, freeze_entries, train_only
from .._held.saved import FORMAT, check_format, readable
from .._rules.spec import Spec, rules_of


class FreezingCallback(ABC):
    """The part of a callback that does not depend on the framework: settings, thawing, removal, logging and checks.

    A framework's callback inherits from this class first and from the framework's own second. Its event methods freeze
    the entries, keep the handle in `frozen`, and call the methods below. Several of these take `training`: the object
    in which the framework keeps epoch and rank, such as Lightning's `Trainer`.

    Args:
        spec: The rules, as for `freeze_entries`; None if `train_only` is given.
        train_only: What trains, as for `freezehooks.train_only`; None if `spec` is given.
        from_epoch: The epoch, counted from 0, before whose first step the entries are frozen. None: at the start.
        until_epoch: The epoch, counted from 0, at whose start all entries are thawed. None: never.
        compact: Whether the optimizers hold and step only the free entries.
        skip_gradients: Whether gradients are skipped for frozen rows of `nn.Linear` layers; see `freeze_entries`.

    Attributes:
        frozen: The handle of the latest training; None before any, and if it began after `until_epoch`.

    Raises:
        RuleSyntaxError: Some text is not a rule.
        SpecError: Anything else that cannot be read as rules; both of `spec` and `train_only`, or neither; epochs that
            are invalid or in the wrong order.
    """

    _word_for_training: ClassVar[str]
    """What messages call a training run in this framework."""

    def __init__(
        self,
        spec: Spec | None,
        *,
        train_only: Spec | None,
        from_epoch: int | None,
        until_epoch: int | None,
        compact: bool,
        skip_gradients: bool,
    ) -> None:
        _check_epochs(from_epoch, until_epoch)
        self.rules = rules_of(_either(spec, train_only))
        self.trains_rules = spec is None
        self.from_epoch = from_epoch
        self.until_epoch = until_epoch
        self.compact = compact
        self.skip_gradients = skip_gradients
        self.frozen: FrozenEntries | None = None
        self._released = False

    @property
    def state_key(self) -> str:
        """The name of this callback's state in a checkpoint: the rules, and the epochs if there are any."""
        epochs = {"from_epoch": self.from_epoch, "until_epoch": self.until_epoch}
        given = [f"{name}={epoch}" for name, epoch in epochs.items() if epoch is not None]
        return f"{self.rules_key}({', '.join(given)})" if given else self.rules_key

    @property
    def rules_key(self) -> str:
        """The part of `state_key` with the rules only."""
        kind = ".train_only" if self.trains_rules else ""
        return f"{type(self).__qualname__}{kind}{[str(rule) for rule in self.rules]}"

    # What the framework provides

    @abstractmethod
    def _epoch(self, training: Any) -> int:
        """Return the current epoch, counted from 0."""

    @abstractmethod
    def _log(self, training: Any, message: str) -> None:
        """Log a message at level INFO, in one process, with the framework's own logger."""

    # From the start of a training to its end

    def _forget(self) -> None:
        """Forget an earlier training, and remove what it still holds if it was interrupted."""
        self._remove()
        self.frozen, self._released = None, False

    def _starts_frozen(self, training: Any) -> bool:
        """Return whether this training starts with frozen entries, and warn if only the checkpoint prevents it."""
        if self._released and self.until_epoch is None:
            warnings.warn(
                f"{type(self).__name__}: the checkpoint was saved after `until_epoch` had thawed all entries; nothing "
                f"is frozen in this run either. To freeze again, start a new {self._word_for_training} from its "
                "weights alone.",
                stacklevel=3,
            )
        return not self._released and self._is_stage(training)

    def _begins_now(self, training: Any) -> bool:
        """Return whether a stage that begins in the middle of a training begins now."""
        is_waiting = self.from_epoch is not None and self.frozen is None and not self._released
        return is_waiting and self._is_stage(training)

    def _is_stage(self, training: Any) -> bool:
        has_begun = self.from_epoch is None or self._epoch(training) >= self.from_epoch
        return has_begun and not self._is_due(training)

    def _hold(self, model: nn.Module, saved: dict[str, Any] | None) -> FrozenEntries:
        """Freeze what the rules name or, with `train_only`, everything else."""
        hold = train_only if self.trains_rules else freeze_entries
        return hold(model, self.rules, state=saved, skip_gradients=self.skip_gradients)

    def _report(self, training: Any, model: nn.Module, frozen: FrozenEntries) -> None:
        """Log how many entries are frozen, and the table of the handle."""
        total = sum(parameter.numel() for parameter in model.parameters())
        told = share_of(frozen.frozen_count, total, "is frozen", "are frozen")
        self._log(training, f"{type(self).__name__}: {told}\n{frozen}")

    def _is_due(self, training: Any) -> bool:
        return self.until_epoch is not None and self._epoch(training) >= self.until_epoch

    def _release_if_due(self, training: Any) -> None:
        """Thaw all entries for good if the epoch for it has come."""
        if self._is_due(training) and not self._released:
            self._released = True
            self._remove()
            self._log(training, f"{type(self).__name__}: all entries train from epoch {self._epoch(training)} on")

    def _check_untrained(self) -> None:
        """Stop before a step that would train what `train_only` did not name, as another callback has asked for it."""
        frozen = self._holding() if self.trains_rules else None
        if frozen is not None:
            try:
                frozen._untrained.check(frozen.model)
            except FreezeError:
                self._abort()
                raise

    def _holding(self) -> FrozenEntries | None:
        """Return the handle if it holds the entries now, or None."""
        return self.frozen if self.frozen is not None and self.frozen.attached else None

    def _check(self) -> None:
        """Check that every frozen entry holds its value, and that the model's hooks are in place.

        Raises:
            DriftError: An entry does not hold its value.
            UnguardedError: All entries do, but a hook is missing.
        """
        frozen = self._holding()
        if frozen is not None:
            frozen.assert_frozen(guarded=False)

    def _finish(self) -> None:
        """Remove the hooks, after imposing once more: other callbacks may have written averages into the model."""
        self._impose()
        self._abort()

    def _impose(self) -> None:
        """Write the values into the frozen entries, if they are held now."""
        frozen = self._holding()
        if frozen is not None:
            frozen.impose()

    def _abort(self) -> None:
        """Remove the hooks for good, when training is over or has failed."""
        if self.frozen is not None:
            self.frozen._unguard()
        self._remove()

    def _remove(self) -> None:
        """Remove the hooks."""
        if self.frozen is not None:
            self.frozen.remove()

    # Checkpoints

    def _check_saved_rules(self, saved: Iterable[Any], present: Collection[str] = ()) -> None:
        """Reject a checkpoint that has other rules and not those of this callback.

        Args:
            saved: The keys of all callbacks' states in the checkpoint.
            present: The keys of the callbacks in this run; what was saved under them belongs to them.

        Raises:
            StateMismatchError: The checkpoint was saved under other rules.
        """
        kinds = f"{type(self).__qualname__}[", f"{type(self).__qualname__}.train_only["
        ours = [key for key in map(str, saved) if key.startswith(kinds)]
        others = [key for key in ours if key not in present]
        if self.state_key not in ours and others:
            raise StateMismatchError(
                f"the checkpoint was saved under other rules: {', '.join(others)}; this run has {self.state_key}",
                f"give the callback the rules of the checkpoint, or start a new {self._word_for_training} from its "
                "weights alone",
            )

    def _write_state(self, frozen: dict[str, Any] | None) -> dict[str, Any]:
        """Return the callback's state for a checkpoint.

        Args:
            frozen: What `FrozenEntries.state_dict` returned; None if nothing is frozen, or if it is saved elsewhere.
        """
        return {"format": FORMAT, "released": self._released, "frozen": frozen}

    def _read_state(self, state: Any) -> tuple[bool, dict[str, Any] | None]:
        """Return whether the entries were thawed already, and what `FrozenEntries.state_dict` had returned.

        Raises:
            StateMismatchError: The state has another format, or cannot be read.
        """
        what = f"the state of `{type(self).__name__}`"
        with readable(what, "resume from a checkpoint that this callback has saved"):
            check_format(what, state)
            return state["released"], state["frozen"]


def _either(spec: Spec | None, train_only: Spec | None) -> Spec:
    if spec is not None and train_only is None:
        return spec
    if train_only is not None and spec is None:
        return train_only
    found = "neither" if spec is None else "both"
    raise SpecError(
        f"a callback takes `spec` or `train_only`, found {found}",
        "give `spec` to say what is frozen, or `train_only` to say what trains",
    )


def _check_epochs(from_epoch: Any, until_epoch: Any) -> None:
    check_whole_number("from_epoch", from_epoch, "an epoch counted from 0", least=0)
    check_whole_number("until_epoch", until_epoch, "an epoch counted from 0", least=0)
    if None not in (from_epoch, until_epoch) and from_epoch >= until_epoch:
        raise SpecError(
            f"`from_epoch` must come before `until_epoch`, found {from_epoch} and {until_epoch}",
            "entries are frozen before the first step of `from_epoch`, and thawed at the start of `until_epoch`",
        )


def check_whole_number(name: str, value: Any, meaning: str, *, least: int) -> None:
    """Reject an argument that is neither None nor a whole number of at least `least`.

    Args:
        name: The name of the argument.
        value: The argument.
        meaning: What it is, as the message describes it.
        least: The smallest number that is allowed.

    Raises:
        SpecError: The argument is neither.
    """
    if value is not None and (type(value) is not int or value < least):
        raise SpecError(
            f"`{name}` must be {meaning}, or None, found {value!r}", f"give a whole number, {least} or more"
        )
