"""What callbacks log of frozen entries while they train, whichever framework calls them."""

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
    """Return what to log of a model's frozen entries now: gradients before a step, or drift after it.

    Args:
        model: The module by whose names the parameters are logged.
        before_step_of: The optimizer that is about to step; of the parameters that it steps and that have a gradient
            the norms are returned, over the frozen entries and over the free ones. Left out: of every parameter with
            frozen entries the drift, as it is after a step.

    Returns:
        Numbers by the names under which every framework logs them: ``freezehooks/<name>/drift``,
        ``.../gradient_norm_frozen`` and ``.../gradient_norm_free``.
    """
    watched = _watched(model)
    if before_step_of is None:
        return {f"{_PREFIX}/{name}/drift": drift(parts, parameter) for name, parts, parameter in watched}
    found: dict[str, float] = {}
    stepped = stepped_by(before_step_of)
    for name, parts, parameter in watched:
        norms = gradient_norms(parts, parameter) if id(parameter) in stepped else None
        if norms is not None:
            found[f"{_PREFIX}/{name}/gradient_norm_frozen"] = norms.frozen
            found[f"{_PREFIX}/{name}/gradient_norm_free"] = norms.free
    return found


def _watched(model: nn.Module) -> list[tuple[str, list[FrozenParameter], Tensor]]:
    """Return the model's parameters that have frozen entries, with what each handle freezes of them."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    parts: dict[Tensor, list[FrozenParameter]] = {}
    for handle in FrozenEntries.of(model):
        for part, parameter in handle.held():
            parts.setdefault(parameter, []).append(part)
    return [(names.get(parameter, found[0].name), found, parameter) for parameter, found in parts.items()]
