"""Every way to write a rule: 20 steps beside a model that is held by hand, with masks made in numpy."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from freezehooks import (
    FrozenEntries,
    MaskedOptimizer,
    Rule,
    band,
    center,
    diagonal,
    each,
    entries,
    freeze_entries,
    keep,
    mirrored,
    symmetric,
    tied,
    train_only,
    tril,
)
from freezehooks._rules.patterns.pattern import Pattern
from freezehooks._rules.spec import rules_of
from freezehooks._rules.ties import Labeled, Tie

from .claims import same_bits
from .draws import randn
from .test_regions import order_of_draws

Array: TypeAlias = NDArray[Any]
Numbers: TypeAlias = dict[str, Array]


class _Net(nn.Module):
    """A convolution, statistics, two matrices, and complex numbers; some entries of `square` are 0."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(2, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.up = nn.Linear(4, 12)
        self.square = nn.Linear(12, 12)
        self.square.weight.data.view(-1)[::5] = 0
        self.phase = nn.Parameter(torch.randn(12, dtype=torch.complex64))

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.tanh(self.bn(self.conv(images))).mean((-1, -2))
        rotated = torch.tanh(self.square(torch.tanh(self.up(hidden)))) * self.phase
        return rotated.real.square().sum() + (rotated.imag - 0.3).abs().sum()


@dataclass
class Form:
    """One way to write a rule, and what it means in numpy.

    Attributes:
        spec: From a model to the rules.
        frozen: A function from the contents of parameters and buffers to the frozen entries of each.
        values: The values of frozen entries, by name, in a shape that broadcasts; left out: what they contained.
        copies: A function from the contents of parameters to what is tied: the position of the first copy of each
            entry in the flat tensor.
        trains_alone: Whether the rules name what trains; then parameters that are not in `frozen` do not train.
    """

    spec: Callable[[_Net], Any]
    frozen: Callable[[Numbers], Numbers] = lambda numbers: {}
    values: dict[str, Any] = field(default_factory=dict)
    copies: Callable[[Numbers], Numbers] = lambda numbers: {}
    trains_alone: bool = False

    def hold(self, model: _Net, state: Any = None) -> FrozenEntries:
        """Freeze in this form."""
        return (train_only if self.trains_alone else freeze_entries)(model, self.spec(model), state=state)


def _of(name: str, where: Callable[[Array], Any], values: Any = keep) -> dict[str, Any]:
    """Return what a form says of one tensor, from a function that writes True into a mask or returns one."""

    def frozen(numbers: Numbers) -> Numbers:
        return {name: _mask(where, numbers[name])}

    return {"frozen": frozen, "values": {} if values is keep else {name: values}}


def _mask(where: Callable[[Array], Any], numbers: Array) -> Array:
    found = where(numbers)
    if isinstance(found, np.ndarray) and found.dtype == bool:
        return np.broadcast_to(found, numbers.shape).copy()
    mask = np.zeros(numbers.shape, dtype=bool)
    mask[found] = True
    return mask


def _on_square(region: str, where: Callable[[Array], Any]) -> Form:
    return Form(lambda model: f"square[{region}]", **_of("square.weight", where))


def _on_kernel(region: str, where: Callable[[Array], Any]) -> Form:
    return Form(lambda model: f"conv[{region}] = 0.25", **_of("conv.weight", where, 0.25))


def _first(order: Array, fraction: float) -> Array:
    """Return True at the first positions of an order of all entries of `square`."""
    mask = np.zeros(144, dtype=bool)
    mask[order[: round(fraction * 144)]] = True
    return mask.reshape(12, 12)


def _by_magnitude(weight: Array, sign: int = 1) -> Array:
    return np.argsort(sign * np.abs(weight).ravel(), kind="stable")


def _all_but_two_of_four(weight: Array) -> Array:
    ranks = np.abs(weight).reshape(12, 3, 4).argsort(axis=-1, kind="stable").argsort(axis=-1, kind="stable")
    return (ranks < 2).reshape(12, 12)


def _in_halves(weight: Array) -> Array:
    halves = [np.zeros(72, dtype=bool), np.zeros(72, dtype=bool)]
    for half, numbers in zip(halves, np.split(weight, 2), strict=True):
        half[_by_magnitude(numbers)[:18]] = True
    return np.concatenate(halves).reshape(12, 12)


def _ends(kernels: Array) -> Array:
    mask = np.ones(kernels.shape, dtype=bool)
    mask[:, :, 1:-1, 1:-1] = False
    return mask


def _axes(kernels: Array) -> Array:
    mask = np.zeros(kernels.shape, dtype=bool)
    mask[:, :, 1], mask[:, :, :, 1] = True, True
    return mask


_ONES: Final = np.ones((12, 12), dtype=bool)
_CHECKS: Final = np.indices((12, 12)).sum(axis=0) % 3 == 0
_ROWS: Final = np.arange(12) % 5 == 0
_UNION: Final = [0, 1, 2, 3, 8, 9, 10, 11]
_RAMP: Final = np.linspace(-0.75, 0.75, 12, dtype=np.float32)
_LABELS: Final = (np.arange(144).reshape(12, 12) * 7 % 24) - 1

PATTERNS: Final = {
    "center": _on_kernel("center", lambda w: np.s_[:, :, 1, 1]),
    "cross": _on_kernel("cross", _axes),
    "border": _on_kernel("border", _ends),
    "diagonal": _on_square("diagonal", lambda w: np.eye(12, dtype=bool)),
    "diagonal(k)": _on_square("diagonal(-2)", lambda w: np.eye(12, k=-2, dtype=bool)),
    "triu": _on_square("triu(1)", lambda w: np.triu(_ONES, 1)),
    "tril": _on_square("tril(-1)", lambda w: np.tril(_ONES, -1)),
    "band": _on_square("band(1, 2)", lambda w: np.triu(_ONES, -1) & np.tril(_ONES, 2)),
    "block_diagonal": _on_square("block_diagonal(3)", lambda w: np.kron(np.eye(3), np.ones((4, 4))) == 1),
    "zeros": _on_square("zeros", lambda w: w == 0),
    "smallest": _on_square("smallest(0.3)", lambda w: _first(_by_magnitude(w), 0.3)),
    "largest": _on_square("largest(0.25)", lambda w: _first(_by_magnitude(w, -1), 0.25)),
    "random": _on_square("random(0.3, seed=5)", lambda w: _first(order_of_draws(144, seed=5), 0.3)),
    "nm": _on_square("nm(2, 4)", _all_but_two_of_four),
    "each": _on_square("each(4, diagonal)", lambda w: np.tile(np.eye(3, 12, dtype=bool), (4, 1))),
    "each of numbers": _on_square("each(2, smallest(0.25))", _in_halves),
}

INDICES: Final = {
    "integer": _on_square("-1", lambda w: -1),
    "slices": _on_square("2:7, ::-3", lambda w: np.s_[2:7, ::-3]),
    "ellipsis": _on_kernel("..., 0", lambda w: np.s_[..., 0]),
    "list": _on_square("[0, 3, 5]", lambda w: [0, 3, 5]),
    "lists": _on_square("[0, 1, 4], [1, 0, 2]", lambda w: ([0, 1, 4], [1, 0, 2])),
    "union": _on_square(":, 0:4 | 8:12", lambda w: (slice(None), _UNION)),
    "unions": _on_square("0:2 | 5, 0:4 | 8:12", lambda w: np.ix_([0, 1, 5], _UNION)),
    "not": _on_square("~(1:11, 1:11)", lambda w: ~np.pad(np.ones((10, 10), dtype=bool), 1)),
    "or": _on_square("diagonal | 0", lambda w: np.eye(12, dtype=bool) | (np.arange(12) == 0)[:, None]),
    "and": _on_square("triu & tril(1) & ~zeros", lambda w: np.triu(_ONES) & np.tril(_ONES, 1) & (w != 0)),
    "list of integers": Form(lambda model: {"square": [3, 7, 11]}, **_of("square.weight", lambda w: [3, 7, 11])),
    "in Python": Form(
        lambda model: Rule("square", entries[:, [slice(0, 4), 8]] | ~band(2, 2) & each(3, diagonal), 0.5),
        **_of(
            "square.weight",
            lambda w: (
                np.isin(np.arange(12), [0, 1, 2, 3, 8])[None]
                | ~(np.triu(_ONES, -2) & np.tril(_ONES, 2)) & np.tile(np.eye(4, 12, dtype=bool), (3, 1))
            ),
            0.5,
        ),
    ),
}

MASKS: Final = {
    "mask": Form(lambda model: {"square": torch.tensor(_CHECKS)}, **_of("square.weight", lambda w: _CHECKS)),
    "mask of rows": Form(
        lambda model: {"up": (torch.tensor(_ROWS), 0)}, **_of("up.weight", lambda w: _ROWS[:, None], 0)
    ),
    "mask of channels": Form(
        lambda model: {"conv": torch.tensor(_CHECKS[:4, :2])},
        **_of("conv.weight", lambda w: _CHECKS[:4, :2, None, None]),
    ),
    "mask that broadcasts": Form(
        lambda model: {"conv": torch.tensor(_CHECKS[None, None, :3, :3])},
        **_of("conv.weight", lambda w: _CHECKS[:3, :3]),
    ),
    "array": Form(lambda model: {"square": _CHECKS}, **_of("square.weight", lambda w: _CHECKS)),
    "function": Form(lambda model: {"square": lambda w: w < -0.1}, **_of("square.weight", lambda w: w < -0.1)),
}

VALUES: Final = {
    "number": Form(lambda model: "square[0] = 1e-3", **_of("square.weight", lambda w: 0, 1e-3)),
    "minus zero": Form(lambda model: "square[0] = -0.0", **_of("square.weight", lambda w: 0, -0.0)),
    "keep": Form(lambda model: "square[0] = keep", **_of("square.weight", lambda w: 0)),
    "list": Form(lambda model: "up[3] = [1, 2, 3, 4]\n", **_of("up.weight", lambda w: 3, [1, 2, 3, 4])),
    "nested list": Form(
        lambda model: "up[:2] = [[1], [-2]]", **_of("up.weight", lambda w: np.s_[:2], [[1], [-2], *[[0]] * 10])
    ),
    "list row by row": Form(
        lambda model: "up[diagonal] = [1, 2, 3, 4]",
        **_of("up.weight", lambda w: np.eye(12, 4, dtype=bool), [1, 2, 3, 4]),
    ),
    "tensor of the region": Form(
        lambda model: {"square": (entries[:, 2], torch.tensor(_RAMP))},
        **_of("square.weight", lambda w: np.s_[:, 2], _RAMP[:, None]),
    ),
    "tensor of the parameter": Form(
        lambda model: {"square": (torch.tensor(_CHECKS), torch.tensor(_RAMP).expand(12, 12))},
        **_of("square.weight", lambda w: _CHECKS, _RAMP),
    ),
    "array of values": Form(lambda model: {"up.bias": (..., _RAMP)}, **_of("up.bias", lambda b: ..., _RAMP)),
    "text": Form(lambda model: {"square": ("each(3, 1)", "0.5")}, **_of("square.weight", lambda w: [1, 5, 9], 0.5)),
    "complex number": Form(lambda model: "phase[:5] = 1-2j", **_of("phase", lambda p: np.s_[:5], 1 - 2j)),
    "complex list": Form(
        lambda model: "phase[::6] = [0.5j, 3]", **_of("phase", lambda p: np.s_[::6], np.repeat([0.5j, 3], 6))
    ),
}

_BIASES: Final = ("conv.bias", "up.bias", "square.bias")
_STATISTICS: Final = ("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")

TARGETS: Final = {
    "class": Form(lambda model: "*(Conv2d).weight[center] = 0", **_of("conv.weight", lambda w: np.s_[..., 1, 1], 0)),
    "classes": Form(
        lambda model: "*(Linear, Conv2d).bias[:2] = 1",
        lambda numbers: {name: _mask(lambda b: np.s_[:2], numbers[name]) for name in _BIASES},
        dict.fromkeys(_BIASES, 1),
    ),
    "parent class": Form(lambda model: "b?(_BatchNorm).bias[0]", **_of("bn.bias", lambda b: 0)),
    "wildcard": Form(lambda model: "*.weight[zeros]", **_of("square.weight", lambda w: w == 0)),
    "parameter": Form(lambda model: {model.up.weight: [1, 2]}, **_of("up.weight", lambda w: [1, 2])),
    "module": Form(lambda model: {model.conv: (center, 0)}, **_of("conv.weight", lambda w: np.s_[..., 1, 1], 0)),
    "module of a rule": Form(
        lambda model: Rule(model.square, tril(-3), 0), **_of("square.weight", lambda w: np.tril(_ONES, -3), 0)
    ),
    "buffers": Form(
        lambda model: "bn.running_mean[:2]\nbn.running_var[3] = 0.7",
        lambda numbers: {
            "bn.running_mean": _mask(lambda b: np.s_[:2], numbers["bn.running_mean"]),
            "bn.running_var": _mask(lambda b: 3, numbers["bn.running_var"]),
        },
        {"bn.running_var": 0.7},
    ),
    "channels with buffers": Form(
        lambda model: "bn.weight[:2]\nbn.bias[:2]\n*.running_*[:2]",
        lambda numbers: {name: _mask(lambda b: np.s_[:2], numbers[name]) for name in _STATISTICS},
    ),
}


def _alone(spec: Any, **trained: Callable[[Array], Any]) -> Form:
    def frozen(numbers: Numbers) -> Numbers:
        return {
            name: ~_mask(where, numbers[name])
            for name, where in ((n.replace("__", "."), w) for n, w in trained.items())
        }

    return Form(lambda model: spec, frozen, trains_alone=True)


TRAIN_ONLY: Final = {
    "train_only": _alone("square[9:]", square__weight=lambda w: np.s_[9:]),
    "train_only of several": _alone(
        "square[9:]\nsquare[diagonal]\nup.bias\nconv[border]",
        square__weight=lambda w: np.eye(12, dtype=bool) | (np.arange(12) >= 9)[:, None],
        up__bias=lambda b: ...,
        conv__weight=_ends,
    ),
    "train_only of a mask": _alone(
        {"square": _CHECKS, "up": [1, 3]}, square__weight=lambda w: _CHECKS, up__weight=lambda w: [1, 3]
    ),
    "train_only of numbers": _alone("*.weight[zeros]", square__weight=lambda w: w == 0),
}


def _tying(name: str, tie: Any, first: Callable[[Array], Array], also: str = "", **frozen: Any) -> Form:
    """A tie, possibly with other rules; `first` maps flat positions to those of the first copies."""

    def copies(numbers: Numbers) -> Numbers:
        return {name: first(np.arange(numbers[name].size).reshape(numbers[name].shape))}

    rule = f"{name} = {tie}" if isinstance(tie, str) else Rule(name, value=tie)
    return Form(lambda model: [rule, also], copies=copies, **frozen)


def _of_label(positions: Array) -> Array:
    flat = _LABELS.ravel()
    return np.where(flat < 0, positions.ravel(), [np.flatnonzero(flat == label)[0] for label in flat]).reshape(12, 12)


TIES: Final = {
    "tied": _tying("conv.weight", "tied(1, start=first)", lambda p: np.repeat(p[:, :1], 2, axis=1)),
    "tied from the mean": _tying("conv.weight", "tied(-3, start=mean)", lambda p: np.repeat(p[:, :1], 2, axis=1)),
    "tied in groups": _tying("conv.weight", "tied(0, groups=2, start=first)", lambda p: np.repeat(p[::2], 2, axis=0)),
    "mirrored": _tying("conv.weight", mirrored(-1, start="first"), lambda p: np.minimum(p, p[..., ::-1])),
    "symmetric": _tying("square.weight", symmetric(start="mean"), lambda p: np.minimum(p, p.T)),
    "labels": _tying("square.weight", tied(torch.tensor(_LABELS), start="first"), _of_label),
    "labels from the mean": _tying("square.weight", tied(_LABELS, start="mean"), _of_label),
    "symmetric and a region": _tying(
        "square.weight",
        "symmetric(start=first)",
        lambda p: np.minimum(p, p.T),
        "square[diagonal] = 0",
        **_of("square.weight", lambda w: np.eye(12, dtype=bool), 0),
    ),
}

FORMS: Final = PATTERNS | INDICES | MASKS | VALUES | TARGETS | TRAIN_ONLY | TIES


class _ByHand:
    """A plain model and optimizer, whose held entries are zeroed, summed and rewritten around each step."""

    def __init__(self, form: Form, make: Callable[[Any], Optimizer]) -> None:
        self.model = _Net()
        numbers = {name: tensor.cpu().numpy().copy() for name, tensor in self._tensors().items()}
        self.frozen = {name: torch.as_tensor(mask) for name, mask in form.frozen(numbers).items()}
        self.first = {name: torch.as_tensor(first) for name, first in form.copies(numbers).items()}
        self.held = {name: self._value(form, name) for name in self.frozen}
        self._write()
        named = self.model.named_parameters()
        self.optimizer = make([each for name, each in named if name in self.frozen or not form.trains_alone])

    def _tensors(self) -> dict[str, Tensor]:
        return {name: tensor.data for name, tensor in self.model.state_dict(keep_vars=True).items()}

    def _value(self, form: Form, name: str) -> Tensor:
        tensor = self._tensors()[name]
        value = torch.as_tensor(np.asarray(form.values.get(name, tensor.cpu())), dtype=tensor.dtype)
        return value.expand(tensor.shape).clone()

    def start_from(self, model: nn.Module) -> None:
        """Copy what ties started from, such as the mean, after checking that copies are equal."""
        for name, first in self.first.items():
            started = model.get_parameter(name).detach()
            assert same_bits(started, started.flatten()[first])
            self._tensors()[name].copy_(started)

    def step(self, images: Tensor) -> None:
        self.optimizer.zero_grad()
        self.model(images).backward()
        for name, parameter in self.model.named_parameters():
            if name in self.first:
                self._sum(parameter, self.first[name])
            if name in self.frozen and parameter.grad is not None:
                parameter.grad[self.frozen[name]] = 0
        self.optimizer.step()
        self._write()

    def _sum(self, parameter: nn.Parameter, first: Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.flatten().cpu().numpy()
        others = np.flatnonzero(first.flatten().cpu().numpy() != np.arange(first.numel()))
        summed = gradient.copy()
        np.add.at(summed, first.flatten().cpu().numpy()[others], gradient[others])
        parameter.grad = torch.as_tensor(summed)[first]

    def _write(self) -> None:
        for name, tensor in self._tensors().items():
            if name in self.frozen:
                tensor[self.frozen[name]] = self.held[name][self.frozen[name]]
            if name in self.first:
                tensor.copy_(tensor.flatten()[self.first[name]])

    def assert_same(self, run: _Run) -> None:
        """Claim: frozen entries hold, and all other entries equal those of the model that is held by hand."""
        found = run.model.state_dict()
        for name, frozen in self.frozen.items():
            assert same_bits(found[name][frozen], self.held[name][frozen]), f"{name} does not hold, {run}"
        for name, tensor in self._tensors().items():
            assert same_bits(found[name], tensor), f"{name} differs from what trains by hand, {run}"


class _Run:
    """A model that is frozen in some form, with its guarded optimizer; or the same restored from what it saved."""

    def __init__(self, form: Form, make: Callable[[Any], Optimizer], compact: bool, saved: Any = None) -> None:
        self._how = form, make, compact
        self.model = _Net(seed=0 if saved is None else 1)
        if saved is not None:
            self.model.load_state_dict(saved["model"])
        self.frozen = form.hold(self.model, None if saved is None else saved["frozen"])
        self.optimizer = MaskedOptimizer(make(self.model.parameters()), self.frozen, compact=compact)
        if saved is not None:
            self.optimizer.load_state_dict(saved["optimizer"])

    def __str__(self) -> str:
        return "compact" if self.optimizer.compact else "masked"

    def step(self, images: Tensor) -> None:
        self.optimizer.zero_grad()
        self.model(images).backward()
        self.optimizer.step()

    def save(self) -> None:
        self._file = io.BytesIO()
        parts: dict[str, Any] = {"model": self.model, "frozen": self.frozen, "optimizer": self.optimizer}
        torch.save({name: part.state_dict() for name, part in parts.items()}, self._file)

    def resumed(self) -> _Run:
        return _Run(*self._how, torch.load(io.BytesIO(self._file.getvalue()), weights_only=True))


def _images() -> list[Tensor]:
    numbers = torch.Generator().manual_seed(7)
    return [randn(3, 2, 4, 4, seed=numbers) for _ in range(20)]


MAKERS: Final[dict[str, Callable[[Any], Optimizer]]] = {
    "momentum": lambda p: SGD(p, lr=0.02, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: AdamW(p, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_form_holds_and_resumes_as_a_model_that_is_held_by_hand(form: Form, make: Callable[[Any], Optimizer]) -> None:
    by_hand = _ByHand(form, make)
    runs = [_Run(form, make, compact) for compact in (False, True)]
    by_hand.start_from(runs[0].model)
    for count, images in enumerate(_images()):
        by_hand.step(images)
        for run in runs:
            if count == 10:
                run.save()
            run.step(images)
            by_hand.assert_same(run)
    for run in runs:
        run.frozen.assert_frozen()
        resumed = run.resumed()
        for images in _images()[10:]:
            resumed.step(images)
        by_hand.assert_same(resumed)


def test_every_pattern_and_every_tie_is_among_the_forms() -> None:
    assert set(PATTERNS) >= set(Pattern.known)
    written = {
        type(rule.value)
        for form in TIES.values()
        for rule in rules_of(form.spec(_Net()))
        if isinstance(rule.value, Tie)
    }
    assert written == {*Tie.known.values(), Labeled}
