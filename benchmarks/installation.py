"""How long freezing itself takes, before any training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from freezehooks import freeze_entries

from ._comparison import Case, Options, Row
from ._measure import Clock, Spread, Timing, interleave
from .models import Chain


def install(options: Options) -> Iterator[Case]:
    """A thousand parameters are frozen by one rule with a wildcard, and ten million entries by one mask.

    Must hold: each takes less than a second.
    """
    sizes = options.sizes
    chain = Chain(sizes.chains[-1]).to(options.device)
    matrix = nn.Linear(sizes.mask[1], sizes.mask[0], bias=False, device=options.device)
    jobs: dict[str, tuple[nn.Module, Any]] = {
        f"{len(chain.layers):,} parameters": (chain, "layers.*.weight[:, 0] = 0"),
        f"{matrix.weight.numel():,} entries": (matrix, {"weight": (torch.rand_like(matrix.weight) < 0.5, 0)}),
    }
    turns = {name: Installation(model, spec, Clock(options.device)).turn for name, (model, spec) in jobs.items()}
    rows = {}
    for name, timings in interleave(turns, *options.turns(5)).items():
        row = rows[name] = Row(name, Spread.of([1e3 * timing.whole for timing in timings]))
        row.claim("under 1 s", row.time.median < 1e3)
    yield Case("installing", rows)


class Installation:
    """Freezes a model, and removes the handle again."""

    def __init__(self, model: nn.Module, spec: Any, clock: Clock) -> None:
        self.model = model
        self.spec = spec
        self.clock = clock

    def turn(self, number: int) -> Timing:
        """Return how long it took to freeze."""
        start = self.clock()
        frozen = freeze_entries(self.model, self.spec)
        spent = self.clock() - start
        frozen.remove()
        return Timing(spent)
