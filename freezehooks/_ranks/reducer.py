"""Checks what DistributedDataParallel waits for: gradients of all parameters that trained when it wrapped the model."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from .._errors import UnsupportedParameterError


def check_may_stop_training(model: Any, trained: Collection[int]) -> None:
    """Reject parameters that are to stop training while DistributedDataParallel would wait for their gradients.

    torch itself raises only in the second forward, after each rank has made a step with nothing but its own gradients.

    Args:
        model: A module, or a mapping of bare tensors, which cannot be wrapped.
        trained: The `id` of each parameter with at least one entry that trains.

    Raises:
        UnsupportedParameterError: The model contains such a wrapper, and it does not look for unused parameters.
    """
    for wrapper in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(wrapper, nn.parallel.DistributedDataParallel) and not _looks_for_unused(wrapper):
            for name, parameter in wrapper.module.named_parameters():
                if parameter.requires_grad and id(parameter) not in trained:
                    raise UnsupportedParameterError(
                        f"`{name}` is not to train, and DistributedDataParallel, which has wrapped it already, would "
                        "wait for its gradient",
                        "call train_only before wrapping, or wrap with find_unused_parameters=True",
                    )


def _looks_for_unused(wrapper: nn.parallel.DistributedDataParallel) -> bool:
    return bool(wrapper.find_unused_parameters or wrapper.static_graph)
