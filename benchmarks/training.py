"""The scenarios that train: a step with frozen entries against the same step without."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, AdamW, Optimizer

from freezehooks import center

from ._comparison import Case, Options, compare
from .models import Chain, TokenModel, perceptron, residual_net
from .peers import AT_VALUES, AT_ZERO, ForumRecipe, MaskAroundStep, Parametrize, Prune, TrainableTokens
from .subjects import OURS, FreezeHooks, FreezeHooksCompact, Held, Task

Loss = Callable[[nn.Module, Any], Tensor]
MakeOptimizer = Callable[[Iterable[Tensor]], Optimizer]
ADAMW: dict[str, MakeOptimizer] = {"AdamW": AdamW, "AdamW(fused=True)": partial(AdamW, fused=True)}


def centre(options: Options) -> Iterator[Case]:
    """The centre of every 3x3 kernel of a residual net is held at 0.

    Must hold: the step takes at most 1.03 times as long as a plain one, and every peer adds more.
    """
    model = _on(options, residual_net(options.sizes.widths))
    names = [
        name for name, module in model.named_modules() if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)
    ]
    held = [Held(f"{name}.weight", (slice(None), slice(None), 1, 1)) for name in names]
    spec = {f"{name}.weight": (center, 0) for name in names}
    task = Task(model, _images(options), _classify, AdamW, held, spec)
    case = compare("centre of every 3x3 kernel, residual net, AdamW", [*OURS, *AT_ZERO], task, options, rounds=100)
    case.rows[FreezeHooks.name].claim_ratio(1.03)
    case.claim_less_than_peers(AT_ZERO)
    yield case


def half(options: Options) -> Iterator[Case]:
    """A random half of every weight is held at 0, in a residual net and in a perceptron.

    Must hold: every peer adds more time; with `compact` and the default AdamW a step takes less time than a plain one.
    """
    nets: dict[str, tuple[nn.Module, list[Any], Loss]] = {
        "residual net": (residual_net(options.sizes.widths), _images(options), _classify),
        "perceptron": (perceptron(options.sizes.hidden), _rows(options), _reproduce),
    }
    for net, (model, batches, loss) in nets.items():
        held = _random_entries(_on(options, model), 0.5)
        for name, optimizer in ADAMW.items():
            task = Task(model, batches, loss, optimizer, held, _spec(held))
            case = compare(f"half of every weight at 0, {net}, {name}", [*OURS, *AT_ZERO], task, options, rounds=30)
            case.claim_less_than_peers(AT_ZERO)
            if FreezeHooksCompact.name in case.rows and optimizer is AdamW:
                row = case.rows[FreezeHooksCompact.name]
                row.claim("below 1 x plain", row.ratio.median < 1)
            yield case


def pruned(options: Options) -> Iterator[Case]:
    """Nine tenths of a perceptron's weights are held at 0.

    Must hold: with `compact` the step of the default AdamW takes at most 0.3 times as long as the plain one, and its
    state at most 0.11 times as many bytes.
    """
    model = _on(options, perceptron(options.sizes.hidden))
    held = _random_entries(model, 0.9)
    for name, optimizer in ADAMW.items():
        task = Task(model, _rows(options), _reproduce, optimizer, held, _spec(held))
        kinds = [*OURS, Prune, MaskAroundStep]
        case = compare(f"nine tenths at 0, perceptron, {name}", kinds, task, options, rounds=30, parts=True)
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
    model = _on(options, TokenModel(sizes.vocabulary, sizes.features))
    weight = model.get_parameter("wte.weight").detach().clone()
    held = [Held("wte.weight", slice(None, -16), weight)]
    task = Task(model, _tokens(options), _regress, AdamW, held, "wte[~-16:] = keep")
    kinds = [*OURS, ForumRecipe, TrainableTokens]
    case = compare("16 new tokens of an embedding, AdamW", kinds, task, options, rounds=20, parts=True)
    if FreezeHooksCompact.name in case.rows:
        row = case.rows[FreezeHooksCompact.name]
        row.claim_step(0.01)
        row.claim("state under 200 kB", (row.state or 0) < 200_000)
        if TrainableTokens.name in case.rows:
            row.claim("no slower than PEFT", row.time.median <= case.rows[TrainableTokens.name].time.median)
    yield case


def many(options: Options) -> Iterator[Case]:
    """One slice of every layer of a chain is held at 0.

    Must hold: a frozen parameter adds at most 20 microseconds to a step, and in the longest chain not much more (half
    as much again) than in the one before.
    """
    optimizers: dict[str, MakeOptimizer] = {"SGD(foreach=False)": partial(SGD, lr=1e-3, foreach=False), "AdamW": AdamW}
    for name, optimizer in optimizers.items():
        before: float | None = None
        for length in options.sizes.chains:
            case = _chain(length, name, optimizer, options)
            row = case.rows[FreezeHooks.name]
            each = 1e3 * row.added.median / length
            row.claim(f"at most 20 us a parameter, found {each:.1f}", each <= 20)
            if before is not None and length == options.sizes.chains[-1]:
                row.claim(f"linear, {before:.1f} before", each <= 1.5 * before)
            before = each
            yield case


def _chain(length: int, name: str, optimizer: MakeOptimizer, options: Options) -> Case:
    model = _on(options, Chain(length))
    held = [Held(f"layers.{n}.weight", (slice(None), 0)) for n in range(length)]
    batches = _random(options, (32, 16))
    steps = max(1, options.sizes.chains[-1] // length)
    task = Task(model, batches, _reproduce, optimizer, held, "layers.*.weight[:, 0] = 0", steps)
    kinds = [*OURS, Prune, MaskAroundStep, ForumRecipe]
    return compare(f"a slice of each of {length} layers at 0, {name}", kinds, task, options, rounds=30)


def value(options: Options) -> Iterator[Case]:
    """A random half of a perceptron's weights is held at numbers other than 0.

    Must hold: a mask by `parametrize` adds more time.
    """
    model = _on(options, perceptron(options.sizes.hidden))
    held = [
        Held(piece.name, piece.index, torch.randn_like(piece.index.float())) for piece in _random_entries(model, 0.5)
    ]
    for name, optimizer in ADAMW.items():
        task = Task(model, _rows(options), _reproduce, optimizer, held, _spec(held))
        title = f"half of every weight at random numbers, perceptron, {name}"
        case = compare(title, [*OURS, *AT_VALUES], task, options, rounds=30)
        case.claim_less_than_peers([Parametrize])
        yield case


# --------------------------------------------------------------------------------------------------------------------
# Models, data and losses


def _on(options: Options, model: nn.Module) -> nn.Module:
    return model.to(options.device)


def _random(options: Options, shape: Sequence[int], count: int = 4) -> list[Tensor]:
    return [torch.randn(*shape, device=options.device) for _ in range(count)]


def _images(options: Options) -> list[tuple[Tensor, Tensor]]:
    images = _random(options, options.sizes.images)
    return [(batch, torch.randint(10, (len(batch),), device=options.device)) for batch in images]


def _rows(options: Options) -> list[Tensor]:
    return _random(options, (options.sizes.samples, options.sizes.hidden))


def _tokens(options: Options) -> list[tuple[Tensor, Tensor]]:
    """Return batches of tokens, one in eight of them new, with random targets."""
    sizes = options.sizes
    batches = []
    for targets in _random(options, (sizes.tokens[0], 16)):
        found = torch.randint(sizes.vocabulary - 16, sizes.tokens, device=options.device)
        new = torch.randint(sizes.vocabulary - 16, sizes.vocabulary, sizes.tokens, device=options.device)
        batches.append((torch.where(torch.rand(sizes.tokens, device=options.device) < 1 / 8, new, found), targets))
    return batches


def _random_entries(model: nn.Module, fraction: float) -> list[Held]:
    """Choose a fraction of every weight matrix and kernel at random."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.ndim > 1]
    return [Held(name, torch.rand_like(parameter) < fraction) for name, parameter in named]


def _spec(held: Iterable[Held]) -> dict[str, Any]:
    return {piece.name: (piece.index, piece.value) for piece in held}


def _classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return functional.cross_entropy(model(images), labels)


def _regress(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = batch
    return functional.mse_loss(model(inputs), targets)


def _reproduce(model: nn.Module, rows: Tensor) -> Tensor:
    return functional.mse_loss(model(rows), rows)
