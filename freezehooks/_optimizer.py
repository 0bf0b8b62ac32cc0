"""An optimizer whose steps leave the frozen entries at their values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch.optim import Optimizer

from ._errors import SpecError
from ._handle import FrozenEntries
from ._held.held import HeldParameters
from ._optim.guard import check_optimizer
from ._optim.step import StepHooks, compact_state_dict, step_hooks_on


class MaskedOptimizer(Optimizer):
    """Wrap an optimizer so that frozen entries hold through momentum, weight decay and everything else it does.

    After each `step()` every frozen entry equals its value bit for bit; for an optimizer that works entry by entry the
    free entries follow the trajectory of one that holds them alone. In all else it is the wrapped optimizer: groups,
    state, hooks and attributes are the wrapped one's own, read and written through this face, so that schedulers,
    `GradScaler` and checkpoints see what they saw before. Step hooks are called with the wrapped optimizer.

    Args:
        optimizer: The optimizer to wrap, reachable as `inner`. It is guarded too: stepping it directly holds as well.
        frozen: What `freeze_entries` returned, or a sequence of such handles; an empty one makes a transparent wrapper.
        compact: Whether the optimizer holds and steps the free entries alone: each parameter that has frozen ones
            is stepped by a flat tensor of its free entries, and its state is of their size. The trajectory is the
            same; time and memory of the step shrink with what is frozen. For optimizers that work entry by entry, and
            LBFGS. Groups still hold the model's own parameters.

    Raises:
        SpecError: `optimizer` is no optimizer, or `frozen` no handle (rules, say).
        OptimizerMismatchError: The optimizer steps none of a handle's parameters.
        UnsupportedOptimizerError: `compact`, for an optimizer that does not work entry by entry (Muon, say).

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

    def __init__(
        self, optimizer: Optimizer, frozen: FrozenEntries | Iterable[FrozenEntries], *, compact: bool = False
    ) -> None:
        # Not super().__init__(): it would give this face groups, state and hooks of its own, and the first
        # load_state_dict would part them from the inner optimizer's. Every attribute comes from there instead.
        check_optimizer(optimizer)
        handles = _handles(frozen)
        for handle in handles:  # all of them before the first change
            handle.check_optimizer(optimizer, compact=compact)
        vars(self).update(inner=optimizer, frozen=handles, compact=compact)
        for handle in handles:
            handle.guard(optimizer, compact=compact)

    # Everything that is not defined here is the inner optimizer's, for reading, writing and deleting.

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # asked before __init__ set it: there is nothing to ask further
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Schedulers replace `step`; the properties below pass their value on; LightningOptimizer takes this class
        # over for an object with attributes of its own.
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

    # The base class has methods of these names, which would shadow the inner optimizer's own.

    def step(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]  # whatever the inner one takes
        """Step the inner optimizer, then impose; returns what it returns (the closure's loss)."""
        return self.inner.step(*args, **kwargs)

    step.hooked = True  # type: ignore[attr-defined]  # the inner step runs the step hooks; twice would be once too often

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Reset the gradients, as the inner optimizer does."""
        self.inner.zero_grad(*args, **kwargs)

    def state_dict(self, *args: Any, compact: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Return the inner optimizer's state dict: a plain optimizer loads it, and this one loads a plain one's.

        Args:
            args: What the inner optimizer takes.
            compact: Whether the state of a compact optimizer is to stay as small as it is in memory. Such a state
                dict says which entries it is of; every optimizer that is guarded loads it, compact or not, under these
                rules or others. A plain optimizer does not.
            kwargs: What the inner optimizer takes.
        """
        if compact:
            return compact_state_dict(self.inner)
        return self.inner.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Load a state dict, plain or compact, into the inner optimizer; moments at frozen entries become 0."""
        self.inner.load_state_dict(*args, **kwargs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer; frozen entries of its parameters are held from the next step on."""
        self.inner.add_param_group(param_group)

    def __repr__(self) -> str:
        return repr(self.inner)

    def __reduce__(self) -> Any:
        hooks = step_hooks_on(self.inner)
        return _copied, (type(self), self.inner, self.frozen, self.compact, [] if hooks is None else hooks.members)


def _copied(
    kind: type[MaskedOptimizer],
    inner: Optimizer,
    frozen: tuple[FrozenEntries, ...],
    compact: bool,
    guarded: list[HeldParameters],
) -> MaskedOptimizer:
    """Wrap a copied optimizer, and guard it anew for every handle that guarded the original."""
    copied = kind(inner, frozen, compact=compact)
    for held in guarded:
        hooks = step_hooks_on(inner) or StepHooks(inner)
        hooks.join(held)  # once for those that the wrapper has guarded already
    return copied


def _handles(frozen: Any) -> tuple[FrozenEntries, ...]:
    """Return one handle or a sequence of them as a tuple."""
    if isinstance(frozen, FrozenEntries):
        return (frozen,)
    handles = tuple(frozen) if isinstance(frozen, Iterable) and not isinstance(frozen, str | Mapping) else (frozen,)
    for handle in handles:
        if not isinstance(handle, FrozenEntries):
            raise SpecError(
                f"`frozen` must be a handle or a sequence of them, found {type(handle).__name__}",
                "pass what freeze_entries(model, spec) returned",
            )
    return handles
