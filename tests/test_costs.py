"""Every rank pays what examples/distributed/costs.py computes from shapes alone, and sends nothing for it."""

from __future__ import annotations

from collections.abc import Iterator
from runpy import run_path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from freezehooks import FrozenEntries, freeze_entries, train_only

from .operations import Ops
from .parallel import computes_in_shards
from .ranks import ROOT, on_ranks

costs: Any = SimpleNamespace(**run_path(str(ROOT / "examples" / "distributed" / "costs.py")))

CASES = {
    f"{rule}, {state}": {"rule": rule, "compact": state == "compact"}
    for rule in (costs.NEW_TOKENS._replace(new_rows=45), *costs.RULES)
    for state in ("whole", "compact")
}
PHASES = ("forward", "backward", "step")


class Layer(nn.Module):
    """The matrices of one layer of a Llama. Attention has none of its own, and is left out."""

    def __init__(self, hidden: int, inner: int, keys: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden, bias=False)
        self.q_proj, self.o_proj = (nn.Linear(hidden, hidden, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(hidden, keys, bias=False) for _ in range(2))
        self.up_proj, self.down_proj = (nn.Linear(*shape, bias=False) for shape in ((hidden, inner), (inner, hidden)))

    def forward(self, x: Tensor) -> Any:
        normed = self.norm(x)
        scale = (self.k_proj(normed) * self.v_proj(normed)).mean(-1, keepdim=True)
        x = x + self.o_proj(self.q_proj(normed) * scale)
        return x + self.down_proj(self.up_proj(x).tanh())


class Language(nn.Module):
    """A model whose rows spread unevenly over four ranks, with none of some parameters on the last."""

    def __init__(self, hidden: int = 16, vocabulary: int = 50) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, hidden)
        self.layers = nn.ModuleList(Layer(hidden, inner=24, keys=6) for _ in range(2))
        self.lm_head = nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Any:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def shapes_of(model: nn.Module) -> dict[str, tuple[int, tuple[int, ...]]]:
    return {name: (1, tuple(parameter.shape)) for name, parameter in model.named_parameters()}


def sharded(rule: Any) -> Any:
    """Return the model in shards, where the same parameters train as under the rule."""
    model = Language()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(rule.trains(name))
    for layer in model.layers:
        fully_shard(layer)
    return fully_shard(model)


def freeze(model: nn.Module, rule: Any) -> FrozenEntries:
    return freeze_entries(model, str(rule)) if rule.new_rows is None else train_only(model, str(rule))


def counted_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Ops]:
    """Train for a step, and return what each phase of it computes and sends."""
    ops = {phase: Ops() for phase in PHASES}
    optimizer.zero_grad()
    with ops["forward"]:
        loss = model(torch.arange(8) + dist.get_rank()).square().mean()
    with ops["backward"]:
        loss.backward()
    with ops["step"]:
        optimizer.step()
    return ops


def bytes_of_moments(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of an optimizer's state on this rank, without its counts of steps, which have no dimension."""
    state: Iterator[Any] = (each for per_parameter in optimizer.state.values() for each in per_parameter.values())
    parts = (each.to_local() if hasattr(each, "to_local") else each for each in state)
    return sum(part.nbytes for part in parts if part.ndim)


def check_costs(rule: Any, *, compact: bool) -> None:
    """Claim: a rank pays the bytes and writes that are computed for it, and sends what it sends without freezing."""
    predicted = costs.cost_on(dist.get_rank(), dist.get_world_size(), shapes_of(Language()), rule)
    plain_model, model = sharded(rule), sharded(rule)
    plain_optimizer, optimizer = (torch.optim.AdamW(each.parameters()) for each in (plain_model, model))
    frozen = freeze(model, rule)
    guard = frozen.guard(optimizer, compact=compact)
    counted_step(plain_model, plain_optimizer)
    counted_step(model, optimizer)  # in whose forward the ranks compare what they froze, once
    plain = counted_step(plain_model, plain_optimizer)
    asked = AssertionError("the rendezvous store was asked, through which ranks can talk without a collective")
    with patch.object(dist.distributed_c10d, "_get_default_store", side_effect=asked):
        found = counted_step(model, optimizer)
    assert frozen.nbytes == predicted.held
    assert bytes_of_moments(optimizer) == (predicted.compact_moments if compact else predicted.moments)
    assert guard.nbytes == (predicted.copies if compact else 0)
    assert sum(ops.collectives.total() for ops in plain.values()) > 0 or dist.get_world_size() == 1
    for phase in PHASES:
        assert found[phase].collectives == plain[phase].collectives
        assert (found[phase].kernels - plain[phase].kernels).total() == predicted.writes(compact=compact)[phase], phase


@computes_in_shards
@on_ranks(1, CASES)
def test_one_rank_pays_what_is_computed(rule: Any, compact: bool) -> None:
    check_costs(rule, compact=compact)


@computes_in_shards
@on_ranks(2, CASES)
def test_two_ranks_pay_what_is_computed(rule: Any, compact: bool) -> None:
    check_costs(rule, compact=compact)


@computes_in_shards
@on_ranks(4, CASES)
def test_four_ranks_pay_what_is_computed(rule: Any, compact: bool) -> None:
    check_costs(rule, compact=compact)
