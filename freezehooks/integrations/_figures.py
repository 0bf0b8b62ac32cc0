"""The figures that callbacks of all frameworks log about frozen entries during training."""

from __future__ import annotations

from typing import Final

from torch import Tensor, nn
from torch.optim import Optimizer

from .._handle import FrozenEntries
from .._held.parameter import FrozenParameter
from .._optim.state import stepped_by
from .._report.monitor import drift, gradient_norms

_PREFIX: Final = "freezehooks"


def figures(model: nn.Module, *, before_step_of: Optimizer | None = None) -> dict[str, float]:
    """Return figures on a model's frozen entries: norms of gradients before a step, or drift after it.

    Args:
        model: The module whose names for the parameters are used.
        before_step_of: The optimizer that is about to step: the figures are the gradient norms, over frozen and over
            free entries, of the parameters that it steps. Left out: the figures are the drift of every parameter
            with frozen entries.

    Returns:
        Numbers by the names under which every framework logs them: ``freezehooks/<name>/drift``,
        ``.../gradient_norm_frozen`` and ``.../gradient_norm_free``.
    """
    watched = _watched(model)
    if before_step_of is None:
        return {f"{_PREFIX}/{name}/drift": drift(held, parameter) for name, held, parameter in watched}
    found: dict[str, float] = {}
    stepped = stepped_by(before_step_of)
    for name, held, parameter in watched:
        norms = gradient_norms(held, parameter) if id(parameter) in stepped else None
        if norms is not None:
            found[f"{_PREFIX}/{name}/gradient_norm_frozen"] = norms.frozen
            found[f"{_PREFIX}/{name}/gradient_norm_free"] = norms.free
    return found


def _watched(model: nn.Module) -> list[tuple[str, list[FrozenParameter], Tensor]]:
    """Return the name of each parameter with frozen entries, what each handle freezes in it, and the parameter."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    held: dict[Tensor, list[FrozenParameter]] = {}
    for handle in FrozenEntries.of(model):
        for frozen, parameter in handle.held():
            held.setdefault(parameter, []).append(frozen)
    return [(names.get(parameter, found[0].name), found, parameter) for parameter, found in held.items()]
