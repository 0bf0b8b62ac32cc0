"""An optimizer whose steps leave the frozen entries at their values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._errors import SpecError
from ._handle import FrozenEntries
from ._held.held import HeldParameters
from ._optim.calls import check_step
from ._optim.guardable import guardable
from ._optim.step import StepHooks, compact_state_dict, step_hooks_on

_Method = TypeVar("_Method", bound=Callable[..., Any])


class _ShownAsInner:
    """A method that calls the inner optimizer's method of the same name, and shows that method's signature.

    `GradScaler` and Accelerate inspect the signature before they pass an argument.
    """

    def __init__(self, method: Any) -> None:
        self.method = method
        self.name = method.__name__

    def __get__(self, masked: Any, kind: Any) -> Any:
        if masked is None:
            return self.method
        shown = FunctionType(self.method.__code__, self.method.__globals__, self.name)
        shown.__dict__.update(vars(self.method), __wrapped__=self._of_inner(masked.inner))
        return MethodType(shown, masked)

    def _of_inner(self, inner: Optimizer) -> Any:
        """Return the inner optimizer's function of that name, which takes `self` like this one."""
        return getattr(getattr(inner, self.name), "__func__", getattr(type(inner), self.name))


def _shown_as_inner(method: _Method) -> _Method:
    shown: Any = _ShownAsInner(method)
    return shown  # type: ignore[no-any-return]  # it acts as a method with the same signature


def _hooked(step: _Method) -> _Method:
    """Mark a step as one that calls step hooks, so that torch does not wrap it and call them twice."""
    step.hooked = True  # type: ignore[attr-defined]  # torch's own mark
    return step


class MaskedOptimizer(Optimizer):
    """Wrap an optimizer so that frozen entries hold through momentum, weight decay and everything else it does.

    After each `step()` every frozen entry equals its value bit for bit. Under an elementwise optimizer, such as SGD or
    Adam, the free entries follow the trajectory of an optimizer that has only them. In every other respect this is the
    wrapped optimizer: groups, state, hooks and attributes are those of the wrapped one, so that schedulers,
    `GradScaler` and checkpoints see what they saw before. Step hooks are called with the wrapped optimizer.

    Args:
        optimizer: The optimizer to wrap, available as `inner`. It is guarded too: stepping it directly also holds.
        frozen: What `freeze_entries` returned, or a sequence of such handles; an empty one makes a transparent wrapper.
        compact: Whether the optimizer holds and steps only the free entries: each parameter with frozen entries
            is stepped as a flat tensor of its free ones, and its state has their size. The trajectory is the same;
            the time and memory of a step shrink with what is frozen. For elementwise optimizers and LBFGS. The groups
            still contain the model's own parameters.

    Raises:
        SpecError: `optimizer` is not an optimizer, or `frozen` is not a handle (rules, for example).
        OptimizerMismatchError: The optimizer steps none of a handle's parameters.
        UnsupportedOptimizerError: `compact` is set for an optimizer that is not elementwise (Muon, for example).
        UnguardedError: The optimizer's `step` was replaced by one that calls no hooks, now or before a later step.

    Example:
        >>> import torch
        >>> from freezehooks import MaskedOptimizer, freeze_entries
        >>> layer = torch.nn.Linear(3, 2)
        >>> frozen = freeze_entries(layer, "weight[0, 1] = 1")
        >>> optimizer = MaskedOptimizer(torch.optim.AdamW(layer.parameters(), weight_decay=0.1), frozen)
        >>> layer(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
        >>> layer.weight[0, 1].item()
        1.0
    """

    inner: Optimizer
    frozen: tuple[FrozenEntries, ...]
    compact: bool
    _guarded: list[Optimizer]

    def __init__(
        self, optimizer: Optimizer, frozen: FrozenEntries | Iterable[FrozenEntries], *, compact: bool = False
    ) -> None:
        # super().__init__() is not called: it would create groups, state and hooks for the wrapper, which would differ
        # from the inner optimizer's after the first load_state_dict. Every attribute comes from there instead.
        guarded = guardable(optimizer)
        handles = _handles(frozen)
        for handle in handles:  # check all of them before the first change
            handle.check_optimizer(optimizer, compact=compact)
        vars(self).update(inner=optimizer, frozen=handles, compact=compact, _guarded=guarded)
        for handle in handles:
            handle.guard(optimizer, compact=compact)

    # Attributes that are not defined here are read, written and deleted on the inner optimizer.

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not set yet, as while unpickling: avoid infinite recursion
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Schedulers replace `step`, the properties below forward their value, and LightningOptimizer subclasses this
        # class for an object with attributes of its own.
        if name == "step" and any(hooks.members for hooks in self._step_hooks()):
            check_step(self.inner, value)
        if name in vars(self) or hasattr(type(self), name):
            object.__setattr__(self, name, value)
        else:
            setattr(self.inner, name, value)

    def __delattr__(self, name: str) -> None:
        if name in vars(self):
            object.__delattr__(self, name)
        else:
            delattr(self.inner, name)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]  # an attribute of the base class
        """The inner optimizer's parameter groups."""
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.inner.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]  # an attribute of the base class
        """The inner optimizer's state, by parameter."""
        return self.inner.state

    @state.setter
    def state(self, state: Any) -> None:
        self.inner.state = state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]  # an attribute of the base class
        """The inner optimizer's default options."""
        return self.inner.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.inner.defaults = defaults

    # The base class defines these methods, which would shadow the inner optimizer's.

    @_shown_as_inner
    @_hooked
    def step(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]  # whatever the inner one takes
        """Step the inner optimizer, impose the values, and return what it returned (the closure's loss)."""
        if not torch.compiler.is_compiling():
            for hooks in self._step_hooks():
                hooks.check()
        result = self.inner.step(*args, **kwargs)
        if self.inner not in self._guarded:  # only an optimizer inside it imposes, and it may have written since
            for hooks in self._step_hooks():
                hooks.impose()
        return result

    def _step_hooks(self) -> Iterator[StepHooks]:
        """Yield the step hooks of the inner optimizer, or of the optimizers inside it."""
        for optimizer in self._guarded:
            hooks = step_hooks_on(optimizer)
            if hooks is not None:
                yield hooks

    @_shown_as_inner
    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Reset the gradients, as the inner optimizer does."""
        self.inner.zero_grad(*args, **kwargs)

    def state_dict(self, *args: Any, compact: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Return the inner optimizer's state dict, which is interchangeable with that of a plain optimizer.

        Args:
            args: The arguments of the inner optimizer's method.
            compact: Whether to save the state of a compact optimizer as small as it is in memory. Such a state dict
                lists its entries, and any guarded optimizer can load it, compact or not, under these rules or others.
                A plain optimizer cannot.
            kwargs: The keyword arguments of the inner optimizer's method.
        """
        if compact:
            inner = self.inner
            return inner.state_dict(compact=True) if isinstance(inner, MaskedOptimizer) else compact_state_dict(inner)
        return self.inner.state_dict(*args, **kwargs)

    @_shown_as_inner
    def load_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Load a state dict, plain or compact, into the inner optimizer; moments at frozen entries become 0."""
        self.inner.load_state_dict(*args, **kwargs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer; frozen entries of its parameters are held from the next step on."""
        self.inner.add_param_group(param_group)

    def __repr__(self) -> str:
        # Lightning and Fabric subclass this class with a prefix to its name; otherwise show the inner optimizer only
        word, found, _ = type(self).__name__.partition(MaskedOptimizer.__name__)
        return f"{word if found else ''}{self.inner!r}"

    def __reduce__(self) -> Any:
        found = [(each, step_hooks_on(each)) for each in self._guarded]
        guarded = [
            (each, [], False) if hooks is None else (each, hooks.members, hooks.compact is not None)
            for each, hooks in found
        ]
        return _copied, (type(self), self.inner, self.frozen, self.compact, guarded)


def _copied(
    kind: type[MaskedOptimizer],
    inner: Optimizer,
    frozen: tuple[FrozenEntries, ...],
    compact: bool,
    guarded: list[tuple[Optimizer, list[HeldParameters], bool]],
) -> MaskedOptimizer:
    """Wrap a copied optimizer, and guard it for every handle that guarded the original.

    The checks of a new wrapper are skipped: the copy may not step a handle's parameters any more, or not yet.
    """
    copied = object.__new__(kind)
    vars(copied).update(inner=inner, frozen=frozen, compact=compact, _guarded=[each for each, _, _ in guarded])
    for optimizer, members, is_compact in guarded:
        for handle in frozen:
            handle.guard_unchecked([optimizer], compact=compact or is_compact)
        for held in members:
            hooks = step_hooks_on(optimizer) or StepHooks(optimizer)
            hooks.join(held, compact=is_compact)  # has no effect for those that the handles have guarded above
    return copied


def _handles(frozen: Any) -> tuple[FrozenEntries, ...]:
    """Return one handle or a sequence of them as a tuple."""
    if isinstance(frozen, FrozenEntries):
        return (frozen,)
    handles = (
        tuple(frozen) if isinstance(frozen, Iterable) and not isinstance(frozen, str | Mapping | Tensor) else (frozen,)
    )
    for handle in handles:
        if not isinstance(handle, FrozenEntries):
            raise SpecError(
                f"`frozen` must be a handle or a sequence of them, found {type(handle).__name__}",
                "pass what freeze_entries(model, spec) returned",
            )
    return handles
