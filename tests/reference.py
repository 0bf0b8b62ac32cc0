"""A slow reference: a plain model and plain optimizers, frozen by hand with `torch.where` after every event."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)

from freezehooks import Rule, center, entries, keep, smallest, triu

from .draws import rand, randint, randn

DTYPES: Final = (torch.float32, torch.float64, torch.bfloat16)

# --------------------------------------------------------------------------------------------------------------------
# Bits

_INTEGERS: Final = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def differ(first: Tensor, second: Tensor) -> Tensor:
    """Return where two tensors of the same shape and dtype differ in their bits."""
    assert (first.shape, first.dtype) == (second.shape, second.dtype)
    integers = _INTEGERS[first.element_size()]
    return first.detach().contiguous().view(integers) != second.detach().contiguous().view(integers)


# --------------------------------------------------------------------------------------------------------------------
# Models


class ForwardError(RuntimeError):
    """Raised by a forward on request."""


class Images(nn.Module):
    """A convolution in the channels_last format, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs
        self.mix = nn.Linear(3, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, batch: Tensor, interrupt: bool = False) -> Tensor:
        x = torch.tanh(self.conv(batch)).mean((2, 3))
        x = torch.tanh(self.mix(torch.tanh(self.mix(x))))
        if interrupt:
            raise ForwardError
        return torch.as_tensor(self.head(x))

    def batch(self, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        return randn(4, 2, 5, 5, seed=generator).to(dtype)

    def tie(self) -> None:
        """Do nothing: there are no shared parameters."""


class Words(nn.Module):
    """An embedding that shares its weight with the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 3)
        self.norm = nn.LayerNorm(3)
        self.mix = nn.Linear(3, 3)
        self.head = nn.Linear(3, 6, bias=False)
        self.tie()

    def forward(self, batch: Tensor, interrupt: bool = False) -> Tensor:
        x = torch.tanh(self.mix(self.norm(self.embedding(batch))))
        if interrupt:
            raise ForwardError
        return torch.as_tensor(self.head(x))

    def batch(self, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        return randint(0, 6, 4, 3, seed=generator)

    def tie(self) -> None:
        """Make the two names share one parameter again, as is done after loading with `assign=True`."""
        self.head.weight = self.embedding.weight


Net = Images | Words


def parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())


def put_parameter(model: Net, name: str, values: Tensor) -> None:
    """Replace the parameter of that name by a new one."""
    owner, _, key = name.rpartition(".")
    setattr(model.get_submodule(owner), key, nn.Parameter(values, model.get_parameter(name).requires_grad))
    model.tie()


def take_over(parameter: nn.Parameter, other: nn.Parameter, where: Tensor) -> None:
    """Copy some entries of a parameter, and of its gradient, from another one."""
    parameter.data[where] = other.data[where]
    if parameter.grad is not None and other.grad is not None:
        parameter.grad[where] = other.grad[where]


# --------------------------------------------------------------------------------------------------------------------
# Optimizers


@dataclass(frozen=True)
class Kind:
    """An elementwise optimizer: how to build it, and the initial values of its state if they are not 0."""

    make: Callable[[list[nn.Parameter]], Optimizer]
    starts: dict[str, float] = field(default_factory=dict)
    decays_through_gradient: bool = False
    """Whether its weight decay leaves moments at entries whose gradient is 0."""

    is_counted: bool = True
    """Whether autograd's version counters see its steps; they miss those of fused kernels."""

    can_be_compact: bool = True
    can_grow: bool = True
    """Whether a group can be added after its first step."""


KINDS: Final = {
    "sgd": Kind(lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, foreach=True), decays_through_gradient=True),
    "nesterov": Kind(lambda p: SGD(p, lr=0.05, momentum=0.9, nesterov=True, foreach=False)),
    "adam": Kind(
        lambda p: Adam(p, lr=0.02, amsgrad=True, weight_decay=0.1, foreach=False), decays_through_gradient=True
    ),
    "adamw": Kind(lambda p: AdamW(p, lr=0.02, weight_decay=0.1, foreach=True)),
    "adamw_fused": Kind(
        lambda p: AdamW(p, lr=0.02, weight_decay=0.1, fused=True), is_counted=False, can_be_compact=False
    ),
    "nadam": Kind(lambda p: NAdam(p, lr=0.02, weight_decay=0.1), decays_through_gradient=True),
    "radam": Kind(lambda p: RAdam(p, lr=0.02, foreach=True)),
    "rmsprop": Kind(
        lambda p: RMSprop(p, lr=0.01, centered=True, momentum=0.5, weight_decay=0.1), decays_through_gradient=True
    ),
    "adadelta": Kind(lambda p: Adadelta(p, lr=0.5, weight_decay=0.1, foreach=True), decays_through_gradient=True),
    "adagrad": Kind(
        lambda p: Adagrad(p, lr=0.05, initial_accumulator_value=0.25), starts={"sum": 0.25}, can_grow=False
    ),
    "asgd": Kind(lambda p: ASGD(p, lr=0.05, t0=2), can_be_compact=False),
    "rprop": Kind(lambda p: Rprop(p, lr=0.02), starts={"step_size": 0.02}),
}

COUNTERS: Final = frozenset({"step", "eta", "mu", "mu_product"})
AVERAGE: Final = "ax"
"""State that contains weights rather than moments."""


def stepped(optimizer: Optimizer) -> list[nn.Parameter]:
    """Return the parameters of an optimizer in the order of its state dict."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


# --------------------------------------------------------------------------------------------------------------------
# What is frozen


@dataclass
class Piece:
    """The entries that one rule freezes in one parameter, and their values."""

    frozen: Tensor
    source: float | Tensor
    keeps: bool

    def values(self, dtype: torch.dtype) -> Tensor:
        source = self.source if isinstance(self.source, Tensor) else torch.tensor(self.source, dtype=torch.float64)
        return source.to(dtype).expand(self.frozen.shape)

    def disagrees(self, other: Piece, dtype: torch.dtype) -> bool:
        differs = differ(self.values(dtype), other.values(dtype))
        return bool((differs & self.frozen & other.frozen).any())


def copied(pieces: dict[str, list[Piece]]) -> dict[str, list[Piece]]:
    return {name: [replace(piece) for piece in own] for name, own in pieces.items()}


@dataclass(eq=False)
class Hold:
    """What one handle freezes: the handle itself, and what is known about it independently.

    Between an event that moves frozen entries (or their gradients) and the next moment at which they are imposed,
    nothing is promised about them. Such writes are recorded in `stray` and `stray_gradients`: for each parameter,
    whether the version counter moved.
    """

    handle: Any
    pieces: dict[str, list[Piece]]
    attached: bool = True
    stray: dict[str, bool] = field(default_factory=dict)
    stray_gradients: dict[str, bool] = field(default_factory=dict)
    saved: list[tuple[Any, dict[str, list[Piece]]]] = field(default_factory=list)

    def frozen(self, name: str) -> Tensor:
        masks = [piece.frozen for piece in self.pieces[name]]
        return torch.stack(masks).any(dim=0)

    def values(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return a tensor with the values at the frozen entries, and 0 elsewhere."""
        values = torch.zeros(self.pieces[name][0].frozen.shape, dtype=dtype)
        for piece in self.pieces[name]:
            values = torch.where(piece.frozen, piece.values(dtype), values)
        return values

    def save(self) -> None:
        self.saved.append((self.handle.state_dict(), copied(self.pieces)))

    def drifted(self, name: str, parameter: Tensor) -> bool:
        differs = differ(parameter, self.values(name, parameter.dtype).view_as(parameter))
        return bool((differs & self.frozen(name)).any())


def mark(strays: dict[str, bool], name: str, *, counted: bool) -> None:
    """Record a write to frozen entries; one that the version counter missed takes precedence over one that it saw."""
    strays[name] = counted and strays.get(name, True)


@dataclass(eq=False)
class Released:
    """Thawed entries, whose second moments are the means of their squared gradients for 100 steps."""

    parameter: nn.Parameter
    entries: Tensor
    steps: int = 0

    def begin_step(self, optimizer: Optimizer, frozen: Tensor) -> None:
        self.entries = self.entries & ~frozen
        group = next(g for g in optimizer.param_groups if any(p is self.parameter for p in g["params"]))
        state, gradient = optimizer.state.get(self.parameter) or {}, self.parameter.grad
        if "exp_avg_sq" not in state:
            self.steps = 100
        elif gradient is not None:
            self.steps += 1
            wide = torch.promote_types(gradient.dtype, torch.float32)
            seen, moment = gradient.detach().to(wide), state["exp_avg_sq"]
            is_decoupled = group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW))  # torch 2.6
            if group["weight_decay"] and not is_decoupled:
                seen = seen + self.parameter.detach().to(wide) * group["weight_decay"]
            seen = seen.square() * (1 - group["betas"][1] ** float(state["step"]))
            mean = torch.maximum(moment.to(wide) + (seen - moment.to(wide)) / self.steps, seen / 4)
            moment.copy_(torch.where(self.entries, mean.to(moment.dtype), moment))


class Reference:
    """The plain model, its plain optimizers, and what handles hold in it."""

    def __init__(self, model: Net) -> None:
        self.model = model
        self.optimizers: list[Optimizer] = []
        self.released: list[tuple[Optimizer, Released]] = []
        self.holds: list[Hold] = []

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return parameters_by_name(self.model)

    @property
    def attached(self) -> Iterator[Hold]:
        return (hold for hold in self.holds if hold.attached)

    def frozen(self, name: str, holds: Iterable[Hold] | None = None) -> Tensor:
        """Return the entries of a parameter that the given handles freeze, or by default all attached ones."""
        frozen = torch.zeros(self.model.get_parameter(name).shape, dtype=torch.bool)
        for hold in self.attached if holds is None else holds:
            if name in hold.pieces:
                frozen = frozen | hold.frozen(name)
        return frozen

    def impose(self) -> None:
        for hold in self.attached:
            for name in hold.pieces:
                data = self.model.get_parameter(name).data
                data.copy_(torch.where(hold.frozen(name), hold.values(name, data.dtype), data))

    def clean_gradients(self) -> None:
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                gradient = parameter.grad.data
                gradient.copy_(torch.where(self.frozen(name), torch.zeros_like(gradient), gradient))

    def follow_loading(self, names: Iterable[str]) -> None:
        """Impose given values on what was loaded or replaced, then update `keep` to what its entries hold."""
        for hold in self.attached:
            for name, pieces in ((name, hold.pieces[name]) for name in names if name in hold.pieces):
                data = self.parameters[name].data
                for piece in (piece for piece in pieces if not piece.keeps):
                    data.copy_(torch.where(piece.frozen, piece.values(data.dtype), data))
                for piece in (piece for piece in pieces if piece.keeps):
                    piece.source = data.clone()

    def step(
        self,
        optimizer: Optimizer,
        unseen: Iterable[str] = (),
        closure: Callable[[], Tensor] | None = None,
        guarded: Iterable[Hold] = (),
    ) -> None:
        """Step on clean gradients and impose; an optimizer sees no gradient of the parameters that are `unseen`."""
        hidden: dict[str, Tensor | None] = {}

        def prepare() -> None:
            self.clean_gradients()
            for name in unseen:
                hidden[name], self.parameters[name].grad = self.parameters[name].grad, None
            self._begin_released(optimizer, guarded)

        def prepared_closure() -> Tensor:
            assert closure is not None
            loss = closure()
            prepare()
            return loss

        if closure is None:
            prepare()
            optimizer.step()
        else:
            optimizer.step(prepared_closure)  # type: ignore[arg-type]  # torch wants a float
        for name, gradient in hidden.items():
            self.parameters[name].grad = gradient
        self.impose()

    def _begin_released(self, optimizer: Optimizer, guarded: Iterable[Hold]) -> None:
        """Correct the moments of thawed entries in this optimizer by the gradients, without those frozen again."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        for own, released in self.released:
            name = names.get(id(released.parameter))
            if own is optimizer:
                none = torch.zeros_like(released.entries)
                released.begin_step(optimizer, none if name is None else self.frozen(name, guarded))
        self.released = [(own, each) for own, each in self.released if each.steps < 100]

    def release(self, optimizer: Optimizer, name: str, entries: Tensor) -> None:
        """Record that entries were thawed, if the optimizer has second moments and corrects them."""
        has_moments = bool(optimizer.state.get(self.parameters[name]))
        if isinstance(optimizer, (Adam, AdamW, NAdam, RAdam)) and has_moments and bool(entries.any()):
            self.released.append((optimizer, Released(self.parameters[name], entries)))


# --------------------------------------------------------------------------------------------------------------------
# What to freeze: regions as the library takes them, and masks made by plain indexing


def _scattered(shape: torch.Size, fraction: float) -> Tensor:
    frozen = rand(*shape, seed=shape.numel()) < fraction
    frozen.view(-1)[0] = True
    return frozen


def large_half(parameter: Tensor) -> Tensor:
    """A region as a function, which a pickled handle finds by its name."""
    return parameter >= parameter.median()


def _indexed(shape: torch.Size, index: Any) -> Tensor:
    frozen = torch.zeros(shape, dtype=torch.bool)
    frozen[index] = True
    return frozen


def _smallest_half(parameter: Tensor) -> Tensor:
    order = parameter.abs().flatten().sort(stable=True).indices
    return _indexed(torch.Size([order.numel()]), order[: round(order.numel() / 2)]).view(parameter.shape)


def _center(parameter: Tensor) -> Any:
    return (..., 1, 1) if parameter.ndim == 4 else 0


REGIONS: Final[dict[str, Callable[[Tensor], tuple[Any, Tensor]]]] = {
    "whole": lambda p: (entries[...], _indexed(p.shape, ...)),
    "first": lambda p: (entries[0], _indexed(p.shape, 0)),
    "every_other": lambda p: (entries[::2], _indexed(p.shape, slice(None, None, 2))),
    "last_column": lambda p: (entries[..., -1], _indexed(p.shape, (..., -1))),
    "all_but_one": lambda p: (~entries[1], ~_indexed(p.shape, 1)),
    "few": lambda p: (_scattered(p.shape, 0.1), _scattered(p.shape, 0.1)),
    "half": lambda p: (_scattered(p.shape, 0.5), _scattered(p.shape, 0.5)),
    "center": lambda p: (center if p.ndim == 4 else entries[0], _indexed(p.shape, _center(p))),
    "triangle": lambda p: (
        (triu(0), torch.ones(p.shape, dtype=torch.bool).triu()) if p.ndim == 2 else REGIONS["half"](p)
    ),
    "smallest": lambda p: (smallest(0.5), _smallest_half(p)),
    "function": lambda p: (large_half, large_half(p)),
}

VALUES: Final = (keep, keep, keep, 0.0, -0.0, 0.5, 0.1, "tensor")


@dataclass(frozen=True)
class Drawn:
    """One rule: parameter, region and value."""

    target: int
    region: str
    value: Any

    def resolve(self, name: str, parameter: Tensor) -> tuple[Rule, Piece]:
        """Return the rule for a parameter as it is now, and its meaning."""
        region, frozen = REGIONS[self.region](parameter)
        if self.value is keep:
            return Rule(name, region), Piece(frozen, parameter.detach().clone(), keeps=True)
        if self.value == "tensor":
            values = torch.linspace(-0.75, 0.75, parameter.numel()).view(parameter.shape)
            return Rule(name, frozen, values), Piece(frozen, values, keeps=False)
        return Rule(name, region, self.value), Piece(frozen, self.value, keeps=False)
