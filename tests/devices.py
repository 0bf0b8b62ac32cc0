"""On which device the tests run, from outside: `FREEZEHOOKS_TEST_DEVICE=cuda`; the CPU by default.

A test makes its tensors on that device without naming it: it is torch's default device while a module of tests is
imported, and while a test runs. It is so in the thread of pytest alone: what another thread works with is made before.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fnmatch import fnmatch
from typing import Any, Final

import pytest
import torch

VARIABLE: Final = "FREEZEHOOKS_TEST_DEVICE"
FROM_OUTSIDE: Final = os.environ.get(VARIABLE) or "cpu"

ON_CPU: Final = {
    "accelerate": "the framework chooses the device",
    "averaging": "Lightning chooses the device",
    "benchmarks": "measured on the CPU; what is for CUDA names it",
    "cli*": "the command line reads checkpoints to the CPU",
    "comparison": "a page's figures and texts",
    "costs": "processes that talk by gloo",
    "cuda": "names CUDA itself",
    "ddp": "processes that talk by gloo",
    "distributed": "processes that talk by gloo",
    "docs": "blocks of pages as they are printed",
    "errors": "messages, written before a kernel runs",
    "examples": "programs as they are printed",
    "fabric": "the framework chooses the device",
    "frameworks": "the framework chooses the device",
    "grammar": "text, no tensors",
    "guarantees": "a page's table",
    "house": "imports",
    "lightning": "Lightning chooses the device",
    "memory": "counts what the CPU's kernels allocate",
    "migration": "a page's texts",
    "monitor": "Lightning and the Trainer choose the device",
    "notebook": "messages, and tools that walk through data",
    "package": "the wheel",
    "peft": "PEFT loads adapters to a device of its choice",
    "plot": "pictures",
    "rules_page": "a page's tables",
    "sharded": "processes that talk by gloo",
    "stages": "Lightning and the Trainer choose the device",
    "strategies": "processes that talk by gloo",
    "tools": "no tensors",
    "train_only_trainer": "the Trainer chooses the device",
    "transformers": "the Trainer chooses the device",
}
"""The files of tests that run on the CPU whatever device is named, and why; `on_cpu` marks a test of another file."""

on_cpu = pytest.mark.on_cpu
"""Marks a test that runs on the CPU whatever device is named; its argument says why."""


def why_not(device: str) -> str | None:
    """Return why tests cannot run on a device, or None if they can."""
    try:
        torch.ones(1, device=device).add_(1).cpu()
    except Exception as error:  # each device and release says it by another one
        said = str(error).splitlines()[0]
        return f"the tests cannot run on `{device}`: {said} Leave out --device and {VARIABLE} to run them on the CPU"
    return None


def prepare(device: str) -> None:
    """Ask CUDA for convolutions that round to full precision, and for products that can be repeated bit for bit."""
    if torch.device(device).type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product is computed


def device_of(node: pytest.Item | pytest.Collector, named: str) -> torch.device:
    """Return the device that a test runs on, or a module is imported on: the one named, unless it is about the CPU."""
    _, is_test, name = node.path.stem.rpartition("test_")
    about_cpu = not is_test or any(fnmatch(name, each) for each in ON_CPU) or node.get_closest_marker("on_cpu")
    return torch.device("cpu" if about_cpu else named)


def default(device: torch.device) -> AbstractContextManager[Any]:
    """Make a device torch's default; the CPU is it already, and a context would slow every call down."""
    return nullcontext() if device.type == "cpu" else device


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Have CUDA add in the same order in every run, since tests compare bits; the CPU does so anyway."""
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    if is_cuda:
        torch.use_deterministic_algorithms(False)
