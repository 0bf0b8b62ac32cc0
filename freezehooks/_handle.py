"""Freeze entries of a model, and the handle that answers for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ._errors import (
    DriftError,
    FreezeError,
    OptimizerMismatchError,
    ParameterChangedError,
    SpecError,
    StateMismatchError,
    TargetError,
)
from ._frozen import FrozenPart, Piece, Violation
from ._grammar import rules_of
from ._guard import Guard
from ._hooks import ModuleHooks, hooks_on, unwatch_gradient, watch_gradient
from ._rules import Rule
from ._targets import Site, Targets, check_no_fsdp1, check_supported, matching

if TYPE_CHECKING:
    from typing_extensions import Self

_FORMAT = 1


def freeze_entries(
    model: nn.Module | Mapping[str, Tensor], spec: Any, *, state: dict[str, Any] | None = None
) -> FrozenEntries:
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
    if not isinstance(model, nn.Module | Mapping):
        raise SpecError(
            f"`model` must be a module or a mapping from name to tensor, found {type(model).__name__}",
            "call freeze_entries(model, spec)",
        )
    parts = _resolve(model, rules_of(spec))
    if state is not None:
        _adopt(parts, model, state)
    _check_other_handles(model, parts)
    sites = Targets(model).sites
    return FrozenEntries(model, parts, [(part, sites[name]) for part in parts.values() for name in part.names]).attach()


class FrozenEntries(Mapping[str, FrozenPart]):
    """What is frozen of a model: a mapping from parameter name to `FrozenPart`. Made by `freeze_entries`.

    A tied parameter stands under its first name and is found under any. Printing shows a table. As a context manager
    it removes itself at the end of the block.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        parts: dict[str, FrozenPart],
        sites: list[tuple[FrozenPart, Site]],
    ) -> None:
        self._model = model
        self._parts = parts
        self._sites = sites
        self._guards: list[Guard] = []
        self._modules: list[tuple[nn.Module, ModuleHooks]] = []
        self._attached = False

    @classmethod
    def of(cls, model: nn.Module) -> tuple[FrozenEntries, ...]:
        """Return the handles of what is frozen in a model, in the order of its modules.

        A copied or unpickled model takes its frozen entries along but no handle: this makes one. The names in it are
        those of the model that was frozen.
        """
        found: dict[int, FrozenEntries] = {}
        for module in model.modules():
            for hooks in hooks_on(module):
                handle = found.setdefault(id(hooks.family), cls(model, {}, []))
                handle._take_over(module, hooks)
        return tuple(found.values())

    def _take_over(self, module: nn.Module, hooks: ModuleHooks) -> None:
        self._modules.append((module, hooks))
        self._parts.update((part.name, part) for part in hooks.parts.values())
        self._sites.extend((part, Site(module, key)) for key, part in hooks.parts.items())
        self._attached = True

    # A mapping

    def __getitem__(self, name: str) -> FrozenPart:
        for part in self._parts.values():
            if name in part.names:
                return part
        raise KeyError(name)

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
        return _table(rows) if self._parts else "nothing is frozen"

    @property
    def model(self) -> nn.Module | Mapping[str, Tensor]:
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
    def attached(self) -> bool:
        """Whether the entries are held now."""
        return self._attached

    # Holding

    def held(self) -> Iterator[tuple[FrozenPart, Tensor]]:
        """Pair each part with each parameter it holds now."""
        seen: set[int] = set()
        for part, site in self._sites:
            parameter = site.tensor()
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield part, parameter

    def impose(self) -> None:
        """Write the values into the frozen entries now."""
        for part, parameter in self.held():
            part.impose(parameter)

    def violations(self) -> tuple[Violation, ...]:
        """Return, for each parameter where frozen entries drifted, how many and the worst of them."""
        return tuple(filter(None, (part.violation(parameter) for part, parameter in self.held())))

    def assert_frozen(self) -> None:
        """Check that every frozen entry equals its value bit for bit.

        Raises:
            DriftError: Some do not; the message names them.
        """
        violations = self.violations()
        if violations:
            raise DriftError(
                "frozen entries drifted: " + ", ".join(map(str, violations)),
                "guard every optimizer that steps them (MaskedOptimizer or frozen.guard), or call frozen.impose()",
            )

    def guard(self, optimizer: Optimizer) -> Guard:
        """Hold the entries through every step of an optimizer, by the optimizer's own step hooks.

        Guarding an optimizer twice is guarding it once. Moments at frozen entries become 0.

        Args:
            optimizer: Any optimizer that steps at least one of the frozen parameters.

        Returns:
            The guard, whose `remove()` takes the hooks off again.

        Raises:
            OptimizerMismatchError: The optimizer steps none of the frozen parameters.
            SpecError: `optimizer` is no optimizer.
        """
        if not isinstance(optimizer, Optimizer):
            raise SpecError(f"`optimizer` must be a torch.optim.Optimizer, found {type(optimizer).__name__}")
        self._guards = [guard for guard in self._guards if guard.optimizer is not None]
        for guard in self._guards:
            if guard.optimizer is optimizer:
                return guard
        guard = Guard(self, optimizer)
        if self._parts and not guard.guards_anything():
            raise OptimizerMismatchError(
                f"`{type(optimizer).__name__}` steps none of the frozen parameters ({', '.join(self._parts)})",
                "build it from the parameters of the model that was frozen, after moving or copying that model",
            )
        self._guards.append(guard)
        if self._attached:
            guard.install()
        return guard

    # Coming and going

    def attach(self) -> Self:
        """Hold the entries, again at the values they were frozen at; do nothing where they are held already."""
        if self._attached:
            return self
        self.impose()
        for part, parameter in self.held():
            part.zero_gradient(parameter)
            watch_gradient(parameter, part)
        self._install_module_hooks()
        for guard in self._guards:
            guard.install()
        self._attached = True
        return self

    def _install_module_hooks(self) -> None:
        by_module: dict[nn.Module, ModuleHooks] = {}
        for part, site in self._sites:
            if isinstance(site.owner, nn.Module):
                by_module.setdefault(site.owner, ModuleHooks(self._parts)).parts[site.key] = part
        attentions = _attentions(self._model) if by_module else {}
        for module, hooks in by_module.items():
            hooks.install(module, attentions.get(module))
        self._modules = list(by_module.items())

    def remove(self) -> None:
        """Let the entries go: take off every hook, from module, parameters and guarded optimizers.

        The entries train from here on as if they had never moved (their moments are 0). `attach` holds them again.
        """
        if not self._attached:
            return
        for guard in self._guards:
            with suppress(ParameterChangedError):  # what is gone from the model has no state to settle
                guard.settle_now()
            guard.suspend()
        for _, hooks in self._modules:
            hooks.remove()
        for part, site in self._sites:
            parameter = site.find()
            if parameter is not None:
                unwatch_gradient(parameter, part)
        self._modules = []
        self._attached = False

    def thaw(self, target: str) -> None:
        """Let all frozen entries of some parameters go, and hold the others on.

        Args:
            target: A parameter's name as in rules, with ``*`` and ``?``; a module's name stands for its weight.

        Raises:
            TargetError: Nothing of it is frozen.
        """
        known = [name for part in self._parts.values() for name in part.names]
        names = {self[name].name for name in matching(target, known)}
        if not names:
            raise TargetError(f"nothing of `{target}` is frozen", f"frozen are {', '.join(self._parts) or 'none'}")
        with self._reattached():
            for name in names:
                del self._parts[name]
            self._sites = [(part, site) for part, site in self._sites if part.name not in names]

    @contextmanager
    def _reattached(self) -> Iterator[None]:
        """Remove for the length of a block, and attach again after it where it was attached before."""
        attached = self._attached
        self.remove()
        yield
        if attached:
            self.attach()

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    # Saving

    def state_dict(self) -> dict[str, Any]:
        """Return rules, regions and values as plain tensors and builtins (it loads with `weights_only=True`)."""
        parameters = {
            part.name: {
                "shape": list(part.shape),
                "pieces": [{"rule": str(piece.rule), **piece.state(part.shape)} for piece in part.pieces],
            }
            for part in self._parts.values()
        }
        return {"format": _FORMAT, "rules": [str(rule) for rule in self.rules], "parameters": parameters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take regions and kept values from a saved state, and impose them.

        Args:
            state: What `state_dict` returned, under the same rules.

        Raises:
            StateMismatchError: It was made under other rules or for another model; nothing is changed then.
        """
        _adopt(self._parts, self._model, state)
        if self._attached:
            self.impose()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_guards": []}  # a guard belongs to its optimizer; MaskedOptimizer makes it anew


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [text.ljust(width) for text, width in zip(row[:3], widths, strict=False)]
        cells += [text.rjust(width) for text, width in zip(row[3:], widths[3:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _attentions(model: Any) -> dict[nn.Module, nn.MultiheadAttention]:
    """Map each output projection to the attention module that computes with it without calling it."""
    return {module.out_proj: module for module in model.modules() if isinstance(module, nn.MultiheadAttention)}


# --------------------------------------------------------------------------------------------------------------------
# From rules to parts


def _resolve(model: nn.Module | Mapping[str, Tensor], rules: tuple[Rule, ...]) -> dict[str, FrozenPart]:
    """Work out what the rules freeze, changing nothing; every error of a rule is raised here."""
    check_no_fsdp1(model)
    targets = Targets(model)
    asked: dict[str, list[Rule]] = {}
    for rule in dict.fromkeys(rules):
        with _context(f"rule `{rule}`"):
            for name in targets.find(rule.target):
                asked.setdefault(name, []).append(rule)
    parts: dict[str, FrozenPart] = {}
    for name, its_rules in asked.items():
        parameter = targets.sites[name].tensor()
        pieces = [_piece(rule, name, parameter) for rule in its_rules]
        parts[name] = FrozenPart(targets.names_of(name), parameter, pieces)
    return parts


def _piece(rule: Rule, name: str, parameter: Tensor) -> Piece:
    with _context(f"rule `{rule}`", f"parameter `{name}`"):
        check_supported(parameter)
    with _context(f"rule `{rule}`", f"parameter `{name}` of shape {tuple(parameter.shape)}"):
        return Piece.resolve(rule, parameter)


@contextmanager
def _context(context: str, detail: str = "") -> Iterator[None]:
    try:
        yield
    except FreezeError as error:
        raise error.within(context, detail) from error.__cause__


def _check_other_handles(model: nn.Module | Mapping[str, Tensor], parts: dict[str, FrozenPart]) -> None:
    """Refuse rules that disagree with those of another handle on the same model."""
    others = FrozenEntries.of(model) if isinstance(model, nn.Module) and parts else ()
    theirs = {id(parameter): part for other in others for part, parameter in other.held()}
    sites = Targets(model).sites if theirs else {}
    for name, part in parts.items():
        parameter = sites[name].tensor() if theirs else None
        if id(parameter) in theirs and parameter is not None:
            FrozenPart(list(part.names), parameter, [*theirs[id(parameter)].pieces, *part.pieces])


# --------------------------------------------------------------------------------------------------------------------
# From a saved state to parts


def _adopt(parts: dict[str, FrozenPart], model: nn.Module | Mapping[str, Tensor], state: Any) -> None:
    """Give the parts the regions and values of a saved state, all of them or, where one does not fit, none."""
    with _readable_state():
        if state["format"] != _FORMAT:
            raise StateMismatchError(f"the state has format {state['format']!r}, expected {_FORMAT}")
        _check_same_rules(parts, state["parameters"])
        sites = Targets(model).sites
        adopted = {
            name: _adopted_pieces(part, sites[name].tensor(), state["parameters"][name]["pieces"])
            for name, part in parts.items()
        }
    for name, pieces in adopted.items():
        parts[name].replace(pieces)


@contextmanager
def _readable_state() -> Iterator[None]:
    try:
        yield
    except FreezeError:
        raise
    except (KeyError, TypeError, IndexError, AttributeError, RuntimeError, ValueError) as error:
        raise StateMismatchError(
            f"the state cannot be read ({type(error).__name__}: {error})",
            "pass what FrozenEntries.state_dict() returned",
        ) from error


def _check_same_rules(parts: dict[str, FrozenPart], saved: dict[str, Any]) -> None:
    now = {name: (list(part.shape), [str(rule) for rule in part.rules]) for name, part in parts.items()}
    then = {name: (item["shape"], [piece["rule"] for piece in item["pieces"]]) for name, item in saved.items()}
    for name in dict.fromkeys([*then, *now]):
        if now.get(name) != then.get(name):
            raise StateMismatchError(
                f"the state was saved under other rules: for `{name}` it says {_said(then.get(name))}, "
                f"the present rules say {_said(now.get(name))}",
                "use the rules of the saved run, or start from its weights alone",
            )


def _said(item: tuple[list[int], list[str]] | None) -> str:
    return f"{', '.join(f'`{rule}`' for rule in item[1])} on shape {tuple(item[0])}" if item else "nothing"


def _adopted_pieces(part: FrozenPart, parameter: Tensor, saved: list[dict[str, Any]]) -> list[Piece]:
    pieces = [Piece.from_state(piece.rule, item, parameter) for piece, item in zip(part.pieces, saved, strict=True)]
    for now, then in zip(part.pieces, pieces, strict=True):
        given = isinstance(now.rule.region, Tensor) or isinstance(now.rule.value, Tensor)
        if given and not now.agrees(then, parameter):
            raise StateMismatchError(
                f"rule `{now.rule}` was saved with another mask or other values for `{part.name}`",
                "use the tensors of the saved run, or start from its weights alone",
            )
    return pieces
