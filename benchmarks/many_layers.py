"""What each frozen parameter costs: a few entries of each of very many small layers are held."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Final

from torch.optim import SGD, AdamW

from ._comparison import Case, Options, compare
from ._data import MakeOptimizer, reproduce, rows
from .alternatives import AT_ZERO, Prune
from .models import Chain
from .subjects import OURS, FreezeHooks, Held, Task

_OPTIMIZERS: Final[dict[str, MakeOptimizer]] = {
    "SGD(foreach=True)": partial(SGD, lr=1e-3, foreach=True),
    "AdamW(foreach=True)": partial(AdamW, foreach=True),
}


def many(options: Options) -> Iterator[Case]:
    """One slice of every layer of a chain is held at 0; on CUDA, only in the longest chain.

    Must hold: a frozen parameter adds at most 20 microseconds to a step, and in the longest chain at most half as much
    again as in the one before. In the longest chain a step takes at most 1.15 times as long as a plain one (1.03 times
    on CUDA), and no longer than with torch's `prune`.
    """
    on_cuda = options.device.type == "cuda"
    *shorter, longest = options.sizes.chains
    for name, optimizer in _OPTIMIZERS.items():
        before: float | None = None
        for length in () if on_cuda else shorter:
            case = _chain(length, name, optimizer, options)
            before = _claim_each(case, length)
            yield case
        case = _chain(longest, name, optimizer, options)
        _claim_each(case, longest, before)
        case.rows[FreezeHooks.name].claim_ratio(1.03 if on_cuda else 1.15)
        case.claim_not_above(Prune)
        yield case


def _chain(length: int, name: str, optimizer: MakeOptimizer, options: Options) -> Case:
    model = Chain(length).to(options.device)
    held = [Held(f"layers.{n}.weight", (slice(None), 0)) for n in range(length)]
    steps = max(options.steps, options.sizes.chains[-1] // length)
    task = Task(model, rows((32, 16), options.device), reproduce, optimizer, held, "layers.*.weight[:, 0] = 0", steps)
    return compare(f"a slice of each of {length:,} layers at 0, {name}", [*OURS, *AT_ZERO], task, options, rounds=30)


def _claim_each(case: Case, length: int, before: float | None = None) -> float:
    """Claim how much time a frozen parameter adds to a step, also compared with the chain before, and return it."""
    row = case.rows[FreezeHooks.name]
    each = 1e3 * row.added.median / length
    row.claim(f"at most 20 us a parameter, found {each:.1f}", each <= 20)
    if before is not None:
        row.claim(f"linear, {before:.1f} before", each - before <= 0.5 * abs(before))
    return each
