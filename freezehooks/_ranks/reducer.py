"""What DistributedDataParallel waits for: the gradient of every parameter that trained when it wrapped the model."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from .._errors import UnsupportedParameterError


def check_may_stop_training(model: Any, trained: Collection[int]) -> None:
    """Refuse to keep parameters from training for whose gradients DistributedDataParallel would wait.

    Torch says so in the second forward, after a first step that each rank has made by its own gradients.

    Args:
        model: A module, or a mapping of bare tensors, which nothing wraps.
        trained: The `id` of each parameter that is to train, at least in part.

    Raises:
        UnsupportedParameterError: Such a wrapper is in the model, and does not look for unused parameters.
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
