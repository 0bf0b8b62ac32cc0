"""Freeze entries of a model, and the handle that answers for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ._errors import DriftError, OptimizerMismatchError, ParameterChangedError, SpecError, TargetError
from ._held.names import Site, matching, matching_unwrapped, unwrapped
from ._held.parameter import FrozenPart, Violation
from ._held.resolve import Model, resolve, saved_pieces, state_of
from ._hooks.model import ImposeBeforeModel, is_before_model, remove_before_model
from ._hooks.module import (
    ModuleHooks,
    hooks_on,
    parts_watching,
    silent_callers,
    unwatch_gradient,
    watch_gradient,
)
from ._optim.compact import check_elementwise, check_whole
from ._optim.state import stepped_by
from ._optim.step import Guard, check_optimizer, compact_guards, guards_on
from ._report.status import Mechanisms, OnModules, check_complete, find_mechanisms, guarded_now
from ._report.table import Report, aligned, report_part
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
        model: A module; or, for those who optimise bare tensors, a mapping from name to leaf tensor (there is no
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
    return FrozenEntries(model, resolve(model, rules_of(spec), state)).attach()


class FrozenEntries(Mapping[str, FrozenPart]):
    """What is frozen of a model: a mapping from parameter name to `FrozenPart`. Made by `freeze_entries`.

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

    def __init__(self, model: Model, parts: Iterable[tuple[FrozenPart, list[Site]]]) -> None:
        self._model = model
        self._parts: dict[str, FrozenPart] = {}
        self._sites: list[tuple[FrozenPart, Site]] = []
        self._modules: dict[nn.Module, ModuleHooks] = {}
        self._guards: list[Guard] = []
        self._attached = False
        self._family = self._parts  # by which module hooks know one another
        for part, sites in parts:
            self._parts[part.name] = part
            self._sites.extend((part, site) for site in sites)

    @classmethod
    def of(cls, model: nn.Module) -> tuple[FrozenEntries, ...]:
        """Return handles of what is frozen in a model, in the order of its modules.

        A copied or unpickled model takes its frozen entries along but no handle: this makes one. The names in it are
        those of the model that was frozen.
        """
        found: dict[int, FrozenEntries] = {}
        for module in model.modules():
            for hooks in hooks_on(module):
                if id(hooks.family) not in found:
                    found[id(hooks.family)] = cls(model, ())
                found[id(hooks.family)]._take_over(module, hooks)
        return tuple(found.values())

    def _take_over(self, module: nn.Module, hooks: ModuleHooks) -> None:
        self._modules[module] = hooks
        self._family = hooks.family
        self._attached = True
        for key, part in hooks.parts.items():
            self._parts[part.name] = part
            self._sites.append((part, Site(module, key)))
        for part, parameter in hooks.bound(module):
            watch_gradient(parameter, part)

    # A mapping

    def __getitem__(self, name: str) -> FrozenPart:
        for part in self._parts.values():
            if name in part.names:
                return part
        for part in self._parts.values():
            if unwrapped(name) in map(unwrapped, part.names):
                return part
        raise self._not_frozen(name)

    def _not_frozen(self, target: str) -> TargetError:
        return TargetError(f"nothing of `{target}` is frozen", f"frozen are {', '.join(self._parts) or 'none'}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        rows = [("parameter", "shape", "rules", "frozen", "free")]
        for part in self._parts.values():
            rules = ", ".join(map(str, part.rules))
            rows.append((part.name, str(tuple(part.shape)), rules, f"{part.frozen_count:,}", f"{part.free_count:,}"))
        return aligned(rows, right=(3, 4)) if self._parts else "nothing is frozen"

    @property
    def model(self) -> Model:
        """The model, or the mapping of bare tensors, whose entries are frozen."""
        return self._model

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules in force, each once."""
        return tuple(dict.fromkeys(rule for part in self._parts.values() for rule in part.rules))

    @property
    def frozen_count(self) -> int:
        """How many entries are frozen, over all parameters."""
        return sum(part.frozen_count for part in self._parts.values())

    @property
    def nbytes(self) -> int:
        """The memory that regions and values take, in bytes, over all parameters: none for slices at a number."""
        return sum(part.nbytes for part in self._parts.values())

    @property
    def attached(self) -> bool:
        """Whether the entries are held now."""
        return self._attached and all(hooks.installed for hooks in self._modules.values())

    # Holding

    def held(self) -> Iterator[tuple[FrozenPart, Tensor]]:
        """Pair each part with each parameter it holds now."""
        seen: set[tuple[int, int]] = set()
        for part, site in self._sites:
            parameter = part.current(site.tensor())
            pair = id(part), id(parameter)
            if pair not in seen:
                seen.add(pair)
                yield part, parameter

    def impose(self) -> None:
        """Write the values into the frozen entries now."""
        for part, parameter in self.held():
            part.impose(parameter)

    def violations(self) -> tuple[Violation, ...]:
        """Return, for each parameter where frozen entries drifted, how many and the worst of them.

        Raises:
            ParameterChangedError: A parameter is gone, has another shape or no numbers (on the meta device), or lies in
                a module that was replaced.
        """
        self._check_in_place()
        found: dict[tuple[str, int], Violation | None] = {}
        for part, site in self._sites:
            place = part.name, id(site.find())
            if found.get(place) is None:  # of names of one tensor, one may be pruned
                found[place] = part.violation(part.current(site.computed()))
        return tuple(filter(None, found.values()))

    def _check_in_place(self) -> None:
        """Refuse to answer for parameters of a module that the model no longer contains."""
        modules = set(self._model.modules()) if isinstance(self._model, nn.Module) else set()
        for part, site in self._sites:
            part.check_shape(site.tensor())
            if isinstance(site.owner, nn.Module) and site.owner not in modules:
                raise ParameterChangedError(
                    f"the {type(site.owner).__name__} that owned `{part.name}` is no longer in the model",
                    "call remove() before a module is replaced, and freeze anew after",
                )

    def assert_frozen(self, *, guarded: bool = True) -> None:
        """Check that every frozen entry equals its value bit for bit, and that all that shall hold it is in place.

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
        check_complete(self._mechanisms(), guarded=guarded)

    def report(self) -> Report:
        """Look at what is frozen and by what means: values, drift, hooks, guarded optimizers, bytes.

        Of a parameter that is spread over ranks, values and drift are of this rank's part.

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
        mechanisms = self._mechanisms()
        return Report(
            {name: report_part(part, violations.get(name, ()), mechanisms[name]) for name, part in self._parts.items()}
        )

    def _mechanisms(self) -> dict[str, Mechanisms]:
        sites: dict[str, list[Site]] = {}
        for part, site in self._sites:
            sites.setdefault(part.name, []).append(site)
        came_with_model = self._family is not self._parts  # the model may be a part of the one that was frozen
        has_model_hook = came_with_model or is_before_model(self._model, self._family)
        on_modules = OnModules(self._model, self._modules, has_model_hook=has_model_hook)
        guarded = guarded_now()
        return {name: find_mechanisms(self._parts[name], sites[name], on_modules, guarded) for name in self._parts}

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
        own = [(part, site.tensor()) for part, site in self._sites if self._is_held(part, site)]
        return count_trainable(self._model, own)

    def _is_held(self, part: FrozenPart, site: Site) -> bool:
        """Return whether one place is held still: another handle of the same parts may have let it go."""
        if not isinstance(site.owner, nn.Module):
            return self._attached
        hooks = self._modules.get(site.owner)
        return hooks is not None and hooks.installed and hooks.parts.get(site.key) is part

    def plot(self, name: str, path: str | Path | None = None) -> Figure:
        """Draw a parameter, kernel by kernel or as a matrix, with a mark on every frozen entry.

        A convolution's kernels stand with output channels across and input channels down, on one colour scale that is
        symmetric around 0; of many channels some are drawn, evenly spaced. A large matrix is drawn in cells, each the
        entry of largest magnitude of a block, beside a panel that says in grey how much of the block is frozen.
        Sharded parameters show this rank's part. The picture says all of that itself.

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
        from ._report.plot import plot_part

        part = self[name]
        site = next(site for owned, site in self._sites if owned is part)
        return plot_part(part, part.current(site.tensor()), path, owner=site.owner)

    def guard(self, optimizer: Optimizer, *, compact: bool = False) -> Guard:
        """Hold the entries through every step of an optimizer, by the optimizer's own step hooks.

        Guarding an optimizer twice is guarding it once; one that holds another optimizer, as SAM and Lookahead do, is
        guarded together with it. Moments at frozen entries become 0.

        Args:
            optimizer: Any optimizer that steps at least one of the frozen parameters.
            compact: Whether the optimizer shall hold and step the free entries alone, as `MaskedOptimizer` says; once
                for all handles that guard it.

        Returns:
            The guard, whose `remove()` takes the hooks off again.

        Raises:
            OptimizerMismatchError: The optimizer steps none of the frozen parameters.
            UnsupportedOptimizerError: It does not work entry by entry, so that it cannot be compact.
            SpecError: `optimizer` is no optimizer.
        """
        self.check_optimizer(optimizer, compact=compact)
        guard = self._guard_of(optimizer)
        if compact or any(other.compaction for other in guards_on(optimizer)):
            compact_guards([guard, *guards_on(optimizer)])
        if self.attached:
            guard.install()
        for inside in vars(optimizer).values():
            if isinstance(inside, Optimizer):
                with suppress(OptimizerMismatchError):  # it steps other parameters
                    self.guard(inside, compact=compact)
        return guard

    def _guard_of(self, optimizer: Optimizer) -> Guard:
        self._guards = [guard for guard in self._guards if not guard.is_over]
        for guard in self._guards:
            if guard.optimizer is optimizer:
                return guard
        self._guards.append(Guard(self.held, optimizer))
        return self._guards[-1]

    def check_optimizer(self, optimizer: Optimizer, *, compact: bool = False) -> None:
        """Check that an optimizer can be guarded, and that it steps at least one of the frozen parameters.

        Raises:
            OptimizerMismatchError: It steps none.
            UnsupportedOptimizerError: It shall be compact, and does not work entry by entry.
            SpecError: It is no optimizer, or has no step hooks.
        """
        check_optimizer(optimizer)
        if compact:
            check_elementwise(optimizer)
            check_whole(self.held())
        self._check_in_place()
        stepped = stepped_by(optimizer)
        if self._parts and not any(id(parameter) in stepped for _, parameter in self.held()):
            raise OptimizerMismatchError(
                f"`{type(optimizer).__name__}` steps none of the frozen parameters ({', '.join(self._parts)})",
                "build it from the parameters of the model that was frozen, after moving or copying that model",
            )

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
        for part, parameter in self.held():
            part.begin(parameter)
            watch_gradient(parameter, part)
        self._install_module_hooks()
        for guard in self._guards:
            guard.install()
        self._attached = True
        return self

    def _check_attachable(self) -> None:
        self._check_in_place()
        for part, parameter in self.held():
            part.check_start(parameter)
            for other in parts_watching(parameter):
                if other is not part:
                    part.check_beside(other)

    def _install_module_hooks(self) -> None:
        by_module: dict[nn.Module, ModuleHooks] = {}
        for part, site in self._sites:
            if isinstance(site.owner, nn.Module):
                by_module.setdefault(site.owner, ModuleHooks(self._parts)).parts[site.key] = part
        callers = silent_callers(self._model) if isinstance(self._model, nn.Module) else {}
        for module, hooks in by_module.items():
            hooks.install(module, callers.get(module, []))
        self._modules, self._family = by_module, self._parts
        if isinstance(self._model, nn.Module) and by_module:
            self._model.register_forward_pre_hook(ImposeBeforeModel(self._parts), prepend=True)

    def remove(self) -> None:
        """Let the entries go: take off every hook, from module, parameters and guarded optimizers.

        The entries train from here on as if they had never moved (their moments are 0). `attach` holds them again.
        """
        if not self._attached:
            return
        self._settle_guards()
        for guard in self._guards:
            guard.suspend()
        for part, site in self._sites:
            self._let_go(part, site)
        if isinstance(self._model, nn.Module):
            remove_before_model(self._model, self._family)
        self._attached = False

    def thaw(self, target: str) -> None:
        """Let all frozen entries of some parameters go, and hold the others on.

        Args:
            target: A parameter's name as in rules, with ``*`` and ``?``; a module's name stands for its weight.

        Raises:
            TargetError: Nothing of it is frozen.
        """
        known = [name for part in self._parts.values() for name in part.names]
        names = {self[name].name for name in matching(target, known) or matching_unwrapped(target, known)}
        if not names:
            raise self._not_frozen(target)
        if self._attached:
            self._settle_guards()
        for part, site in self._sites:
            if part.name in names:
                self._let_go(part, site)
        for name in names:
            del self._parts[name]
        self._sites = [(part, site) for part, site in self._sites if part.name not in names]
        if not self._parts:
            self.remove()

    def _settle_guards(self) -> None:
        for guard in self._guards:
            with suppress(ParameterChangedError):  # what is gone from the model has no state to settle
                guard.settle_now()

    def _let_go(self, part: FrozenPart, site: Site) -> None:
        """Take the hooks off one place that holds a parameter."""
        parameter = site.find()
        if parameter is not None:
            unwatch_gradient(parameter, part)
        if isinstance(site.owner, nn.Module) and site.owner in self._modules:
            self._modules[site.owner].drop(site.key)
            if not self._modules[site.owner].installed:
                del self._modules[site.owner]

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    # Saving

    def state_dict(self) -> dict[str, Any]:
        """Return rules, regions and values as plain tensors and builtins (it loads with `weights_only=True`)."""
        return state_of(self._parts.values())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take regions and kept values from a saved state, and impose them.

        Args:
            state: What `state_dict` returned, under the same rules.

        Raises:
            StateMismatchError: It was made under other rules or for another model; nothing is changed then.
        """
        asked = {part.name: (parameter, part.rules) for part, parameter in self.held()}
        for name, pieces in list(saved_pieces(asked, state)):  # all of them before the first change
            self._parts[name].replace(pieces)
        if self.attached:
            for part, parameter in self.held():
                part.impose(parameter)
                part.zero_gradient(parameter)
            self._settle_guards()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_guards": []}  # a guard belongs to its optimizer; MaskedOptimizer makes it anew

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        for part, site in self._sites if self._attached else ():
            parameter = site.find() if site.is_whole else None  # else the first forward renews its hooks
            if parameter is not None:
                watch_gradient(part.current(parameter), part)
