"""Ways to hold some entries of a weight, each written as its users write it, for the page that compares them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import pytest
import torch
from torch import Tensor, nn
from torch.ao.pruning.sparsifier.weight_norm_sparsifier import WeightNormSparsifier
from torch.nn.utils import parametrize, prune
from torch.optim import Optimizer

from freezehooks import MaskedOptimizer, freeze_entries


class Way:
    """Nothing is frozen: the reference for the others.

    Args:
        model: The model, which is changed.
        frozen: Which entries of its `0.weight` are held, at what they contain now.
    """

    title = "plain"

    def __init__(self, model: Any, frozen: Tensor) -> None:
        self.model = model
        self.frozen = frozen
        self.free = (~frozen).to(model[0].weight.dtype)
        self.fixed = torch.where(frozen, model[0].weight.detach(), 0.0)
        self.hold()

    def hold(self) -> None:
        """Freeze."""

    def protect(self, optimizer: Optimizer) -> Optimizer:
        """Prepare an optimizer as this way requires."""
        return optimizer

    def step(self, optimizer: Optimizer) -> None:
        """Step, with what this way does around it."""
        optimizer.step()

    def stored(self) -> Tensor:
        """The tensor that a checkpoint has for the weight."""
        weight: Tensor = self.model[0].weight
        return weight

    def computed(self) -> Tensor:
        """The weight that a forward computes with."""
        weight: Tensor = self.model[0].weight
        return weight

    def trained(self) -> Tensor:
        """The tensor through which the free entries learn."""
        return self.stored()

    def remove(self) -> None:
        """Return the plain model."""

    def trainable(self) -> list[Tensor]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


class FreezeHooks(Way):
    """This library."""

    title = "freezehooks"

    def hold(self) -> None:
        self.handle = freeze_entries(self.model, {"0.weight": self.frozen})

    def protect(self, optimizer: Optimizer) -> Optimizer:
        return MaskedOptimizer(optimizer, self.handle)

    def computed(self) -> Tensor:
        return _seen_by_a_forward(self.model[0])

    def remove(self) -> None:
        self.handle.remove()


class _Times:
    def __init__(self, free: Tensor) -> None:
        self.free = free

    def __call__(self, gradient: Tensor) -> Tensor:
        return gradient * self.free


class GradientHook(Way):
    """The answer most often given on the web."""

    title = "gradient hook"

    def hold(self) -> None:
        self.handle = self.model[0].weight.register_hook(_Times(self.free))

    def remove(self) -> None:
        self.handle.remove()


class MaskAroundStep(Way):
    """A training loop that masks the gradient before the step, and the weight after it."""

    title = "mask around the step"

    def step(self, optimizer: Optimizer) -> None:
        weight = self.model[0].weight
        weight.grad.mul_(self.free)
        optimizer.step()
        with torch.no_grad():
            weight.mul_(self.free).add_(self.fixed)


class Prune(Way):
    title = "`prune`"

    def hold(self) -> None:
        prune.custom_from_mask(self.model[0], "weight", self.free)

    def stored(self) -> Tensor:
        weight: Tensor = self.model[0].weight_orig
        return weight

    def computed(self) -> Tensor:
        return _seen_by_a_forward(self.model[0])

    def remove(self) -> None:
        prune.remove(self.model[0], "weight")


class _Fixed(nn.Module):
    free: Tensor
    fixed: Tensor

    def __init__(self, free: Tensor, fixed: Tensor) -> None:
        super().__init__()
        self.register_buffer("free", free)
        self.register_buffer("fixed", fixed)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.free + self.fixed


class Parametrize(Way):
    title = "`parametrize`"

    def hold(self) -> None:
        parametrize.register_parametrization(self.model[0], "weight", _Fixed(self.free, self.fixed))

    def stored(self) -> Tensor:
        weight: Tensor = self.model[0].parametrizations.weight.original
        return weight

    def remove(self) -> None:
        parametrize.remove_parametrizations(self.model[0], "weight")


class Sparsifier(Parametrize):
    """The sparsifier of torch.ao, with a mask set by hand instead of one by the norms of the weights."""

    title = "`torch.ao` sparsifier"

    def hold(self) -> None:
        self.sparsifier = WeightNormSparsifier()
        self.sparsifier.prepare(self.model, [{"tensor_fqn": "0.weight"}])
        self.model[0].parametrizations.weight[0].mask.copy_(self.free)

    def remove(self) -> None:
        self.sparsifier.squash_mask()


class PeftTokens(Way):
    """PEFT's trainable tokens."""

    title = "PEFT tokens"

    def hold(self) -> None:
        peft: Any = pytest.importorskip("peft")
        learned = (~self.frozen).flatten(1).any(dim=1).nonzero().flatten().tolist()
        config = peft.TrainableTokensConfig(token_indices=learned, target_modules=["0"])
        others = [parameter for parameter in self.model.parameters() if parameter is not self.model[0].weight]
        self.wrapped = peft.PeftModel(self.model, config)
        for parameter in others:
            parameter.requires_grad_(True)

    def stored(self) -> Tensor:
        weight: Tensor = self.model[0].base_layer.weight
        return weight

    def computed(self) -> Tensor:
        weight: Tensor = self.model[0].get_merged_weights(["default"])
        return weight

    def trained(self) -> Tensor:
        delta: Tensor = self.model[0].trainable_tokens_delta["default"]
        return delta

    def remove(self) -> None:
        self.model = self.wrapped.merge_and_unload()
        self.model[0].weight.requires_grad_(True)


class RequiresGrad(Way):
    """Freezes the whole tensor, since PyTorch can only do that."""

    title = "`requires_grad_(False)`"

    def hold(self) -> None:
        self.model[0].weight.requires_grad_(False)

    def remove(self) -> None:
        self.model[0].weight.requires_grad_(True)


def _seen_by_a_forward(layer: Any) -> Tensor:
    """The weight after the hooks that come before a forward."""
    if isinstance(layer, nn.Embedding):
        out: Tensor = layer(torch.arange(layer.num_embeddings))
        return out
    layer(torch.zeros(1, *layer.weight.shape[1:]))
    weight: Tensor = layer.weight
    return weight


WAYS: Final[tuple[type[Way], ...]] = (
    FreezeHooks,
    GradientHook,
    MaskAroundStep,
    Prune,
    Parametrize,
    Sparsifier,
    PeftTokens,
    RequiresGrad,
)

# --------------------------------------------------------------------------------------------------------------------
# The task: six rows of an embedding, of which the first four are held

ROWS: Final = torch.arange(6)[:, None].expand(6, 3) < 4


def embedding(value: float = 0.0) -> Any:
    """A model whose embedding has four rows to hold at a value."""
    model: Any = nn.Sequential(nn.Embedding(6, 3), nn.Linear(3, 2))
    model[0].weight.data[ROWS] = value
    return model


def backward(model: Any, forward: Callable[[Tensor], Tensor] | None = None) -> None:
    """Give every entry of the embedding a gradient, through the model or what was compiled from it."""
    model.zero_grad()
    ((forward or model)(torch.arange(6)) - 1).square().sum().backward()


def train(way: Way, optimizer: Optimizer, forward: Callable[[Tensor], Tensor] | None = None) -> None:
    """Take three steps."""
    for _ in range(3):
        backward(way.model, forward)
        way.step(optimizer)


def warm(model: nn.Module, make: Callable[..., Optimizer]) -> Optimizer:
    """An optimizer that has trained the model for three steps before anything was frozen."""
    optimizer = make(model.parameters())
    for _ in range(3):
        backward(model)
        optimizer.step()
    return optimizer


def adopt(optimizer: Optimizer, way: Way) -> None:
    """Give an optimizer the parameters that a way adds to the model."""
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    new = [parameter for parameter in way.trainable() if id(parameter) not in known]
    if new:
        optimizer.add_param_group({"params": new})
