"""Around an optimizer's step: clean gradients before it, imposed values after it, and state that agrees with both."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .._errors import SpecError
from .._held.parameter import FrozenPart
from .._hooks.module import watch_gradient
from .compact import Compaction, Held
from .elementwise import is_elementwise
from .state import impose_on_weights, may_keep_weights, settle, settle_history
from .state_dict import read_state_dict


class Guard:
    """The hooks of one handle on one optimizer.

    Args:
        held: Returns each part with the parameter that it holds now.
        optimizer: The optimizer whose steps are guarded; only weakly referenced.

    Attributes:
        held: Returns each part with the parameter that it holds now, whichever optimizer steps it.
    """

    def __init__(self, held: Held, optimizer: Optimizer) -> None:
        self.held = held
        self._optimizer: weakref.ref[Optimizer] | None = weakref.ref(optimizer)
        self._compaction: Compaction | None = None
        self._handles: list[RemovableHandle] = []
        self._stepped: list[tuple[FrozenPart, Tensor, dict[str, Any]]] | None = None
        self._has_stepped = False

    @property
    def optimizer(self) -> Optimizer | None:
        """The guarded optimizer, or None where it or the guard is gone."""
        return None if self._optimizer is None else self._optimizer()

    @property
    def compaction(self) -> Compaction | None:
        """What makes the optimizer hold the free entries alone, or None where it holds whole parameters."""
        return self._compaction

    @property
    def nbytes(self) -> int:
        """The memory that compact mode takes between steps, in bytes, beside the optimizer's state."""
        return 0 if self._compaction is None else self._compaction.nbytes

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to guard: the guard was removed, or the optimizer is gone with its hooks.

        The hooks of a guarded wrapper lie on the optimizer inside, and may outlive the wrapper.
        """
        hooked = any(handle.hooks_dict_ref() is not None for handle in self._handles)
        return self.optimizer is None and not hooked

    @property
    def is_alive(self) -> bool:
        """Whether all of its hooks are on an optimizer that still lives, and whose step calls them."""
        optimizer = self.optimizer
        if optimizer is None or not self._handles:
            return False
        # `Optimizer.__init__` marks the step of its class as hooked; a class that skips it may call a marked one
        is_called = self._has_stepped or getattr(type(optimizer).step, "hooked", False)
        return is_called and all(
            handle.id in getattr(optimizer, where) for handle, where in zip(self._handles, _WHERE, strict=True)
        )

    def install(self) -> None:
        """Register the hooks on the optimizer and bring its present state into line."""
        optimizer = self.optimizer
        if optimizer is None or self._handles:
            return
        for part, parameter, _ in self._held_by(optimizer):
            part.follow(parameter)
            watch_gradient(parameter, part)
        self._share_compaction(optimizer)
        if self._compaction is not None:
            self._compaction.join(self.held, optimizer)
        self.settle(optimizer)
        after = optimizer.register_step_post_hook(self.after_step)
        # first of all post-hooks: whoever looks after the step sees the values
        optimizer._optimizer_step_post_hooks.move_to_end(after.id, last=False)  # type: ignore[attr-defined]
        self._handles = [
            after,
            optimizer.register_step_pre_hook(self.before_step),
            optimizer.register_load_state_dict_pre_hook(read_state_dict),
            optimizer.register_load_state_dict_post_hook(self.settle),
        ]
        _installed.add(self)

    def _share_compaction(self, optimizer: Optimizer) -> None:
        """Take over what makes the optimizer compact already, or let the other guards on it take over this one's."""
        others = guards_on(optimizer)
        self._compaction = next((guard.compaction for guard in others if guard.compaction), self._compaction)
        if self._compaction is not None:
            for guard in others:
                guard.compact(self._compaction)

    def compact(self, compaction: Compaction) -> None:
        """Let the optimizer hold the free entries alone from here on."""
        if self._compaction is None:
            self._compaction = compaction
            if self._handles and self.optimizer is not None:
                compaction.join(self.held, self.optimizer)

    def remove(self) -> None:
        """Stop guarding the optimizer for good; the frozen entries are then held by the model's own hooks alone."""
        self.suspend()
        self._optimizer = None

    def suspend(self) -> None:
        """Take the hooks off, until `install` puts them on again."""
        for handle in self._handles:
            handle.remove()
        if self._handles and self._compaction is not None and self.optimizer is not None:
            self._compaction.leave(self.held, self.optimizer)
        self._handles = []

    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Clean the gradients once more, where a reducer or a hand put something back, and guard the closure.

        In compact mode something else steps in the optimizer's place, and reads the gradients of free entries alone.
        """
        if self._compaction is not None and args[0] is optimizer:
            args = (self._compaction.begin_step(optimizer), *args[1:])
        held = list(self._held_by(optimizer))
        # Where every entry is stepped by its own numbers, a write to a gradient that autograd did not count can do no
        # more than dirty the moments of frozen entries: these are imposed after the step in any case.
        trusting = is_elementwise(optimizer) and not _is_distributed()
        for part, parameter, _ in held:
            if not (trusting and part.has_clean_gradient(parameter)):
                self._clean_gradient(part, parameter)
        # a hook behind this one, or a step of its own, may add parameters, put others in their place or thaw some
        self._stepped = held if is_elementwise(optimizer) and self._comes_last(optimizer) else None
        if len(args) > 1 and callable(args[1]):
            return (args[0], self._guarded(args[1], optimizer), *args[2:]), kwargs
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._guarded(kwargs["closure"], optimizer)}
        return args, kwargs

    def _comes_last(self, optimizer: Optimizer) -> bool:
        hooks = optimizer._optimizer_step_pre_hooks  # type: ignore[attr-defined]
        return next(reversed(hooks.values()), None) == self.before_step

    def _guarded(self, closure: Callable[[], Any], optimizer: Optimizer) -> Callable[[], Any]:
        """Return the closure, evaluated at imposed weights (LBFGS moves them in between), leaving clean gradients."""

        def guarded_closure() -> Any:
            if self._compaction is not None:
                self._compaction.before_closure()
            self._impose(optimizer)
            loss = closure()
            self._stepped = None  # parameters may have come and gone
            self._clean_gradients(optimizer)
            if self._compaction is not None:
                self._compaction.after_closure()
            return loss

        return guarded_closure

    def after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Impose the values on the parameters, and on state that holds weights."""
        self._has_stepped = True
        if self._compaction is not None:
            self._compaction.end_step(optimizer)
        held = self._held_by(optimizer) if self._stepped is None else self._stepped
        self._stepped = None
        keeps_weights = may_keep_weights(optimizer)
        for part, parameter, group in held:
            if not self._leaves_alone(parameter):
                part.impose(parameter)
                if keeps_weights:
                    impose_on_weights(optimizer.state.get(parameter) or {}, part, group)

    def _leaves_alone(self, parameter: Tensor) -> bool:
        """Return whether the optimizer steps the parameter's free entries alone."""
        return self._compaction is not None and self._compaction.holds(parameter)

    def _clean_gradients(self, optimizer: Optimizer) -> None:
        for part, parameter, _ in self._held_by(optimizer):
            self._clean_gradient(part, parameter)

    def _clean_gradient(self, part: FrozenPart, parameter: Tensor) -> None:
        watch_gradient(parameter, part)
        if not self._leaves_alone(parameter):
            part.clean_gradient(parameter)

    def _impose(self, optimizer: Optimizer) -> None:
        for part, parameter, _ in self._held_by(optimizer):
            if not self._leaves_alone(parameter):
                part.impose(parameter)

    def _held_by(self, optimizer: Optimizer) -> Iterator[tuple[FrozenPart, Tensor, dict[str, Any]]]:
        """Return each part with the parameter that it holds and the group in which the optimizer steps it."""
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        for part, parameter in self.held():
            group = groups.get(id(parameter))
            if group is not None:
                yield part, parameter, group

    def settle_now(self) -> None:
        """Settle the optimizer's state, where the optimizer still lives."""
        if self.optimizer is not None and self._handles:
            self.settle(self.optimizer)

    def settle(self, optimizer: Optimizer) -> None:
        """Make the optimizer's state what it would be had the frozen entries never moved."""
        if self._compaction is not None:
            self._compaction.settle(optimizer)
        held = [item for item in self._held_by(optimizer) if not self._leaves_alone(item[1])]
        for part, parameter, group in held:
            settle(optimizer.state.get(parameter) or {}, part, group)
        if self._compaction is None:
            settle_history(optimizer, [(part, parameter) for part, parameter, _ in held])


_WHERE: Final = (
    "_optimizer_step_post_hooks",
    "_optimizer_step_pre_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
"""Where torch keeps an optimizer's hooks, in the order in which a guard registers its own."""


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


_installed: Final[weakref.WeakSet[Guard]] = weakref.WeakSet()
"""Every guard that was installed and still lives: an optimizer cannot be found from what it steps."""


def living_guards() -> list[Guard]:
    """Return the guards of all handles whose hooks are on an optimizer that still lives."""
    return [guard for guard in _installed if guard.is_alive]


def guards_on(optimizer: Optimizer) -> list[Guard]:
    """Return the guards that handles have installed on an optimizer."""
    hooks = optimizer._optimizer_step_pre_hooks.values()  # type: ignore[attr-defined]
    owners = [getattr(hook, "__self__", None) for hook in hooks]
    return [owner for owner in owners if isinstance(owner, Guard)]


def compact_guards(guards: list[Guard]) -> None:
    """Let the optimizer of these guards hold the free entries alone, by one compaction that they share."""
    known = [guard.compaction for guard in guards if guard.compaction is not None]
    compaction = known[0] if known else Compaction()
    for guard in guards:
        guard.compact(compaction)


def compact_state_dict(optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimizer's state dict, with flat tensors of the free entries where it holds those alone."""
    for guard in guards_on(optimizer):
        if guard.compaction is not None:
            return guard.compaction.compact_state_dict(optimizer)
    return optimizer.state_dict()


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
