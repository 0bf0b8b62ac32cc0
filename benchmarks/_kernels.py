"""Counts the kernels that a step launches on a CUDA device."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.profiler import ProfilerActivity, profile


def kernels_launched(step: Callable[[], object], device: torch.device) -> int | None:
    """Return how many kernels a step launches, beside copies of memory; None on the CPU, which launches none."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize(device)
    return launches(event.name for event in profiled.events() or ())


def launches(calls: Iterable[str]) -> int:
    """Count those of the host's calls that launch a kernel, through the runtime or the driver."""
    return sum("LaunchKernel" in call or "LaunchCooperativeKernel" in call for call in calls)
