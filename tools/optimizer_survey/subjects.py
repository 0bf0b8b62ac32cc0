"""Which optimizers are surveyed, and what each needs to be built and to make a step."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Final

import pytorch_optimizer as foreign
import timm.optim as timm
from pytorch_optimizer.optimizer import OPTIMIZERS
from torch import Tensor, distributed, nn
from torch.optim import SGD, AdamW

DECAY: Final = 0.01
"""Weight decay, for all that have it: it moves weights whose gradient is 0."""

LENGTH: Final = 200
"""How many steps an optimizer is told that the training has."""

Backward = Callable[..., Tensor]
"""Clear the gradients, compute the loss and go backward from it, or do with it what is given; returns the loss."""


# --------------------------------------------------------------------------------------------------------------------
# Models


def images() -> nn.Sequential:
    """Return a small network of a convolution and two layers, for images of shape (2, 4, 4)."""
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))


def matrices() -> nn.Sequential:
    """Return one of matrices alone, for the same images: pairs of low rank, as LoRA has them."""
    shapes = ((32, 4), (4, 8), (8, 2), (2, 3))
    return nn.Sequential(nn.Flatten(), *(nn.Linear(*shape, bias=False) for shape in shapes))


# --------------------------------------------------------------------------------------------------------------------
# Ways to make a step


def after_backward(optimizer: Any, backward: Backward) -> None:
    """Step as most do."""
    backward()
    optimizer.step()


def after_backward_with_graph(optimizer: Any, backward: Backward) -> None:
    """Step one that goes backward a second time, through the gradients."""
    backward(lambda loss: loss.backward(create_graph=True))
    optimizer.step()


def with_closure(optimizer: Any, backward: Backward) -> None:
    """Step one that evaluates a closure."""
    optimizer.step(backward)


def after_backward_with_closure(optimizer: Any, backward: Backward) -> None:
    """Step one that has its first gradients already, and evaluates a closure for its second ones."""
    backward()
    optimizer.step(backward)


def with_closure_of_pairs(optimizer: Any, backward: Backward) -> None:
    """Step one whose closure returns outputs and loss."""
    optimizer.step(lambda: (None, backward()))


def with_loss(optimizer: Any, backward: Backward) -> None:
    """Step one whose closure gives the number that the loss had."""
    loss = float(backward())
    optimizer.step(lambda: loss)


def within_backward(optimizer: Any, backward: Backward) -> None:
    """Step one that writes the weights while it goes backward, and has no step."""
    backward(lambda loss: optimizer.fused_backward(loss, 1e-3))


def of_two_tasks(optimizer: Any, backward: Backward) -> None:
    """Step one that takes the losses of several tasks."""
    backward(lambda loss: optimizer.pc_backward([loss, loss.square()]))
    optimizer.step()


# --------------------------------------------------------------------------------------------------------------------
# Subjects


@contextmanager
def one_process() -> Iterator[None]:
    """Have a process group of one process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


@dataclass(frozen=True)
class Subject:
    """An optimizer, and how to train with it.

    Attributes:
        name: Its package and the name that it has there.
        make: Make it for a model.
        advance: Make one step of it, given the backward pass.
        model: What it can train.
        around: What has to be there for as long as it trains.
        missing: The package without which it cannot be made, or nothing.
    """

    name: str
    make: Callable[[nn.Module], Any]
    advance: Callable[[Any, Backward], None] = after_backward
    model: Callable[[], nn.Module] = images
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    missing: str = ""


_ADVANCE: Final = {
    "pytorch_optimizer.adahessian": after_backward_with_graph,
    "pytorch_optimizer.adalomo": within_backward,
    "pytorch_optimizer.alig": with_loss,
    "pytorch_optimizer.bsam": after_backward_with_closure,
    "pytorch_optimizer.lbfgs": with_closure,
    "pytorch_optimizer.lomo": within_backward,
    "pytorch_optimizer.sophiah": after_backward_with_graph,
    "timm.adahessian": after_backward_with_graph,
}

_MATRICES_ALONE: Final = ("pytorch_optimizer.adalomo", "pytorch_optimizer.lorarite", "pytorch_optimizer.spectralsphere")

_ARGUMENTS: Final[dict[str, dict[str, Any]]] = {
    "pytorch_optimizer.bsam": {"num_data": 5},
    "pytorch_optimizer.ranger21": {"num_iterations": LENGTH},
    "timm.sgdp": {"lr": 1e-3},
    "timm.csgdp": {"lr": 1e-3},
}

_MADE_BY_HAND: Final[dict[str, Callable[[nn.Module], Any]]] = {
    "pytorch_optimizer.lbfgs": lambda model: foreign.LBFGS(model.parameters(), lr=0.1),
    "pytorch_optimizer.distributedmuon": lambda model: foreign.DistributedMuon(
        [
            {"params": [p for p in model.parameters() if p.ndim == 2], "use_muon": True},
            {"params": [p for p in model.parameters() if p.ndim != 2], "use_muon": False},
        ],
        weight_decay=DECAY,
    ),
}

_NEEDS: Final = {"pytorch_optimizer.demo": "einops"}


def subjects() -> Iterator[Subject]:
    """Yield all that the two packages register, and their wrappers."""
    for name in OPTIMIZERS:
        yield _subject(f"pytorch_optimizer.{name}", _maker_of_pytorch_optimizer(name))
    for name in timm.list_optimizers():
        yield _subject(f"timm.{name}", _maker_of_timm(name), _package_of_timm(name))
    yield from _wrappers()


def _subject(name: str, make: Callable[[nn.Module], Any], package: str = "") -> Subject:
    package = package or _NEEDS.get(name, "")
    return Subject(
        name,
        _MADE_BY_HAND.get(name, make),
        _ADVANCE.get(name, after_backward),
        matrices if name in _MATRICES_ALONE else images,
        one_process if "distributed" in name else nullcontext,
        "" if not package or find_spec(package) else package,
    )


def _maker_of_pytorch_optimizer(name: str) -> Callable[[nn.Module], Any]:
    parameters = inspect.signature(OPTIMIZERS[name]).parameters
    arguments = {
        "lr": parameters["lr"].default if "lr" in parameters else 1e-3,
        "weight_decay": DECAY,
        **_ARGUMENTS.get(f"pytorch_optimizer.{name}", {}),
    }

    def make(model: nn.Module) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Muon is advised to be made by hand
            return foreign.create_optimizer(model, name, **arguments)

    return make


def _maker_of_timm(name: str) -> Callable[[nn.Module], Any]:
    arguments = _ARGUMENTS.get(f"timm.{name}", {})
    return lambda model: timm.create_optimizer_v2(model, name, weight_decay=DECAY, **arguments)


def _package_of_timm(name: str) -> str:
    """Return the other package that an optimizer of timm is from, which needs a GPU; nothing for its own."""
    kind = timm.get_optimizer_info(name).opt_class
    return str(kind).split(".")[0] if isinstance(kind, str) else ""


def _wrappers() -> Iterator[Subject]:
    """Yield wrappers, around SGD with momentum or AdamW."""
    momentum = {"lr": 1e-2, "momentum": 0.9, "weight_decay": DECAY}
    around: dict[str, Callable[[Any], Any]] = {
        "lookahead": lambda inner: foreign.Lookahead(inner, k=3),
        "lookahead_pullback": lambda inner: foreign.Lookahead(inner, k=3, pullback_momentum="pullback"),
        "orthograd": foreign.OrthoGrad,
        "schedulefreewrapper": foreign.ScheduleFreeWrapper,
        "trac": foreign.TRAC,
        "safefp16optimizer": foreign.SafeFP16Optimizer,
    }
    for name, wrap in around.items():
        yield Subject(f"pytorch_optimizer.{name}", lambda model, wrap=wrap: wrap(SGD(model.parameters(), **momentum)))
    yield Subject(
        "pytorch_optimizer.pcgrad", lambda model: foreign.PCGrad(SGD(model.parameters(), **momentum)), of_two_tasks
    )
    yield Subject("timm.lookahead", lambda model: timm.Lookahead(AdamW(model.parameters(), weight_decay=DECAY), k=3))
    for kind in (foreign.SAM, foreign.LookSAM, foreign.FriendlySAM):
        yield Subject(
            f"pytorch_optimizer.{kind.__name__.lower()}",
            lambda model, kind=kind: kind(model.parameters(), SGD, **momentum),
            after_backward_with_closure,
        )
    yield Subject(
        "pytorch_optimizer.wsam", lambda model: foreign.WSAM(model, model.parameters(), SGD, **momentum), with_closure
    )
    yield Subject("pytorch_optimizer.gsam", _gsam, with_closure_of_pairs)


def _gsam(model: nn.Module) -> Any:
    inner = SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=DECAY)
    rates = foreign.LinearScheduler(inner, t_max=LENGTH, max_lr=1e-2, min_lr=1e-3)
    radius = foreign.ProportionScheduler(rates, max_lr=1e-2, min_lr=1e-3, max_value=0.05, min_value=0.01)
    return foreign.GSAM(model.parameters(), inner, model, radius)
