"""Counts bytes: those of an object's tensors, and the most allocated at once in a step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

from freezehooks import FrozenEntries


def held_bytes(frozen: FrozenEntries) -> int:
    """Return how many bytes a handle keeps in addition to its model: positions, bits and values."""
    return frozen.nbytes


def state_bytes(optimizer: Optimizer) -> int:
    """Return how many bytes an optimizer's state has."""
    return tensor_bytes(dict(optimizer.state))


def tensor_bytes(root: object, beyond: Iterable[Tensor] = ()) -> int:
    """Return the bytes of all tensors that are reachable from an object, each storage once.

    Args:
        root: A tensor, a container, or an object with attributes.
        beyond: Tensors whose storages do not count.
    """
    others = {tensor.untyped_storage().data_ptr() for tensor in beyond}
    storages = [tensor.untyped_storage() for tensor in tensors(root)]
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in others}.values())


def tensors(root: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Yield the tensors that are reachable from an object, without looking into functions and classes."""
    seen = set() if seen is None else seen
    if id(root) in seen or isinstance(root, type | ModuleType | FunctionType | str | bytes):
        return
    seen.add(id(root))
    if isinstance(root, Tensor):
        yield root
    for inside in _insides(root):
        yield from tensors(inside, seen)


def _insides(root: Any) -> Iterable[Any]:
    if isinstance(root, Tensor):
        return ()
    if isinstance(root, Mapping):
        return list(root.values())  # not the keys: those of an optimizer's state are the parameters
    if isinstance(root, list | tuple | set | frozenset):
        return root
    slots = [getattr(root, name, None) for kind in type(root).__mro__ for name in getattr(kind, "__slots__", ())]
    return [*getattr(root, "__dict__", {}).values(), *slots]


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes allocated at once in a step.

    Freeing memory from before the step reduces the number on CUDA, and is not seen on the CPU.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    return max(itertools.accumulate(_allocations(profiled), initial=0))


def _allocations(profiled: profile) -> Iterator[int]:
    """Yield what the CPU allocator allocated, as positive numbers, and freed, as negative ones, in order of time."""
    results: Any = profiled.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        yield event.nbytes()
