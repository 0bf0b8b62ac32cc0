"""Checks that every rank freezes the same entries, through the rendezvous store rather than a collective."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._entries.plain import as_tensor
from .._errors import RuleConflictError
from .._rules.rule import Rule
from .._rules.ties import Labeled
from .sharding import is_sharded

_checked: Counter[str] = Counter()
"""How often each topic was compared: all ranks compare the same topics in the same order."""


def has_process_group() -> bool:
    """Return whether torch.distributed is initialized, even if only for a single process."""
    return dist.is_available() and dist.is_initialized()


def is_distributed() -> bool:
    """Return whether this process is one of several in a torch.distributed process group."""
    return has_process_group() and dist.get_world_size() > 1


def check_same_on_ranks(model: Any, requested: Mapping[str, tuple[Tensor, Sequence[Rule]]]) -> None:
    """Reject rules that differ between ranks, on every rank, if the ranks train one model together.

    A model that is not shared between ranks may be frozen on one rank only.

    Raises:
        RuleConflictError: The rules differ, or a rank does not freeze anything.
    """
    if is_distributed() and _is_shared(model):
        topic = ",".join(f"{name}{tuple(parameter.shape)}" for name, parameter in _parameters(model))
        say_the_same(topic, _said([rule for _, rules in requested.values() for rule in rules]))


def check_same_parameters(parameters: Iterable[Any]) -> None:
    """Reject frozen parameters that differ between ranks, on every rank.

    Raises:
        RuleConflictError: They differ, or a rank has none.
    """
    parameters = list(parameters)
    topic = ",".join(f"{each.name}{tuple(each.shape)}" for each in parameters)
    say_the_same("in the first forward", _said([rule for each in parameters for rule in each.rules]) + f" on {topic}")


def _is_shared(model: Any) -> bool:
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return any(isinstance(module, nn.parallel.DistributedDataParallel) for module in modules) or any(
        is_sharded(parameter) for _, parameter in _parameters(model)
    )


def _parameters(model: Any) -> list[tuple[str, Tensor]]:
    return list(model.named_parameters() if isinstance(model, nn.Module) else model.items())


def _said(rules: Sequence[Rule]) -> str:
    """Return the rules as text, with digests of the tensors and arrays in them."""
    texts = []
    for rule in dict.fromkeys(rules):
        given = rule.region, rule.value.labels if isinstance(rule.value, Labeled) else rule.value
        digests = [_digest(each) for each in map(as_tensor, given) if isinstance(each, Tensor)]
        texts.append(" ".join([f"`{rule}`", *digests]))
    return ", ".join(texts) or "nothing"


def _digest(tensor: Tensor) -> str:
    numbers = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return f"(numbers {hashlib.sha256(bytes(numbers.tolist())).hexdigest()[:12]})"


def _longest_wait() -> timedelta:
    """Return how long a rank waits for the others to report what they freeze: as long as the process group does."""
    store: Any = dist.distributed_c10d._get_default_store()
    longest: timedelta = store.timeout
    return longest


def say_the_same(topic: str, said: str) -> None:
    """Compare the texts of all ranks about a topic.

    Raises:
        RuleConflictError: They differ, or a rank provides none for as long as the process group waits.
    """
    key = hashlib.sha256(topic.encode()).hexdigest()[:16]
    store = dist.distributed_c10d.PrefixStore(
        f"freezehooks/{key}/{_checked[key]}", dist.distributed_c10d._get_default_store()
    )
    _checked[key] += 1
    ranks = [str(rank) for rank in range(dist.get_world_size())]
    store.set(str(dist.get_rank()), said)
    longest = _longest_wait()
    try:
        store.wait(ranks, longest)
    except RuntimeError:
        silent = ", ".join(rank for rank in ranks if not store.check([rank]))
        raise RuleConflictError(
            f"rank {silent} froze nothing of a model that all ranks train, or did not get this far in "
            f"{longest.total_seconds():g} s",
            "call freeze_entries with the same rules on every rank",
        ) from None
    found = {rank: store.get(rank).decode() for rank in ranks}
    if len(set(found.values())) > 1:
        listed = "; ".join(f"rank {rank} has {text}" for rank, text in found.items())
        raise RuleConflictError(f"the ranks disagree about what is frozen: {listed}", "give every rank the same rules")
