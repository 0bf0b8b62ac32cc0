"""The layers, which are modules, and the callbacks of the frameworks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

from freezehooks import FrozenEntries, Rule, cross, freeze_entries
from freezehooks.integrations.lightning import FreezeEntries, FrozenEntriesMonitor
from freezehooks.integrations.transformers import FreezeEntriesCallback
from freezehooks.layers import (
    MaskedConv1d,
    MaskedConv2d,
    MaskedConv3d,
    SharedKernelConv1d,
    SharedKernelConv2d,
    SharedKernelConv3d,
    SynthesizedConv1d,
    SynthesizedConv2d,
    SynthesizedConv3d,
)


def masked_are_convolutions(taps: Tensor) -> tuple[nn.Conv1d, nn.Conv2d, nn.Conv3d]:
    narrow = MaskedConv1d(1, 2, 3, mask=taps, bias_at=taps)
    flat = MaskedConv2d(1, 2, (3, 3), mask="cross", dtype=torch.float64)
    deep = MaskedConv3d(1, 2, kernel_size=3, mask=cross(3), bias_at="response")
    assert_type(deep.mask, Tensor)
    return narrow, flat, deep


def the_others_are_modules(generator: nn.Module) -> list[nn.Module]:
    shared = [SharedKernelConv1d(2, 3), SharedKernelConv2d(2, 3), SharedKernelConv3d(2, 3)]
    made = [
        SynthesizedConv1d(generator, 4, 2, kernel_size=1),
        SynthesizedConv2d(generator, 4, 2, kernel_size=1, bias=False),
        SynthesizedConv3d(generator, 4, 2, kernel_size=1),
    ]
    return [*shared, *made]


def a_layer_is_frozen_as_any_module(shared: SharedKernelConv2d) -> FrozenEntries:
    return freeze_entries(nn.Sequential(shared, nn.ReLU()), "0.weight[0] = 0")


def callbacks(rule: Rule) -> list[FrozenEntries | None]:
    for_lightning = FreezeEntries("net.conv.weight[center] = 0", until_epoch=10, compact=True)
    FreezeEntries(train_only=["head[0]"], from_epoch=2, until_epoch=4)
    FreezeEntriesCallback(train_only="head[0]", from_epoch=2)
    for_transformers = FreezeEntriesCallback([rule, "transformer.wte[~50257:]"], until_epoch=2)
    assert_type(for_lightning.rules, tuple[Rule, ...])
    assert_type(for_transformers.rules, tuple[Rule, ...])
    return [for_lightning.frozen, for_transformers.frozen]


def a_monitor_beside_a_callback(callback: FreezeEntries) -> list[FreezeEntries | FrozenEntriesMonitor]:
    monitor = FrozenEntriesMonitor(every_n_steps=10)
    assert_type(monitor.every_n_steps, int | None)
    return [callback, monitor, FrozenEntriesMonitor()]


def wrong_layers_and_callbacks() -> None:
    MaskedConv2d(1, 2, 3)  # type: ignore[call-arg]
    MaskedConv2d(1, 2, 3, mask=None)  # type: ignore[arg-type]
    MaskedConv2d(1, 2, 3, mask="cross", bias_at=0)  # type: ignore[arg-type]
    SharedKernelConv2d("2", 3)  # type: ignore[arg-type]
    SynthesizedConv2d(3, 4, 2, kernel_size=1)  # type: ignore[arg-type]
    FreezeEntriesCallback(until_epoch=None, compact="yes")  # type: ignore[arg-type]
    FreezeEntriesCallback("weight", until_epoch="2")  # type: ignore[arg-type]
    FreezeEntries("weight", until_epoch="2")  # type: ignore[arg-type]
    FrozenEntriesMonitor(10)  # type: ignore[call-arg]
    FrozenEntriesMonitor(every_n_steps="10")  # type: ignore[arg-type]
