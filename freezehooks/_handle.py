"""`freeze_entries` and `train_only`, and the handle that they return."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ._counted import counted
from ._errors import DriftError, OptimizerMismatchError, SpecError, TargetError, shortened, shown
from ._held import resolve, saved
from ._held.by_name import ReadByName
from ._held.held import HeldParameters, Model
from ._held.parameter import FrozenParameter
from ._held.parameters import FrozenParameters
from ._held.remaining import remaining_by_name
from ._held.stacked import misread_stacks
from ._held.trained import trained_alone
from ._held.violation import Violation
from ._hooks.attachment import Attachment
from ._hooks.earlier import EarlierHandles, copies_in, leave_released, reset_guards
from ._hooks.hook_set import hook_sets_on
from ._hooks.skipped import skip_gradients_of, skipped_on
from ._hooks.untrained import Untrained, untrained_on
from ._optim.compact import check_elementwise, check_spread
from ._optim.guard import Guard
from ._optim.guardable import guardable
from ._optim.state import stepped_by
from ._optim.step import StepHooks, step_hooks_on
from ._report.late import freed_too_late
from ._report.status import Mechanisms, check_complete, find_mechanisms
from ._report.table import Report, aligned, report_parameter
from ._report.trainable import Trainable, count_trainable
from ._report.untrained import nothing_trains, whole_unions
from ._rules.rule import Rule
from ._rules.spec import Spec, rules_of

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure
    from typing_extensions import Self


def freeze_entries(
    model: Model,
    spec: Spec,
    *,
    state: dict[str, Any] | None = None,
    replace: bool = False,
    skip_gradients: bool = False,
) -> FrozenEntries:
    """Hold some entries of a model's parameters at their values while the rest trains.

    From now on the gradient at a frozen entry is exactly +0.0 when `backward()` returns, and the values are imposed
    before every forward and around saving and loading. Momentum and weight decay, among others, move weights even if
    their gradient is zero: guard the optimizer too, with `MaskedOptimizer` or `FrozenEntries.guard`.

    Args:
        model: A module; or, to optimize bare tensors, a mapping from name to leaf tensor (there is no forward to hook
            then, so only gradients and steps are guarded).
        spec: A rule as text (several lines are several rules), a `Rule`, a mapping ``{target: region}`` or
            ``{target: (region, value)}``, or an iterable of those. An empty spec is valid and freezes nothing.
        state: What `FrozenEntries.state_dict` returned in an earlier run under the same rules. Regions that depend on
            what parameters contain (`zeros`, `smallest`, `nm`) and kept values are then read from it.
        replace: Whether to thaw the parameters that `spec` names in all earlier handles. Those handles keep their
            other parameters, and the optimizers that they guard are guarded by this handle too. Left out: several
            handles hold side by side, with a warning if they hold the same entries.
        skip_gradients: Whether an `nn.Linear` skips the gradient of rows that are frozen entirely, and of those
            entries of its bias, which makes training up to a third cheaper. Gradients of its free rows may differ by
            rounding errors, since smaller matrices are multiplied; those of frozen rows are +0.0 as usual. Other
            modules and compiled code compute as usual.

    Returns:
        The handle, which reads like a dict from parameter name to what is frozen there.

    Raises:
        FreezeError: One of its subclasses, each also the builtin that fits it. Nothing is installed or changed then,
            and earlier handles hold what they held.

    Example:
        >>> import torch
        >>> from freezehooks import freeze_entries
        >>> conv = torch.nn.Conv2d(2, 3, kernel_size=3)
        >>> frozen = freeze_entries(conv, "weight[center] = 0")
        >>> conv(torch.ones(1, 2, 5, 5)).sum().backward()
        >>> conv.weight.grad[:, :, 1, 1].abs().max().item()
        0.0
        >>> print(frozen)
        parameter  shape         rules               frozen  free
        weight     (3, 2, 3, 3)  weight[center] = 0       6    48
    """
    _check_model(model, "freeze_entries")
    held = resolve.resolve(model, rules_of(spec), state)
    if skip_gradients:
        skip_gradients_of(held)
    frozen = FrozenEntries(held)
    _hold(frozen, replace=replace)
    return frozen


def train_only(
    model: Model, spec: Spec, *, state: dict[str, Any] | None = None, skip_gradients: bool = False
) -> FrozenEntries:
    """Train some entries of a model's parameters, or whole parameters, and nothing else.

    It is the complement of `freeze_entries`: what `spec` names trains. All other entries of the same parameters keep
    what they hold, and every parameter that is not named requires no gradient, until `FrozenEntries.remove`. Guard the
    optimizer, as with `freeze_entries`. Buffers, such as the running statistics of BatchNorm, are not affected.

    Args:
        model: A module, or a mapping from name to leaf tensor.
        spec: What trains, as rules without values: ``wte[50257:]``, or just a name for a whole parameter. Several
            rules on one parameter form a union.
        state: What `FrozenEntries.state_dict` returned in an earlier run under the same `spec`.
        skip_gradients: As for `freeze_entries`.

    Returns:
        The handle. Its rules are for the entries that do not train: ``wte.weight[~50257:] = keep``.

    Raises:
        SpecError: `spec` names nothing, gives a value, or names a parameter that requires no gradient. Nothing is
            changed then.
        FreezeError: As for `freeze_entries`.

    Example:
        >>> import torch
        >>> from freezehooks import train_only
        >>> model = torch.nn.Sequential(torch.nn.Embedding(5, 2), torch.nn.Linear(2, 5))
        >>> frozen = train_only(model, "0[3:]")
        >>> print(frozen)
        parameter  shape   rules                 frozen  free
        0.weight   (5, 2)  0.weight[~3:] = keep       6     4
        2 other parameters do not train
        >>> print(frozen.trainable())
        trainable entries: 4 of 25 (16 %)
        >>> frozen.remove()
        >>> model[1].weight.requires_grad
        True
    """
    _check_model(model, "train_only")
    trained = trained_alone(model, rules_of(spec), state)
    held = resolve.resolve(model, trained.rules, state)
    if skip_gradients:
        skip_gradients_of(held)
    frozen = FrozenEntries(held, Untrained.beside(model, held.frozen, trained.parameters))
    _hold(frozen)
    return frozen


def _check_model(model: Any, caller: str) -> None:
    if not isinstance(model, nn.Module | Mapping) or isinstance(model, torch.jit.ScriptModule):
        raise SpecError(
            f"`model` must be a module or a mapping from name to tensor, found {type(model).__name__}",
            f"call {caller}(model, spec), before a model is scripted",
        )


def _hold(frozen: FrozenEntries, *, replace: bool = False) -> None:
    """Attach a new handle, beside earlier handles or replacing what they hold in the same parameters."""
    earlier = EarlierHandles(frozen._held)
    frozen._check_start()
    if replace:
        frozen._prepare_guards(earlier.guarded())
    else:
        earlier.check()
    repetitions = () if replace else earlier.repetitions()
    for doubt in [*misread_stacks(frozen._held), *whole_unions(frozen._held), *repetitions]:
        warnings.warn(doubt, stacklevel=3)
    if replace:
        earlier.thaw()
    frozen._begin()
    for doubt in nothing_trains(frozen.model):
        warnings.warn(doubt, stacklevel=3)


class FrozenEntries(ReadByName):
    """The handle on the frozen entries of a model. Made by `freeze_entries`.

    It reads like a dict from name to `FrozenParameter`. A parameter that modules share is listed under its first name
    and found under any of them. It prints as a table. As a context manager it removes itself at the end of the block.

    Example:
        >>> import torch
        >>> from freezehooks import freeze_entries
        >>> layer = torch.nn.Linear(3, 2)
        >>> with freeze_entries(layer, "weight[0] = 1") as frozen:
        ...     frozen["weight"].frozen
        tensor([[ True,  True,  True],
                [False, False, False]])
        >>> frozen.attached
        False
    """

    def __init__(self, held: HeldParameters, untrained: Untrained | None = None) -> None:
        if not isinstance(held, HeldParameters):
            raise SpecError(
                f"a handle is not made by hand, found {type(held).__name__}",
                "call freeze_entries(model, spec), or FrozenEntries.of(model) for a copied model",
            )
        self._held = held
        self._hooks = Attachment(held)
        self._untrained = untrained or Untrained(held.frozen)
        self._guards: list[Guard] = []
        self._attached = False

    @classmethod
    def of(cls, model: nn.Module) -> tuple[FrozenEntries, ...]:
        """Return the handles on the frozen entries of a model, in the order of its modules.

        A copied or unpickled model has its frozen entries but no handle: this makes one. It shows the names that
        parameters have in `model`, and also accepts those in the model that was frozen.

        Raises:
            SpecError: `model` is not a module.
        """
        if not isinstance(model, nn.Module):
            raise SpecError(
                f"`model` must be a module, found {type(model).__name__}",
                "for bare tensors, keep the handle that freeze_entries returned",
            )
        found: dict[int, FrozenEntries] = {}
        for module in model.modules():
            for hooks in hook_sets_on(module):
                if any(map(hooks.frozen.is_held, hooks.names.values())):
                    cls._found(found, model, hooks.frozen)._hooks.add_copied(module, hooks)
            for hook in untrained_on(module):
                cls._found(found, model, hook.frozen)._untrained.add(module, hook.keys)
        for handle in found.values():
            handle._held.show_names_of_model()
        return tuple(found.values())

    @classmethod
    def _found(cls, known: dict[int, FrozenEntries], model: nn.Module, frozen: FrozenParameters) -> FrozenEntries:
        """Return the handle for frozen parameters that were found in a model, making it the first time."""
        if id(frozen) not in known:
            known[id(frozen)] = cls(HeldParameters(model, frozen, is_found=True))
            known[id(frozen)]._attached = True
        return known[id(frozen)]

    # Contents

    def __getitem__(self, name: str) -> FrozenParameter:
        if not isinstance(name, str):
            raise TargetError(f"a parameter's name is text, found {shown(name)}", "give one of frozen.keys()")
        frozen = self._held.find(name)
        if self.attached:
            frozen = frozen.beside(EarlierHandles(self._held).beside(frozen))
        return self._held.as_shown(frozen)

    def _counted(self) -> list[FrozenParameter]:
        """Return the frozen parameters, with free entries counted over all handles."""
        earlier = EarlierHandles(self._held)
        found = [each.beside(earlier.beside(each)) if self.attached else each for each in self._held.parameters]
        return list(map(self._held.as_shown, found))

    def __iter__(self) -> Iterator[str]:
        return (self._held.as_shown(frozen).name for frozen in self._held.parameters)

    def __len__(self) -> int:
        return len(self._held.names)

    def __repr__(self) -> str:
        rows = [("parameter", "shape", "rules", "frozen", "free")]
        for frozen in self._counted():
            rules = ", ".join(map(shortened, frozen.rules))
            counts = f"{frozen.frozen_count:,}", f"{frozen.free_count:,}"
            rows.append((frozen.name, str(tuple(frozen.shape)), rules, *counts))
        table = aligned(rows, right=(3, 4)) if len(self) else ""
        lines = [table, self._note_on_others(), self._note_on_gradients(), self._held.removal, *self._held.skips]
        return "\n".join(filter(None, lines)) or "nothing is frozen"

    def _note_on_others(self) -> str:
        count = self._untrained.count if self.attached else 0
        return f"{counted(count, 'other parameter does', 'other parameters do')} not train" if count else ""

    def _note_on_gradients(self) -> str:
        names = skipped_on(self._held) if self.attached else []
        return f"no gradient is computed for frozen rows of {', '.join(names)}" if names else ""

    @property
    def model(self) -> Model:
        """The model, or the mapping of bare tensors, whose entries are frozen."""
        return self._held.model

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules in force, each once."""
        return tuple(dict.fromkeys(rule for frozen in self._held.parameters for rule in frozen.rules))

    @property
    def frozen_count(self) -> int:
        """How many entries are frozen, over all parameters."""
        return sum(frozen.frozen_count for frozen in self._held.parameters)

    @property
    def nbytes(self) -> int:
        """The memory that regions and values take, in bytes, over all parameters; slices held at a number take none."""
        return sum(frozen.nbytes for frozen in self._held.parameters)

    @property
    def attached(self) -> bool:
        """Whether the entries are held now."""
        sites = list(self._held.known_sites())
        if not sites:
            return self._attached and not self._held.sites  # otherwise another handle has thawed all of it
        return all(self._hooks.is_on(*each) for each in sites)

    @property
    def _holds_any(self) -> bool:
        return any(self._held.held_sites()) if len(self) else self._attached

    # Holding

    def held(self) -> Iterator[tuple[FrozenParameter, Tensor]]:
        """Yield each frozen parameter with each tensor that it has now."""
        return ((self._held.as_shown(frozen), parameter) for frozen, parameter in self._held)

    def impose(self) -> None:
        """Write the values into the frozen entries now."""
        self._hooks.follow_rebuilt()
        for frozen, parameter in self._held:
            frozen.impose(parameter)

    def violations(self) -> tuple[Violation, ...]:
        """Return a violation for each parameter whose frozen entries drifted, with their number and the worst of them.

        Raises:
            ParameterChangedError: A parameter is gone, has another shape, is on the meta device, or is in a module that
                was replaced.
        """
        self._hooks.follow_rebuilt()
        return self._held.violations()

    def assert_frozen(self, *, guarded: bool = True) -> None:
        """Check that every frozen entry equals its value bit for bit, and that everything that holds it is in place.

        Args:
            guarded: Whether each parameter that requires a gradient must be stepped by a guarded optimizer. Pass False
                before there is one, or if no optimizer steps the parameter.

        Raises:
            DriftError: Some entries do not equal their value; the message names them.
            UnguardedError: All of them do, but a hook is missing, no optimizer is guarded, the handle was removed, or a
                parameter that `train_only` did not name requires a gradient again.
            ParameterChangedError: A parameter is gone, has another shape, is on the meta device, or is in a module that
                was replaced.
        """
        violations = self.violations()
        if violations:
            raise DriftError(
                ", so ".join(filter(None, [self._held.removal, "frozen entries drifted: "]))
                + ", ".join(map(str, violations)),
                "guard every optimizer that steps them (MaskedOptimizer or frozen.guard), or call frozen.impose()",
            )
        check_complete(self._mechanisms(), guarded=guarded, removal=self._held.removal)
        self._untrained.check(self.model)

    def report(self) -> Report:
        """Report on each parameter: rules, values, drift, hooks, guarded optimizers, and bytes.

        For a sharded parameter, values and drift are those of this rank's shard.

        Raises:
            ParameterChangedError: A parameter is gone, has another shape, is on the meta device, or is in a module that
                was replaced.

        Example:
            >>> import torch
            >>> from freezehooks import freeze_entries
            >>> layer = torch.nn.Linear(3, 2)
            >>> frozen = freeze_entries(layer, "weight[0] = 1")
            >>> frozen.report().parts["weight"].missing
            ('a guarded optimizer',)
            >>> optimizer = torch.optim.SGD(layer.parameters())
            >>> guard = frozen.guard(optimizer)
            >>> frozen.report().holds
            True
        """
        violations: dict[str, list[Violation]] = {}
        for violation in self.violations():
            violations.setdefault(violation.name, []).append(violation)
        mechanisms = self._mechanisms()
        parts = {
            each.name: report_parameter(each, violations.get(each.name, ()), mechanisms[each.name])
            for each in self._counted()
        }
        return Report(parts, self._held.removal, tuple(self._held.skips))

    def _mechanisms(self) -> dict[str, Mechanisms]:
        found = find_mechanisms(self._held, self._hooks.by_module)
        return {self._held.as_shown(frozen).name: found[frozen.name] for frozen in self._held.parameters}

    def trainable(self) -> Trainable:
        """Count the entries of the model that train, out of all.

        Entries that other handles freeze do not train either. Tied copies count one by one.

        Example:
            >>> import torch
            >>> from freezehooks import freeze_entries
            >>> frozen = freeze_entries(torch.nn.Linear(3, 2), "weight[0] = 1")
            >>> print(frozen.trainable())
            trainable entries: 5 of 8 (62.5 %)
        """
        held = [
            (self._held.frozen.by_name[name], site.tensor())
            for name, site in self._held.held_sites()
            if self._hooks.is_on(name, site)
        ]
        return count_trainable(self._held.model, held)

    def plot(self, name: str, path: str | Path | None = None) -> Figure:
        """Draw a parameter, kernel by kernel or as a matrix, with a mark on every frozen entry.

        The kernels of a convolution are drawn with output channels across and input channels down, on one color scale
        that is symmetric around 0; if there are many channels, an evenly spaced selection is drawn. A large matrix is
        drawn in cells, each showing the entry of largest magnitude of a block, beside a panel that shows the frozen
        share of each block in gray. For a sharded parameter, this rank's shard is drawn. Notes below the picture
        explain it.

        It needs matplotlib (``pip install 'freezehooks[plot]'``) and does not touch pyplot's state. Notebooks show it.

        Args:
            name: The parameter's qualified name.
            path: Where to write the picture; its suffix gives the format, such as ``.png``, ``.pdf`` or ``.svg``. A
                missing folder is created. Left out: nothing is written.

        Returns:
            The figure.

        Raises:
            TargetError: No entry of the parameter is frozen.
            SpecError: The suffix of `path` names no format.
            UnsupportedParameterError: The parameter is on the meta device.
            ParameterChangedError: The parameter is gone, or has another shape.
            ModuleNotFoundError: matplotlib is not installed.

        Example:
            >>> import torch
            >>> from freezehooks import freeze_entries
            >>> frozen = freeze_entries(torch.nn.Conv2d(2, 3, kernel_size=3), "weight[center] = 0")
            >>> figure = frozen.plot("weight")
            >>> figure.get_suptitle().splitlines()[-1]
            '6 of 54 entries frozen, 48 free'
        """
        from ._report.plot import plot_parameter

        frozen, key = self[name], self._held.find(name).name
        site = next(site for owned, site in self._held.sites if owned == key)
        pair = self._held.frozen.adopt(key, site.tensor())
        return plot_parameter(frozen, site.tensor() if pair is None else pair[1], path, owner=site.owner)

    def guard(self, optimizer: Optimizer, *, compact: bool = False) -> Guard:
        """Hold the entries through every step of an optimizer, by the optimizer's own step hooks.

        Guarding an optimizer again has no further effect. An optimizer that contains another one, as SAM and Lookahead
        do, is guarded together with it. A wrapper without step hooks of its own is guarded by those of the optimizer
        that it wraps: what it writes after the inner step is corrected by the next forward, or immediately if a
        `MaskedOptimizer` is around it. Moments at frozen entries become 0. If none of the frozen parameters requires a
        gradient, there is nothing to guard, and the optimizer need not step any of them.

        Args:
            optimizer: Any optimizer that steps at least one of the frozen parameters.
            compact: Whether the optimizer holds and steps only the free entries; see `MaskedOptimizer`. It applies to
                all handles that guard the optimizer.

        Returns:
            The guard; its `remove()` removes the hooks.

        Raises:
            OptimizerMismatchError: The optimizer steps none of the frozen parameters.
            UnsupportedOptimizerError: It is not elementwise, so that it cannot be compact.
            SpecError: `optimizer` is not an optimizer, or has no step hooks.
            UnguardedError: Its step was replaced by one that calls no hooks.
        """
        return self.guard_unchecked(self.check_optimizer(optimizer, compact=compact), compact=compact)

    def guard_unchecked(self, optimizers: Sequence[Optimizer], *, compact: bool) -> Guard:
        """Guard some optimizers, the outermost first, without checking that they step frozen parameters."""
        guards = [self._guard_of(each) for each in optimizers]
        for guard in guards:
            if self.attached:
                guard.install(compact=compact)
            guard.ask(compact=compact)
            if guard not in self._guards:
                self._guards.append(guard)
        guards[0].inside = guards[1:]
        return guards[0]

    def _guard_of(self, optimizer: Optimizer) -> Guard:
        self._guards = [guard for guard in self._guards if not guard.is_over]
        for guard in self._guards:
            if guard.optimizer is optimizer:
                return guard
        return Guard(step_hooks_on(optimizer) or StepHooks(optimizer), self._held)

    def check_optimizer(self, optimizer: Optimizer, *, compact: bool = False) -> list[Optimizer]:
        """Check that an optimizer can be guarded, and that it steps at least one of the frozen parameters.

        Returns:
            The optimizers whose hooks are to hold the entries: itself, those inside it, or both.

        Raises:
            OptimizerMismatchError: It steps none although some require a gradient, or it steps copies of them.
            UnsupportedOptimizerError: It is not elementwise, so that it cannot be compact.
            SpecError: It is not an optimizer, or has no step hooks.
            UnguardedError: Its step was replaced by one that calls no hooks.
        """
        found = guardable(optimizer)
        self._hooks.follow_rebuilt()
        self._held.check_in_place()
        held = {id(parameter) for _, parameter in self._held}
        stepping = [each for each in found if held & stepped_by(each)]
        if not stepping:
            self._check_none_stepped(optimizer, found)
            stepping = found[:1]
        for each in stepping if compact else ():
            check_elementwise(each)
            check_spread(each, self._held)
        return stepping

    def _check_none_stepped(self, optimizer: Optimizer, found: Iterable[Optimizer]) -> None:
        """Reject an optimizer that steps none of the frozen parameters, unless none of them requires a gradient.

        Raises:
            OptimizerMismatchError: Some of them require a gradient; or none does because a copy trains instead, as with
                PEFT's `modules_to_save`, which is not in this handle.
        """
        names = self._held.parameter_names
        fact = f"`{type(optimizer).__name__}` steps none of the frozen parameters ({', '.join(names)})"
        if any(parameter.requires_grad for _, parameter in self._held):
            raise OptimizerMismatchError(
                fact, "build it from the parameters of the model that was frozen, after moving or copying that model"
            )
        stepped = {number for each in found for number in stepped_by(each)}
        if not self._held.is_found and not stepped.isdisjoint(map(id, copies_in(self._held))):
            raise OptimizerMismatchError(
                f"{fact}, but copies of them that the model now has instead",
                "guard those: MaskedOptimizer(optimizer, FrozenEntries.of(model))",
            )

    # Attaching and removing

    def attach(self) -> Self:
        """Hold the entries again, at the values at which they were frozen; do nothing if they are held already.

        Raises:
            RuleConflictError: Another handle holds some of the entries at other values; nothing is changed then.
            ParameterChangedError: A parameter is gone or has another shape; nothing is changed then.
        """
        if not self.attached:
            self._check_start()
            EarlierHandles(self._held).check()
            self._begin()
        return self

    def _check_start(self) -> None:
        self._held.check_in_place()
        for frozen, parameter in self._held:
            frozen.check_start(parameter)

    def _prepare_guards(self, optimizers: Iterable[tuple[Optimizer, bool]]) -> None:
        """Prepare to guard optimizers, each with a bool for compact mode, once the handle is attached.

        Raises:
            FreezeError: One of them cannot be guarded by this handle.
        """
        for optimizer, compact in optimizers:
            with suppress(OptimizerMismatchError):  # it steps other parameters only
                self.guard_unchecked(self.check_optimizer(optimizer, compact=compact), compact=compact)

    def _begin(self) -> None:
        self._held.frozen.hold(self._held.names)
        self._untrained.begin()
        for frozen, parameter in self._held:
            frozen.begin(parameter)
            frozen.complete_gradient(parameter)
            frozen.zero_gradient(parameter)
        self._hooks.install()
        for guard in self._guards:
            guard.install()
        self._attached = True

    def remove(self) -> None:
        """Thaw all entries: remove every hook from modules, parameters and guarded optimizers.

        From now on the entries train as if they had never moved (their moments are 0), and parameters that
        `train_only` kept from training require a gradient again. `attach` holds everything again.
        """
        if not self._holds_any:
            return
        reset_guards(self._held.frozen)
        self._held.frozen.release(self._held.names)
        for guard in self._guards:
            guard.suspend()
        leave_released(self._held.frozen)  # in guards of another handle object for the same frozen parameters
        self._hooks.remove()
        self._untrained.end()
        self._attached = False

    def _unguard(self) -> None:
        """Stop guarding every optimizer, when training is over and thawed entries need no correction by step hooks."""
        reset_guards(self._held.frozen)
        for guard in self._guards:
            guard.remove()
        self._guards = []

    def thaw(self, target: str | Rule) -> None:
        """Thaw entries of some parameters, all of them or those in a region, and go on holding the others.

        The rules are updated to what is still held, such as ``wte[~50257: & ~:100] = keep``. A state that is saved
        afterwards loads in a run that thawed the same, or that was frozen by those rules.

        Args:
            target: A parameter's name as in rules, with ``*`` and ``?``; a module's name stands for its weight. With a
                region, as in ``wte[:100]``, only the entries in it are thawed. A `Rule` may have a mask or a function
                as its region.

        Raises:
            TargetError: None of the entries is frozen.
            RuleSyntaxError: The text is not a rule.
            RegionError: The region does not fit the parameter.
            RuleConflictError: The parameter is tied, and one copy would be free while another is frozen.
            SpecError: It is neither text nor a rule, or has a value.

        Example:
            >>> import torch
            >>> from freezehooks import freeze_entries
            >>> frozen = freeze_entries(torch.nn.Linear(3, 4), "weight = 0")
            >>> frozen.thaw("weight[2:]")
            >>> print(frozen)
            parameter  shape   rules            frozen  free
            weight     (4, 3)  weight[~2:] = 0       6     6
        """
        left = remaining_by_name(self._held, target, untrained=self._untrained.names_in(self.model))
        gone = {name for name, frozen in left.items() if frozen is None}
        if self._holds_any:
            reset_guards(self._held.frozen)
        self._hooks.release(gone)
        self._held.frozen.thaw(gone)
        self._held.frozen.replace({name: frozen for name, frozen in left.items() if frozen is not None})
        self._held.sites = [(name, site) for name, site in self._held.sites if name not in gone]
        if not len(self) and not self._untrained:
            self.remove()

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    # Saving

    def state_dict(self) -> dict[str, Any]:
        """Return rules, regions and values as plain tensors and builtins, which load with `weights_only=True`."""
        return saved.save(self._held.parameters, self._untrained.names_in(self.model))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore regions and kept values from a saved state, and impose the values.

        Load it before the weights and the optimizer's state that were saved with it. If regions depend on what
        parameters contain, other entries may be frozen until then, and what is loaded into these is lost, with a
        warning.

        Args:
            state: What `state_dict` returned, under the same rules.

        Raises:
            StateMismatchError: It was saved under other rules or for another model; nothing is changed then.
            RuleConflictError: Another handle holds some of its entries at other values; nothing is changed then.
        """
        loaded = resolve.read(self._held, state)
        if self.attached:
            EarlierHandles(self._held).check(loaded)
        if any(guard.hooks.is_just_loaded for guard in self._guards):
            for doubt in freed_too_late(self._held.frozen.by_name, loaded):
                warnings.warn(doubt, stacklevel=2)
        self._held.frozen.replace(loaded)
        if self.attached:
            for frozen, parameter in self._held:
                frozen.impose(parameter)
                frozen.zero_gradient(parameter)
            reset_guards(self._held.frozen)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_guards": []}  # guards are not copied; a copied MaskedOptimizer makes new ones

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._hooks.renew()
