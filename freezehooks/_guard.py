"""Around an optimizer's step: clean gradients before it, imposed values after it, and state that agrees with both."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ._errors import SpecError
from ._frozen import FrozenPart
from ._hooks import watch_gradient

_WEIGHTS: Final = frozenset({"ax", "slow_buffer", "slow_param", "master_param"})
"""State that holds weights: the averages of ASGD, the slow weights of Lookahead, master copies."""

_COUNTERS: Final = frozenset({"step", "eta", "mu", "mu_product"})
"""State that counts steps: of the shape of a parameter without dimensions, yet none of its entries."""


def _no_optimizer() -> None:
    """Stand in for the weak reference of a guard that was removed."""


class Holder(Protocol):
    """What a guard serves: anything that can say which parameters it holds entries of."""

    def held(self) -> Iterable[tuple[FrozenPart, Tensor]]:
        """Pair each part with the parameter it holds now."""
        ...


class Guard:
    """The hooks of one handle on one optimizer.

    Args:
        holder: Whose entries are held.
        optimizer: The optimizer whose steps are guarded; only weakly referenced.
    """

    def __init__(self, holder: Holder, optimizer: Optimizer) -> None:
        self._holder = holder
        self._optimizer: Callable[[], Optimizer | None] = weakref.ref(optimizer)
        self._handles: list[RemovableHandle] = []

    @property
    def optimizer(self) -> Optimizer | None:
        """The guarded optimizer, or None where it or the guard is gone."""
        return self._optimizer()

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to guard: the guard was removed, or the optimizer is gone with its hooks."""
        hooked = any(handle.hooks_dict_ref() is not None for handle in self._handles)
        return self.optimizer is None and not hooked

    def install(self) -> None:
        """Register the hooks on the optimizer and bring its present state into line."""
        optimizer = self.optimizer
        if optimizer is None or self._handles:
            return
        for part, parameter, _ in self._held_by(optimizer):
            watch_gradient(parameter, part)
        self.settle(optimizer)
        after = optimizer.register_step_post_hook(self.after_step)
        # first of all post-hooks: whoever looks after the step sees the values
        optimizer._optimizer_step_post_hooks.move_to_end(after.id, last=False)  # type: ignore[attr-defined]
        self._handles = [
            after,
            optimizer.register_step_pre_hook(self.before_step),
            optimizer.register_load_state_dict_post_hook(self.settle),
        ]

    def remove(self) -> None:
        """Stop guarding the optimizer for good; the frozen entries are then held by the model's own hooks alone."""
        self.suspend()
        self._optimizer = _no_optimizer

    def suspend(self) -> None:
        """Take the hooks off, until `install` puts them on again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Zero the frozen gradients once more, where a reducer or a hand put something back, and guard the closure."""
        self._zero_gradients(optimizer)
        if len(args) > 1 and callable(args[1]):
            return (args[0], self._guarded(args[1], optimizer), *args[2:]), kwargs
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._guarded(kwargs["closure"], optimizer)}
        return None

    def _guarded(self, closure: Callable[[], Any], optimizer: Optimizer) -> Callable[[], Any]:
        """Return the closure, evaluated at imposed weights (LBFGS moves them in between), leaving clean gradients."""

        def guarded_closure() -> Any:
            self._impose(optimizer)
            loss = closure()
            self._zero_gradients(optimizer)
            return loss

        return guarded_closure

    def after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Impose the values on the parameters, and on state that holds weights."""
        for part, parameter, group in self._held_by(optimizer):
            part.impose(parameter)
            for name, value in (optimizer.state.get(parameter) or {}).items():
                if _holds_weights(name, group) and _is_entrywise(name, value, part):
                    part.impose_(value)

    def _zero_gradients(self, optimizer: Optimizer) -> None:
        for part, parameter, _ in self._held_by(optimizer):
            watch_gradient(parameter, part)
            part.zero_gradient(parameter)

    def _impose(self, optimizer: Optimizer) -> None:
        for part, parameter, _ in self._held_by(optimizer):
            part.impose(parameter)

    def _held_by(self, optimizer: Optimizer) -> Iterator[tuple[FrozenPart, Tensor, dict[str, Any]]]:
        """Return each part with the parameter that it holds and the group in which the optimizer steps it."""
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        for part, parameter in self._holder.held():
            if id(parameter) in groups:
                yield part, parameter, groups[id(parameter)]

    def guards_anything(self) -> bool:
        """Return whether the optimizer steps any of the frozen parameters."""
        optimizer = self.optimizer
        return optimizer is not None and any(True for _ in self._held_by(optimizer))

    def settle_now(self) -> None:
        """Settle the optimizer's state, where the optimizer still lives."""
        if self.optimizer is not None:
            self.settle(self.optimizer)

    def settle(self, optimizer: Optimizer) -> None:
        """Make the optimizer's state what it would be had the frozen entries never moved."""
        frozen: dict[int, Tensor] = {}
        for part, parameter, group in self._held_by(optimizer):
            frozen[id(parameter)] = frozen.get(id(parameter), False) | part.frozen
            _settle_state(optimizer.state.get(parameter) or {}, part, group)
        for group in optimizer.param_groups:
            _settle_history(optimizer, group["params"], frozen)


def check_optimizer(optimizer: Any) -> None:
    """Refuse what has no step hooks to guard it by.

    Raises:
        SpecError: It is no optimizer, or one that was made without `Optimizer.__init__`.
    """
    if not isinstance(optimizer, Optimizer):
        raise SpecError(f"`optimizer` must be a torch.optim.Optimizer, found {type(optimizer).__name__}")
    if not hasattr(optimizer, "_optimizer_step_post_hooks"):
        raise SpecError(
            f"`{type(optimizer).__name__}` has no step hooks: its class skips `Optimizer.__init__`",
            "call super().__init__ in it, or guard the optimizer that it wraps",
        )


def _is_entrywise(name: str, value: Any, part: FrozenPart) -> bool:
    """Return whether an item of an optimizer's state has a number for each entry of the parameter."""
    return isinstance(value, Tensor) and value.shape == part.shape and name not in _COUNTERS


def _holds_weights(name: str, group: dict[str, Any]) -> bool:
    """Return whether an item of an optimizer's state is weights; schedule-free's `z` is, that of others is not."""
    return name in _WEIGHTS or (name == "z" and "train_mode" in group)


def _settle_state(state: dict[str, Any], part: FrozenPart, group: dict[str, Any]) -> None:
    starts = {"step_size": group.get("lr", 0.0), "sum": group.get("initial_accumulator_value", 0.0)}
    for name, value in state.items():
        if not _is_entrywise(name, value, part):
            continue
        if _holds_weights(name, group):
            part.impose_(value)
        else:
            part.fill_(value, float(starts.get(name, 0.0)))


def _settle_history(optimizer: Optimizer, parameters: list[Tensor], frozen: dict[int, Tensor]) -> None:
    """Drop the history of LBFGS where it moves frozen entries: curvature measured along them is no longer true."""
    state = optimizer.state.get(parameters[0], {}) if parameters else {}
    if "old_dirs" not in state:
        return
    flat_frozen = torch.cat([_flat(parameter, frozen.get(id(parameter))) for parameter in parameters])
    history = [state.get("d"), state.get("prev_flat_grad"), *state["old_dirs"], *state["old_stps"]]
    if any(bool(flat[flat_frozen].any()) for flat in history if flat is not None):
        state.clear()


def _flat(parameter: Tensor, frozen: Tensor | None) -> Tensor:
    """Return which entries of the parameter are frozen, flattened as LBFGS flattens it: complex ones as two numbers."""
    if frozen is None:
        frozen = torch.zeros(parameter.shape, dtype=torch.bool, device=parameter.device)
    return frozen.flatten().repeat_interleave(2 if parameter.is_complex() else 1)
