"""A small network for training on several ranks, and the single-process run that it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from freezehooks import MaskedOptimizer, entries, freeze_entries

from .claims import same_bits
from .zoo import Held

STEPS = 3

computes_in_shards = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"),
    reason="FSDP2 of this torch runs no forward on a CPU: it records events, which torch.cpu.Stream has not here",
)
"""Marks a test that runs an FSDP2 model; tests that only shard, freeze, save and load it run everywhere."""


class Net(nn.Module):
    """On two ranks `up` has 4 and 3 rows, `down` 2 and 1, and `last` has none on the second rank."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 5, 3)
        self.norm = nn.LayerNorm(45)
        self.up = nn.Linear(45, 7)
        self.down = nn.Linear(7, 3)
        self.last = nn.Linear(3, 1)

    def forward(self, images: Tensor) -> Any:
        hidden = self.norm(torch.tanh(self.conv(images)).flatten(1))
        return self.last(torch.tanh(self.down(torch.tanh(self.up(hidden)))))


SPEC: list[Any] = [
    "conv.weight[center] = 0.5",
    {"conv.bias": (torch.tensor([True, False, True, False, True]), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))},
    "norm.weight = 1",
    "up.weight[:, ::3] = -0.0",
    "up.weight[5:, 1] = 0.1",
    "up.bias[6] = 1",  # on the last rank alone
    "down.weight[smallest(0.4)]",
    "down.bias",
    {"last.weight": (entries[:, 1:], torch.tensor([[0.0, 0.25, -0.75]]))},
]

# Without regions that depend on numbers, which differ in a model that is loaded later.
FIXED: list[Any] = [rule for rule in SPEC if "smallest" not in str(rule)] + ["down.weight[:, 2:5]"]


def build(seed: int = 1, dtype: torch.dtype = torch.float64) -> Net:
    """Return the same network on every rank; in double precision, so that a reduction rounds little."""
    torch.manual_seed(seed)
    return Net().to(dtype)


def adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)


def batch(step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(8, 1, 5, 5, generator=torch.Generator().manual_seed(step)).to(dtype)


def my_part(whole_batch: Tensor) -> Tensor:
    """Return what this rank sees of a batch."""
    return whole_batch.chunk(dist.get_world_size())[dist.get_rank()]


def loss_of(output: Any) -> Tensor:
    return (output - 0.3).square().mean()  # type: ignore[no-any-return]  # a Tensor, or a DTensor


def whole(tensor: Tensor) -> Tensor:
    """Return a parameter, gradient or state in full, on every rank."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def plain_name(name: str) -> str:
    for prefix in ("_checkpoint_wrapped_module.", "_orig_mod.", "module."):
        name = name.replace(prefix, "")
    return name


def wholes(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter in full, by its plain name."""
    return {plain_name(name): whole(parameter) for name, parameter in model.named_parameters()}


class OneProcess:
    """The same training in one process, on the whole batch."""

    def __init__(
        self,
        spec: Any = SPEC,
        make: Callable[[nn.Module], Optimizer] = adamw,
        model: nn.Module | None = None,
    ) -> None:
        self.model = model or build()
        self.frozen = freeze_entries(self.model, spec)
        self.optimizer = MaskedOptimizer(make(self.model), self.frozen)
        parameters = dict(self.model.named_parameters())
        self.held = {name: Held(part.frozen, parameters[name].detach().clone()) for name, part in self.frozen.items()}

    def train(self, steps: int = STEPS, start: int = 0, clip: float | None = None) -> OneProcess:
        for step in range(start, start + steps):
            self.optimizer.zero_grad()
            loss_of(self.model(batch(step).to(next(self.model.parameters()).dtype))).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), clip)
            self.optimizer.step()
        return self

    def assert_same(self, model: nn.Module, tolerance: float = 1e-9) -> None:
        """Claim: every entry is as in one process, the frozen ones bit for bit."""
        found, expected = wholes(model), wholes(self.model)
        assert set(found) == set(expected)
        for name, tensor in expected.items():
            assert torch.allclose(found[name], tensor, tolerance, tolerance), (name, found[name] - tensor)
        self.assert_held(found)

    def assert_held(self, tensors: dict[str, Tensor]) -> None:
        """Claim: every frozen entry equals its value bit for bit."""
        for name, part in self.held.items():
            found = whole(tensors[name])[part.frozen]
            assert same_bits(found, part.values[part.frozen].to(found.dtype)), f"{name} drifted to {found}"

    def assert_clean(self, model: nn.Module) -> None:
        """Claim: the gradient at every frozen entry is exactly +0.0."""
        gradients = {plain_name(name): p.grad for name, p in model.named_parameters() if p.grad is not None}
        for name, part in self.held.items():
            found = whole(gradients[name])[part.frozen]
            assert same_bits(found, torch.zeros_like(found)), f"the gradient of {name} is {found} at frozen entries"


def train(
    model: nn.Module,
    optimizer: Optimizer,
    reference: OneProcess,
    steps: int = STEPS,
    start: int = 0,
    share: Callable[[Tensor], Tensor] = my_part,
    before_step: Callable[[], None] = lambda: None,
) -> None:
    """Train on this rank's share of each batch, and check gradients and weights in every step."""
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss_of(model(share(batch(step)))).backward()
        reference.assert_clean(model)
        before_step()
        optimizer.step()
        reference.assert_held(wholes(model))
