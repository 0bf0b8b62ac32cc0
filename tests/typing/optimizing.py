"""`MaskedOptimizer` where an `Optimizer` is expected, and what guarding returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, StepLR
from typing_extensions import assert_type

from freezehooks import FrozenEntries, Guard, MaskedOptimizer, freeze_entries


def taken_as_an_optimizer(model: nn.Module, frozen: FrozenEntries) -> list[Optimizer]:
    optimizer = MaskedOptimizer(AdamW(model.parameters()), frozen)
    assert_type(optimizer, MaskedOptimizer)
    assert_type(optimizer.inner, Optimizer)
    assert_type(optimizer.frozen, tuple[FrozenEntries, ...])
    assert_type(optimizer.param_groups, list[dict[str, Any]])
    return [optimizer, optimizer.inner]


def one_handle_or_several(optimizer: SGD, frozen: FrozenEntries, other: FrozenEntries) -> None:
    MaskedOptimizer(optimizer, frozen, compact=True)
    MaskedOptimizer(optimizer, [frozen, other])
    MaskedOptimizer(optimizer, FrozenEntries.of(nn.Linear(1, 1)))
    MaskedOptimizer(optimizer, ())


def under_a_scheduler(optimizer: MaskedOptimizer) -> list[LRScheduler]:
    return [StepLR(optimizer, 3), CosineAnnealingLR(optimizer, T_max=10), LambdaLR(optimizer, lambda epoch: 0.9**epoch)]


def under_a_grad_scaler(model: nn.Module, optimizer: MaskedOptimizer, batch: torch.Tensor) -> None:
    scaler = torch.amp.GradScaler("cpu")
    with torch.autocast("cpu"):
        loss = model(batch).sum()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


def with_a_closure_and_a_checkpoint(optimizer: MaskedOptimizer) -> dict[str, Any]:
    optimizer.step()
    optimizer.step(lambda: 0.0)
    optimizer.load_state_dict(optimizer.state_dict())
    return optimizer.state_dict(compact=True)


def guarded_without_a_wrapper(model: nn.Module, optimizer: Optimizer) -> None:
    guard = freeze_entries(model, "weight[0] = 0").guard(optimizer, compact=True)
    assert_type(guard, Guard)
    assert_type(guard.optimizer, Optimizer | None)
    assert_type(guard.nbytes, int)
    guard.remove()


def wrong_optimizers(model: nn.Module, optimizer: SGD, frozen: FrozenEntries) -> None:
    MaskedOptimizer(optimizer)  # type: ignore[call-arg]
    MaskedOptimizer(model.parameters(), frozen)  # type: ignore[arg-type]
    MaskedOptimizer(optimizer, "weight[0] = 0")  # type: ignore[arg-type]
    MaskedOptimizer(optimizer, frozen, True)  # type: ignore[call-arg]
    MaskedOptimizer(optimizer, frozen, compact="yes")  # type: ignore[arg-type]
    frozen.guard(model)  # type: ignore[arg-type]
    frozen.guard(optimizer, True)  # type: ignore[call-arg]
    guard: MaskedOptimizer = frozen.guard(optimizer)  # type: ignore[assignment]
    del guard
