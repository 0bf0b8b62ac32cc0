"""The scenarios with small models: a training step with frozen entries against the same step without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW

from ._comparison import Case, Options, compare
from ._data import ADAMW, Loss, MakeOptimizer, classify, images, new_tokens, regress, reproduce, rows
from ._entries import centers, random_entries, spec_of
from .alternatives import AT_VALUES, AT_ZERO, HookAndRewrite, MaskAroundStep, Parametrize, Prune, TrainableTokens
from .models import Head, TokenModel, perceptron, residual_net
from .subjects import (
    OURS,
    FreezeHooks,
    FreezeHooksCompact,
    FreezeHooksSkipping,
    FreezeHooksSkippingCompact,
    Held,
    Task,
)


def center(options: Options) -> Iterator[Case]:
    """The center of every 3x3 kernel of a residual net is held at 0.

    Must hold: the step takes at most 1.03 times as long as a plain one, and every alternative adds more.
    """
    model, batches, loss = _residual_net(options)
    task = Task(model, batches, loss, AdamW, *centers(model))
    case = compare("center of every 3x3 kernel, residual net, AdamW", [*OURS, *AT_ZERO], task, options, rounds=100)
    case.rows[FreezeHooks.name].claim_ratio(1.03)
    case.claim_less_than_alternatives(AT_ZERO)
    yield case


def half(options: Options) -> Iterator[Case]:
    """A random half of every weight is held at 0, in a residual net and in a perceptron.

    Must hold: every alternative adds more time; with `compact` and the default AdamW a step takes less time than a
    plain one; with the fused AdamW, on the CPU, this library adds at most 1.8 times what the mask around the step adds,
    which passes over the weights twice instead of three times.
    """
    for net, build in {"residual net": _residual_net, "perceptron": _perceptron}.items():
        model, batches, loss = build(options)
        held = random_entries(model, 0.5)
        for name, optimizer in ADAMW.items():
            task = Task(model, batches, loss, optimizer, held, spec_of(held))
            case = compare(f"half of every weight at 0, {net}, {name}", [*OURS, *AT_ZERO], task, options, rounds=30)
            case.claim_less_than_alternatives(AT_ZERO)
            if FreezeHooksCompact.name in case.rows and optimizer is AdamW:
                row = case.rows[FreezeHooksCompact.name]
                row.claim("below 1 x plain", row.ratio.median < 1)
            if optimizer is not AdamW and options.device.type == "cpu":
                case.claim_added(MaskAroundStep, 1.8)
            yield case


def pruned(options: Options) -> Iterator[Case]:
    """Nine tenths of a perceptron's weights are held at 0.

    Must hold: with `compact` the step of the default AdamW takes at most 0.3 times as long as the plain one, and its
    state at most 0.11 times as many bytes.
    """
    model, batches, loss = _perceptron(options)
    held = random_entries(model, 0.9)
    for name, optimizer in ADAMW.items():
        task = Task(model, batches, loss, optimizer, held, spec_of(held))
        kinds = [*OURS, Prune, MaskAroundStep]
        case = compare(f"nine tenths at 0, perceptron, {name}", kinds, task, options, rounds=30)
        if FreezeHooksCompact.name in case.rows and optimizer is AdamW:
            row = case.rows[FreezeHooksCompact.name]
            row.claim_step(0.3)
            row.claim("state at most 0.11 x plain", (row.state or 0) <= 0.11 * (case.rows["plain"].state or 0))
        yield case


def tokens(options: Options) -> Iterator[Case]:
    """All rows but the last 16 of an embedding keep what they hold.

    Must hold: with `compact` AdamW's step is at least 100 times faster than plain, with less than 200 kB of state, and
    the whole step is no slower than with PEFT's trainable tokens.
    """
    sizes = options.sizes
    model = TokenModel(sizes.vocabulary, sizes.features).to(options.device)
    task = new_rows(model, new_tokens(sizes.tokens, options.device, sizes.vocabulary), AdamW)
    case = compare("16 new tokens of an embedding, AdamW", [*OURS, HookAndRewrite, TrainableTokens], task, options, 20)
    claim_of_new_rows(case, step=0.01, kilobytes=200)
    yield case


def new_rows(model: TokenModel, batches: list[Any], optimizer: MakeOptimizer, steps: int = 1) -> Task:
    """Return the task of training the last 16 rows of an embedding, while the others keep what they hold."""
    held = [Held("wte.weight", slice(None, -16), model.wte.weight.detach().clone())]
    return Task(model, batches, regress, optimizer, held, "wte[~-16:] = keep", steps)


def claim_of_new_rows(case: Case, step: float, kilobytes: int) -> None:
    """Claim what compact mode saves: the optimizer's step over the plain one, its state, and PEFT's time."""
    if FreezeHooksCompact.name not in case.rows:
        return
    row = case.rows[FreezeHooksCompact.name]
    row.claim_step(step)
    row.claim(f"state under {kilobytes} kB", (row.state or 0) < 1000 * kilobytes)
    if TrainableTokens.name in case.rows:
        row.claim("no slower than PEFT", row.time.median <= case.rows[TrainableTokens.name].time.median)


def rows_alone(options: Options) -> Iterator[Case]:
    """All rows but 16 of a language model's head, and seven of eight rows of a perceptron, keep what they hold.

    Must hold: with `skip_gradients` a step takes less time than without, and with `compact` too less than a plain one.
    """
    sizes = options.sizes
    yield from compare_rows(options, Head(*sizes.head), sizes.hidden, ADAMW)


def compare_rows(options: Options, head: Head, width: int, optimizers: Mapping[str, MakeOptimizer]) -> Iterator[Case]:
    """Compare training 16 rows of a head, and an eighth of the rows of a perceptron."""
    samples, device = options.sizes.samples, options.device
    labels = torch.randint(head.head.out_features, (samples,), device=device)
    seen = [batch.to(head.head.weight.dtype) for batch in rows((samples, head.head.in_features), device)]
    net = perceptron(width)
    names = [name for name, layer in net.named_children() if isinstance(layer, nn.Linear)]
    yield from _compare_kept(
        "16 rows of a head train", options, optimizers,
        Task(head.to(device), [(batch, labels) for batch in seen], classify, AdamW,
             _kept(head, {"head": head.head.out_features - 16}), ["head[:-16]"], options.steps),
    )  # fmt: skip
    yield from _compare_kept(
        "an eighth of the rows of a perceptron train", options, optimizers,
        Task(net.to(device), rows((samples, width), device), reproduce, AdamW,
             _kept(net, dict.fromkeys(names, width * 7 // 8)), [f"{name}[:{width * 7 // 8}]" for name in names],
             options.steps),
    )  # fmt: skip


def _compare_kept(title: str, options: Options, optimizers: Mapping[str, MakeOptimizer], task: Task) -> Iterator[Case]:
    kinds = [*OURS, FreezeHooksSkipping, FreezeHooksSkippingCompact, MaskAroundStep, HookAndRewrite]
    for name, optimizer in optimizers.items():
        found = compare(f"{title}, {name}", kinds, replace(task, optimizer=optimizer), options, rounds=20)
        usual, skipping, both = (
            found.rows.get(kind.name) for kind in (FreezeHooks, FreezeHooksSkipping, FreezeHooksSkippingCompact)
        )
        if usual is not None and skipping is not None:
            skipping.claim("less than without", skipping.time.median < usual.time.median)
        if both is not None:
            both.claim("below 1 x plain", both.ratio.median < 1)
        yield found


def _kept(model: nn.Module, rows_of: Mapping[str, int]) -> list[Held]:
    weights = {f"{name}.weight": slice(None, count) for name, count in rows_of.items()}
    return [Held(name, rows, model.get_parameter(name).detach().clone()) for name, rows in weights.items()]


def value(options: Options) -> Iterator[Case]:
    """A random half of a perceptron's weights is held at numbers other than 0.

    Must hold: a mask by `parametrize` adds more time.
    """
    model, batches, loss = _perceptron(options)
    held = [replace(entries, value=torch.randn_like(entries.index.float())) for entries in random_entries(model, 0.5)]
    for name, optimizer in ADAMW.items():
        task = Task(model, batches, loss, optimizer, held, spec_of(held))
        title = f"half of every weight at random numbers, perceptron, {name}"
        case = compare(title, [*OURS, *AT_VALUES], task, options, rounds=30)
        case.claim_less_than_alternatives([Parametrize])
        yield case


def _residual_net(options: Options) -> tuple[nn.Module, list[Any], Loss]:
    model = residual_net(options.sizes.widths).to(options.device)
    return model, list(images(options.sizes.images, options.device)), classify


def _perceptron(options: Options) -> tuple[nn.Module, list[Any], Loss]:
    sizes = options.sizes
    return (
        perceptron(sizes.hidden).to(options.device),
        list(rows((sizes.samples, sizes.hidden), options.device)),
        reproduce,
    )
