"""Notes on rules that freeze more than was probably meant: a whole parameter by a union, or the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from .._counted import counted
from .._errors import shortened
from .._held.held import HeldParameters, Model
from .._hooks.gradient import watching
from .._rules.region import Index, Or, Union
from .trainable import count_frozen


def whole_unions(held: HeldParameters) -> Iterator[str]:
    """Yield a note for each rule whose region is a union that covers every entry of a parameter."""
    for name in held.names:
        frozen = held.frozen.by_name[name]
        for constraint in frozen.constraints:
            is_union = _is_union(constraint.rule.region)
            if is_union and not frozen.is_sharded and constraint.entries.count == frozen.shape.numel():
                yield (
                    f"rule `{shortened(constraint.rule)}` freezes all {frozen.shape.numel():,} entries of `{name}`: if "
                    f"that is meant, name `{name}` without brackets"
                )


def _is_union(region: Any) -> bool:
    return isinstance(region, Or) or (
        isinstance(region, Index) and any(isinstance(item, Union) for item in region.items)
    )


def nothing_trains(model: Model) -> Iterator[str]:
    """Yield a note if every entry that required a gradient is frozen."""
    parameters = [each for each in model.parameters() if each.requires_grad] if isinstance(model, nn.Module) else []
    for parameter in parameters:  # usually one of the first trains
        if is_lazy(parameter) or count_frozen(watching(parameter)) < parameter.numel():
            return
    if parameters:
        total = sum(parameter.numel() for parameter in parameters)
        yield (
            f"nothing in the model trains: {counted(total, 'entry', 'entries')} of {total:,} in "
            f"{counted(len(parameters), 'parameter', 'parameters')} are frozen; leave out what trains, or name it "
            "with train_only"
        )
