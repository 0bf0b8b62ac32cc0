"""The environment that figures depend on: allocator, threads, device. It is fixed if possible, and always printed."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Final

import torch

_KEPT_MEMORY: Final = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1", "MALLOC_TOP_PAD_": "67108864"}
"""Otherwise glibc returns every big temporary to the system, and the next one causes page faults: for an embedding's
gradient they take ten times as long as filling it, which penalizes the subject that allocates more."""

_CUDA_ALLOCATOR: Final = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}

_QUIET: Final = {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}
"""Otherwise torch's profiler, which counts the bytes of a step, prints a few lines between those of each table."""


def restart(device: torch.device, keep_memory: bool) -> None:
    """Restart this process with the same arguments, in the environment that measuring needs.

    Variables that are set already stay as they are; if none is missing, this returns.

    Args:
        device: Where the models will be.
        keep_memory: Whether to make the allocator keep its memory. On the CPU this works with glibc only.
    """
    wanted = dict(_QUIET)
    if keep_memory:
        wanted |= _KEPT_MEMORY if platform.libc_ver()[0] == "glibc" else {}
        wanted |= _CUDA_ALLOCATOR if device.type == "cuda" else {}
    missing = {name: value for name, value in wanted.items() if name not in os.environ}
    if missing:
        command = [sys.executable, "-m", "benchmarks", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **missing})  # noqa: S606  # itself, without a shell


def environment(device: torch.device) -> dict[str, str]:
    """Describe the machine."""
    prefixes = ("MALLOC_", "PYTORCH_", "GLIBC_TUNABLES", "LD_PRELOAD")
    variables = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(prefixes)]
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "allocator": " ".join([*(part for part in platform.libc_ver() if part), *variables]) or "default",
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
