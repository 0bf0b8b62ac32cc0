"""The scenarios with larger models, for a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Final

import torch
from torch.optim import SGD, AdamW

from ._comparison import Case, Options, compare
from ._data import ADAMW, classify, images, new_tokens, predict, reproduce, rows, sentences
from ._entries import centers, random_entries, spec_of
from .alternatives import AT_VALUES, AT_ZERO, TrainableTokens
from .gpt2 import GPT2
from .models import Head, TokenModel, perceptron
from .resnet50 import resnet
from .subjects import OURS, FreezeHooks, FreezeHooksCompact, Task
from .training import claim_of_new_rows, compare_rows, new_rows

_FUSED: Final = partial(AdamW, fused=True)


def gpt2(options: Options) -> Iterator[Case]:
    """A random half of every matrix of GPT-2, 124 million parameters in bfloat16, is held at 0.

    Must hold: a step takes at most 1.03 times as long as a plain one, with the default AdamW and with the fused one;
    with `compact` the optimizer's step by itself takes at most 1.3 times as long as that of the plain fused AdamW, and
    at most as long where nine tenths are held.
    """
    sizes, device = options.sizes, options.device
    model = GPT2(sizes.gpt2).to(device, torch.bfloat16)
    held = random_entries(model, 0.5)
    batches = sentences(sizes.sentences, device, sizes.gpt2.vocabulary)
    task = Task(model, batches, predict, AdamW, held, spec_of(held), options.steps)
    for name, optimizer in ADAMW.items():
        title = f"half of every matrix, GPT-2, bfloat16, {name}"
        case = _compare(title, replace(task, optimizer=optimizer), options, limit=1.03)
        if optimizer is not AdamW and FreezeHooksCompact.name in case.rows:
            case.rows[FreezeHooksCompact.name].claim_step(1.3)
        yield case
    held = random_entries(model, 0.9)
    task = replace(task, held=held, spec=spec_of(held), optimizer=_FUSED)
    case = compare("nine tenths of every matrix, GPT-2, bfloat16, AdamW(fused=True)", OURS, task, options, rounds=20)
    case.rows[FreezeHooksCompact.name].claim_step(1.0)
    yield case


def resnet50(options: Options) -> Iterator[Case]:
    """The center of every 3x3 kernel of ResNet-50, in bfloat16 and channels last, is held at 0.

    Must hold: a step takes at most 1.02 times as long as a plain one.
    """
    sizes, device = options.sizes, options.device
    model = resnet(sizes.bottlenecks, sizes.narrowest).to(device, torch.bfloat16)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs do not know it
    batches = [
        (photos.to(torch.bfloat16, memory_format=torch.channels_last), labels)
        for photos, labels in images(sizes.photos, device, classes=1000)
    ]
    task = Task(model, batches, classify, partial(SGD, lr=0.01, momentum=0.9), *centers(model), options.steps)
    yield _compare("center of every 3x3 kernel, ResNet-50, bfloat16, SGD with momentum", task, options, limit=1.02)


def wide(options: Options) -> Iterator[Case]:
    """A random half of every matrix of a perceptron, six layers of 4096 features, is held at 0.

    Must hold: a step, which does little but read and write memory, takes at most 1.25 times as long as a plain one.
    """
    sizes, device = options.sizes, options.device
    model = perceptron(sizes.wide).to(device)
    held = random_entries(model, 0.5)
    task = Task(model, rows((sizes.samples, sizes.wide), device), reproduce, _FUSED, held, spec_of(held), options.steps)
    yield _compare("half of every matrix, wide perceptron, AdamW(fused=True)", task, options, limit=1.25)


def wide_rows(options: Options) -> Iterator[Case]:
    """All rows but 16 of a large head, and seven of eight rows of a wide perceptron, keep what they hold.

    Must hold: with `skip_gradients` a step takes less time than without, and with `compact` too less than a plain one.
    """
    sizes = options.sizes
    head = Head(*sizes.wide_head).to(torch.bfloat16)
    yield from compare_rows(options, head, sizes.wide, {"AdamW(fused=True)": _FUSED})


def wide_tokens(options: Options) -> Iterator[Case]:
    """All rows but the last 16 of a large embedding, in bfloat16, keep what they hold.

    Must hold: with `compact` the step of the fused AdamW takes at most a tenth of the plain one's time, with less than
    300 kB of state, and the whole step is no slower than with PEFT's trainable tokens.
    """
    sizes, device = options.sizes, options.device
    with device:  # half a billion random numbers
        model = TokenModel(*sizes.wide_tokens).to(torch.bfloat16)
    batches = new_tokens(sizes.tokens, device, vocabulary=sizes.wide_tokens[0])
    task = new_rows(model, [(seen, goal.to(torch.bfloat16)) for seen, goal in batches], _FUSED, options.steps)
    kinds = [*OURS, *AT_VALUES, TrainableTokens]
    case = compare("16 new tokens of a large embedding, bfloat16, AdamW(fused=True)", kinds, task, options, rounds=20)
    claim_of_new_rows(case, step=0.1, kilobytes=300)
    yield case


def _compare(title: str, task: Task, options: Options, limit: float) -> Case:
    """Compare with every way to hold zeros, and claim that a step takes at most a multiple of the plain one's time."""
    case = compare(title, [*OURS, *AT_ZERO], task, options, rounds=20)
    case.rows[FreezeHooks.name].claim_ratio(limit)
    return case
