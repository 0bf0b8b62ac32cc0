"""Around an optimizer's step: clean gradients before it, imposed values after it, and state that agrees with both."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ._errors import SpecError
from ._frozen import FrozenPart
from ._hooks import watch_gradient

_WEIGHTS: Final = frozenset({"ax", "slow_buffer", "slow_param", "master_param"})
"""State that holds weights: the averages of ASGD, the slow weights of Lookahead, master copies."""

_STARTS: Final = {"step_size": "lr", "sum": "initial_accumulator_value"}
"""State that does not start at 0 but at an option of its group: Rprop's step sizes, Adagrad's sums."""

_COUNTERS: Final = frozenset({"step", "eta", "mu", "mu_product"})
"""State that counts steps: of the shape of a parameter without dimensions, yet none of its entries."""


class Guard:
    """The hooks of one handle on one optimizer.

    Args:
        held: Returns each part with the parameter that it holds now.
        optimizer: The optimizer whose steps are guarded; only weakly referenced.
    """

    def __init__(self, held: Callable[[], Iterable[tuple[FrozenPart, Tensor]]], optimizer: Optimizer) -> None:
        self._held = held
        self._optimizer: weakref.ref[Optimizer] | None = weakref.ref(optimizer)
        self._handles: list[RemovableHandle] = []

    @property
    def optimizer(self) -> Optimizer | None:
        """The guarded optimizer, or None where it or the guard is gone."""
        return None if self._optimizer is None else self._optimizer()

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to guard: the guard was removed, or the optimizer is gone with its hooks.

        The hooks of a guarded wrapper lie on the optimizer inside, and may outlive the wrapper.
        """
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
        self._optimizer = None

    def suspend(self) -> None:
        """Take the hooks off, until `install` puts them on again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Clean the gradients once more, where a reducer or a hand put something back, and guard the closure."""
        self._clean_gradients(optimizer)
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
            self._clean_gradients(optimizer)
            return loss

        return guarded_closure

    def after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Impose the values on the parameters, and on state that holds weights."""
        for part, parameter, group in self._held_by(optimizer):
            part.impose(parameter)
            for name, value in (optimizer.state.get(parameter) or {}).items():
                if _holds_weights(name, group) and _is_entrywise(name, value, part):
                    part.impose_(value)

    def _clean_gradients(self, optimizer: Optimizer) -> None:
        for part, parameter, _ in self._held_by(optimizer):
            watch_gradient(parameter, part)
            part.clean_gradient(parameter)

    def _impose(self, optimizer: Optimizer) -> None:
        for part, parameter, _ in self._held_by(optimizer):
            part.impose(parameter)

    def _held_by(self, optimizer: Optimizer) -> Iterator[tuple[FrozenPart, Tensor, dict[str, Any]]]:
        """Return each part with the parameter that it holds and the group in which the optimizer steps it."""
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        for part, parameter in self._held():
            if id(parameter) in groups:
                yield part, parameter, groups[id(parameter)]

    def settle_now(self) -> None:
        """Settle the optimizer's state, where the optimizer still lives."""
        if self.optimizer is not None:
            self.settle(self.optimizer)

    def settle(self, optimizer: Optimizer) -> None:
        """Make the optimizer's state what it would be had the frozen entries never moved."""
        held = list(self._held_by(optimizer))
        for part, parameter, group in held:
            _settle_state(optimizer.state.get(parameter) or {}, part, group)
        for group in optimizer.param_groups:
            _settle_history(optimizer, group["params"], [(part, parameter) for part, parameter, _ in held])


def check_optimizer(optimizer: Any) -> None:
    """Refuse what has no step hooks to guard it by.

    Raises:
        SpecError: It is no optimizer, or one that was made without `Optimizer.__init__`.
    """
    if not isinstance(optimizer, Optimizer):
        raise SpecError(
            f"`optimizer` must be a torch.optim.Optimizer, found {type(optimizer).__name__}",
            "pass the optimizer first, then the handle: MaskedOptimizer(optimizer, frozen)",
        )
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
    for name, value in state.items():
        if not _is_entrywise(name, value, part):
            continue
        if _holds_weights(name, group):
            part.impose_(value)
        else:
            part.fill_(value, float(group.get(_STARTS.get(name, ""), 0.0)))


def _settle_history(optimizer: Optimizer, parameters: list[Tensor], held: list[tuple[FrozenPart, Tensor]]) -> None:
    """Drop the history of LBFGS where it moves frozen entries: curvature measured along them is no longer true."""
    state = optimizer.state.get(parameters[0], {}) if parameters else {}
    if "old_dirs" not in state:
        return
    frozen = torch.cat([_flat_frozen(parameter, held) for parameter in parameters])
    history = [state.get("d"), state.get("prev_flat_grad"), *state["old_dirs"], *state["old_stps"]]
    if any(bool(flat[frozen].any()) for flat in history if flat is not None):
        state.clear()


def _flat_frozen(parameter: Tensor, held: list[tuple[FrozenPart, Tensor]]) -> Tensor:
    """Return which entries of the parameter are frozen, flattened as LBFGS flattens it: complex ones as two numbers."""
    frozen = torch.zeros(parameter.shape, dtype=torch.bool, device=parameter.device)
    for part, its_parameter in held:
        if its_parameter is parameter:
            frozen |= part.frozen
    return frozen.flatten().repeat_interleave(2 if parameter.is_complex() else 1)
