"""Freeze entries of a model, and the handle that answers for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ._errors import DriftError, OptimizerMismatchError, ParameterChangedError, SpecError
from ._held import resolve, saved
from ._held.held import HeldParameters, Model
from ._held.names import matching, matching_unwrapped
from ._held.parameter import FrozenParameter
from ._held.site import Site
from ._held.violation import Violation
from ._hooks.forward import install_outer, remove_outer
from ._hooks.gradient import unwatch_gradient, watch_gradient, watching
from ._hooks.hook_set import HookSet, held_on, hook_set_of, hook_sets_on, uncalled_owners
from ._optim.compact import check_elementwise, check_whole
from ._optim.guard import Guard
from ._optim.guardable import guardable
from ._optim.state import stepped_by
from ._optim.step import StepHooks, step_hooks_on
from ._report.status import check_complete, find_mechanisms
from ._report.table import Report, aligned, report_parameter
from ._report.trainable import Trainable, count_trainable
from ._rules.rule import Rule
from ._rules.spec import Spec, rules_of

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure
    from typing_extensions import Self


def freeze_entries(model: Model, spec: Spec, *, state: dict[str, Any] | None = None) -> FrozenEntries:
    """Hold some entries of a model's parameters at their values while the rest trains.

    From here on the gradient at a frozen entry is exactly +0.0 when `backward()` returns, and the values are imposed
    before every forward and around saving and loading. Momentum, weight decay and their like move weights whose
    gradient is zero: guard the optimizer too, with `MaskedOptimizer` or `FrozenEntries.guard`.

    Args:
        model: A module; or, for those who optimize bare tensors, a mapping from name to leaf tensor (there is no
            forward to hook then, so gradients and steps alone are guarded).
        spec: A rule as text (several lines are several rules), a `Rule`, a mapping ``{target: region}`` or
            ``{target: (region, value)}``, or an iterable of those. An empty spec is legal and freezes nothing.
        state: What `FrozenEntries.state_dict` returned in an earlier run under the same rules. Regions chosen by
            numbers (`zeros`, `smallest`, `nm`) and kept values are then taken from it rather than chosen anew.

    Returns:
        The handle: a mapping from parameter name to what is frozen there.

    Raises:
        FreezeError: One of its subclasses, each also the fitting builtin; nothing is installed or changed then.

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
    if not isinstance(model, nn.Module | Mapping) or isinstance(model, torch.jit.ScriptModule):
        raise SpecError(
            f"`model` must be a module or a mapping from name to tensor, found {type(model).__name__}",
            "call freeze_entries(model, spec), before a model is scripted",
        )
    return FrozenEntries(resolve.resolve(model, rules_of(spec), state)).attach()


class FrozenEntries(Mapping[str, FrozenParameter]):
    """What is frozen of a model: a mapping from parameter name to `FrozenParameter`. Made by `freeze_entries`.

    A tied parameter stands under its first name and is found under any. Printing shows a table. As a context manager
    it removes itself at the end of the block.

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

    def __init__(self, held: HeldParameters) -> None:
        self._held = held
        self._guards: list[Guard] = []
        self._attached = False

    @classmethod
    def of(cls, model: nn.Module) -> tuple[FrozenEntries, ...]:
        """Return handles of what is frozen in a model, in the order of its modules.

        A copied or unpickled model takes its frozen entries along but no handle: this makes one. The names in it are
        those of the model that was frozen.
        """
        found: dict[int, FrozenEntries] = {}
        for module in model.modules():
            for hooks in hook_sets_on(module):
                if id(hooks.frozen) not in found:
                    found[id(hooks.frozen)] = cls(HeldParameters(model, hooks.frozen, is_found=True))
                found[id(hooks.frozen)]._take_over(module, hooks)
        return tuple(found.values())

    def _take_over(self, module: nn.Module, hooks: HookSet) -> None:
        self._attached = True
        for place in hooks.places(module):
            self._held.sites.append((place.name, place.site))
            pair = place.pair()
            if pair is not None:
                watch_gradient(pair[1], hooks.frozen, place.name)

    # A mapping

    def __getitem__(self, name: str) -> FrozenParameter:
        return self._held.frozen.find(name, self._held.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._held.names)

    def __len__(self) -> int:
        return len(self._held.names)

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        rows = [("parameter", "shape", "rules", "frozen", "free")]
        for frozen in self.values():
            rules, counts = ", ".join(map(str, frozen.rules)), (f"{frozen.frozen_count:,}", f"{frozen.free_count:,}")
            rows.append((frozen.name, str(tuple(frozen.shape)), rules, *counts))
        return aligned(rows, right=(3, 4)) if len(self) else "nothing is frozen"

    @property
    def model(self) -> Model:
        """The model, or the mapping of bare tensors, whose entries are frozen."""
        return self._held.model

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules in force, each once."""
        return tuple(dict.fromkeys(rule for frozen in self.values() for rule in frozen.rules))

    @property
    def frozen_count(self) -> int:
        """How many entries are frozen, over all parameters."""
        return sum(frozen.frozen_count for frozen in self.values())

    @property
    def nbytes(self) -> int:
        """The memory that regions and values take, in bytes, over all parameters: none for slices at a number."""
        return sum(frozen.nbytes for frozen in self.values())

    @property
    def attached(self) -> bool:
        """Whether the entries are held now."""
        sites = list(self._held.known_sites())
        return all(self._is_held_at(*each) for each in sites) if sites else self._attached

    def _is_held_at(self, name: str, site: Site) -> bool:
        """Return whether one place is held: another handle of the same parameters may hold it, or let it go."""
        if isinstance(site.owner, nn.Module):
            hooks = hook_set_of(self._held.frozen, site.owner)
            if hooks is None or hooks.names.get(site.key) != name:
                return False
        return self._held.frozen.is_held(name)

    @property
    def _holds_any(self) -> bool:
        return any(self._held.held_sites()) if len(self) else self._attached

    @property
    def _modules(self) -> dict[nn.Module, HookSet]:
        """The hooks that hold what was frozen, whoever has put them on, by their modules."""
        owners = dict.fromkeys(site.owner for _, site in self._held.sites if isinstance(site.owner, nn.Module))
        found = {owner: hook_set_of(self._held.frozen, owner) for owner in owners}
        return {owner: hooks for owner, hooks in found.items() if hooks is not None}

    # Holding

    def held(self) -> Iterator[tuple[FrozenParameter, Tensor]]:
        """Pair what is frozen of each parameter with each tensor that it holds now."""
        return iter(self._held)

    def impose(self) -> None:
        """Write the values into the frozen entries now."""
        for frozen, parameter in self._held:
            frozen.impose(parameter)

    def violations(self) -> tuple[Violation, ...]:
        """Return, for each parameter where frozen entries drifted, how many and the worst of them.

        Raises:
            ParameterChangedError: A parameter is gone, has another shape or no numbers (on the meta device), or lies in
                a module that was replaced.
        """
        return self._held.violations()

    def assert_frozen(self, *, guarded: bool = True) -> None:
        """Check that every frozen entry equals its value bit for bit, and that everything that holds it is in place.

        Args:
            guarded: Whether some guarded optimizer must step each parameter that requires a gradient. Give False
                before there is one, or where no optimizer steps the parameter.

        Raises:
            DriftError: Some entries do not; the message names them.
            UnguardedError: All do, but a hook is no longer there, or no optimizer is guarded.
            ParameterChangedError: A parameter is gone, has another shape or no numbers (on the meta device), or lies in
                a module that was replaced.
        """
        violations = self.violations()
        if violations:
            raise DriftError(
                "frozen entries drifted: " + ", ".join(map(str, violations)),
                "guard every optimizer that steps them (MaskedOptimizer or frozen.guard), or call frozen.impose()",
            )
        check_complete(find_mechanisms(self._held, self._modules), guarded=guarded)

    def report(self) -> Report:
        """Look at what is frozen and by what means: values, drift, hooks, guarded optimizers, bytes.

        Of a parameter that is spread over ranks, values and drift are of this rank's shard.

        Raises:
            ParameterChangedError: A parameter is gone, has another shape or no numbers (on the meta device), or lies in
                a module that was replaced.

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
        mechanisms = find_mechanisms(self._held, self._modules)
        return Report(
            {
                name: report_parameter(frozen, violations.get(name, ()), mechanisms[name])
                for name, frozen in self.items()
            }
        )

    def trainable(self) -> Trainable:
        """Count the entries of the model that train, as they are reported: in number and in percent.

        Frozen entries of other handles do not train either. Copies that are tied count each.

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
            if self._is_held_at(name, site)
        ]
        return count_trainable(self._held.model, held)

    def plot(self, name: str, path: str | Path | None = None) -> Figure:
        """Draw a parameter, kernel by kernel or as a matrix, with a mark on every frozen entry.

        A convolution's kernels stand with output channels across and input channels down, on one color scale that is
        symmetric around 0; of many channels some are drawn, evenly spaced. A large matrix is drawn in cells, each the
        entry of largest magnitude of a block, beside a panel that says in gray how much of the block is frozen.
        Sharded parameters show this rank's shard. The picture says all of that itself.

        It needs matplotlib (``pip install 'freezehooks[plot]'``) and leaves pyplot's state alone. Notebooks show it.

        Args:
            name: The parameter's qualified name.
            path: Where to write the picture; its suffix says the format, as ``.png``, ``.pdf`` or ``.svg``. A folder
                that is missing is made. Left out: nothing is written.

        Returns:
            The figure.

        Raises:
            TargetError: Nothing of the parameter is frozen.
            SpecError: The suffix of `path` names no format.
            UnsupportedParameterError: The parameter is on the meta device.
            ParameterChangedError: It is gone, or has another shape.
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

        frozen = self[name]
        site = next(site for owned, site in self._held.sites if owned == frozen.name)
        pair = self._held.frozen.adopt(frozen.name, site.tensor())
        return plot_parameter(frozen, site.tensor() if pair is None else pair[1], path, owner=site.owner)

    def guard(self, optimizer: Optimizer, *, compact: bool = False) -> Guard:
        """Hold the entries through every step of an optimizer, by the optimizer's own step hooks.

        Guarding an optimizer twice is guarding it once; one that holds another optimizer, as SAM and Lookahead do, is
        guarded together with it. A wrapper without step hooks of its own is guarded by those of what it wraps: what it
        writes after the step inside is put right by the next forward, or by a `MaskedOptimizer` around it at once.
        Moments at frozen entries become 0.

        Args:
            optimizer: Any optimizer that steps at least one of the frozen parameters.
            compact: Whether the optimizer holds and steps the free entries alone, as `MaskedOptimizer` says; once
                for all handles that guard it.

        Returns:
            The guard, whose `remove()` takes the hooks off again.

        Raises:
            OptimizerMismatchError: The optimizer steps none of the frozen parameters.
            UnsupportedOptimizerError: It does not work entry by entry, so that it cannot be compact.
            SpecError: `optimizer` is no optimizer, or has no step hooks.
            UnguardedError: Its step was replaced by one that calls no hooks.
        """
        return self.guard_unchecked(self.check_optimizer(optimizer, compact=compact), compact=compact)

    def guard_unchecked(self, optimizers: Sequence[Optimizer], *, compact: bool) -> Guard:
        """Guard some optimizers, the outermost first, whether or not they step frozen parameters already."""
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
            OptimizerMismatchError: It steps none.
            UnsupportedOptimizerError: It is to be compact, and does not work entry by entry.
            SpecError: It is no optimizer, or has no step hooks.
            UnguardedError: Its step was replaced by one that calls no hooks.
        """
        found = guardable(optimizer)
        self._held.check_in_place()
        held = {id(parameter) for _, parameter in self._held}
        stepping = [each for each in found if held & stepped_by(each)] if len(self) else found[:1]
        if not stepping:
            raise OptimizerMismatchError(
                f"`{type(optimizer).__name__}` steps none of the frozen parameters ({', '.join(self)})",
                "build it from the parameters of the model that was frozen, after moving or copying that model",
            )
        for each in stepping if compact else ():
            check_elementwise(each)
            check_whole(self._held)
        return stepping

    # Coming and going

    def attach(self) -> Self:
        """Hold the entries, again at the values they were frozen at; do nothing where they are held already.

        Raises:
            RuleConflictError: Another handle holds some of the entries at other values; nothing is changed then.
            ParameterChangedError: A parameter is gone or has another shape; nothing is changed then.
        """
        if self.attached:
            return self
        self._check_attachable()
        frozen_parameters = self._held.frozen
        frozen_parameters.hold(self)
        for frozen, parameter in self._held:
            frozen.begin(parameter)
            frozen.complete_gradient(parameter)
            frozen.zero_gradient(parameter)
            watch_gradient(parameter, frozen_parameters, frozen.name)
        self._install_module_hooks()
        for guard in self._guards:
            guard.install()
        self._attached = True
        return self

    def _check_attachable(self) -> None:
        self._held.check_in_place()
        for frozen, parameter in self._held:
            frozen.check_start(parameter)
        self._check_beside_others(self._held.frozen.by_name)

    def _check_beside_others(self, by_name: Mapping[str, FrozenParameter]) -> None:
        """Refuse what disagrees with what other handles hold of the same parameters."""
        ours = set(map(id, self._held.frozen.by_name.values()))
        for name, site in self._held.known_sites():
            on_module = held_on(site.owner, site.key) if isinstance(site.owner, nn.Module) else []
            others = {id(other): other for other in (*watching(site.tensor()), *on_module)}
            for number, other in others.items():
                if number not in ours:
                    by_name[name].check_beside(other)

    def _install_module_hooks(self) -> None:
        by_module: dict[nn.Module, HookSet] = {}
        for name, site in self._held.held_sites():
            if isinstance(site.owner, nn.Module):
                by_module.setdefault(site.owner, HookSet(self._held.frozen, site.known)).names[site.key] = name
        callers = uncalled_owners(self._held.model) if isinstance(self._held.model, nn.Module) else {}
        for module, hooks in by_module.items():
            earlier = hook_set_of(self._held.frozen, module)
            if earlier is not None:  # another handle of the same parameters holds some of them still
                earlier.remove()
            hooks.install(module, callers.get(module, []))
        remove_outer(self._held.model, self._held.frozen)
        if by_module:
            install_outer(self._held.model, self._held.frozen)

    def remove(self) -> None:
        """Let the entries go: take off every hook, from module, parameters and guarded optimizers.

        The entries train from here on as if they had never moved (their moments are 0). `attach` holds them again.
        """
        if not self._holds_any:
            return
        self._reset_guards()
        self._held.frozen.release(self)
        for guard in self._guards:
            guard.suspend()
        for hooks in self._held.frozen.living_guards():  # of another handle for the same parameters
            hooks.leave_released()
        for name, site in self._held.sites:
            self._release(name, site)
        remove_outer(self._held.model, self._held.frozen)
        self._attached = False

    def thaw(self, target: str) -> None:
        """Let all frozen entries of some parameters go, and hold the others on.

        Args:
            target: A parameter's name as in rules, with ``*`` and ``?``; a module's name stands for its weight.

        Raises:
            TargetError: Nothing of it is frozen.
        """
        known = [name for frozen in self.values() for name in frozen.names]
        names = {self[name].name for name in matching(target, known) or matching_unwrapped(target, known)}
        if not names:
            raise self._held.frozen.not_frozen(target, self)
        if self._holds_any:
            self._reset_guards()
        for name, site in self._held.sites:
            if name in names:
                self._release(name, site)
        self._held.frozen.thaw(names)
        self._held.sites = [(name, site) for name, site in self._held.sites if name not in names]
        if not len(self):
            self.remove()

    def _reset_guards(self) -> None:
        for hooks in self._held.frozen.living_guards():
            with suppress(ParameterChangedError):  # what is gone from the model has no state to reset
                hooks.reset()

    def _release(self, name: str, site: Site) -> None:
        """Take the hooks off one place that holds a parameter."""
        parameter = site.find()
        if parameter is not None:
            unwatch_gradient(parameter, self._held.frozen, name)
        site.known.pop(site.key, None)
        hooks = hook_set_of(self._held.frozen, site.owner) if isinstance(site.owner, nn.Module) else None
        if hooks is not None:
            hooks.drop(site.key)

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    # Saving

    def state_dict(self) -> dict[str, Any]:
        """Return rules, regions and values as plain tensors and builtins (it loads with `weights_only=True`)."""
        return saved.save(self.values())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take regions and kept values from a saved state, and impose them.

        Args:
            state: What `state_dict` returned, under the same rules.

        Raises:
            StateMismatchError: It was made under other rules or for another model; nothing is changed then.
            RuleConflictError: Another handle holds some of its entries at other values; nothing is changed then.
        """
        loaded = resolve.read(self._held, state)
        if self.attached:
            self._check_beside_others(loaded)
        self._held.frozen.replace(loaded)
        if self.attached:
            for frozen, parameter in self._held:
                frozen.impose(parameter)
                frozen.zero_gradient(parameter)
            self._reset_guards()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_guards": []}  # a guard belongs to its optimizer; MaskedOptimizer makes it anew

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        for name, site in self._held.held_sites():
            parameter = site.find() if site.is_whole else None  # else the first forward renews its hooks
            pair = None if parameter is None else self._held.frozen.adopt(name, parameter)
            if pair is not None:
                watch_gradient(pair[1], self._held.frozen, name)
