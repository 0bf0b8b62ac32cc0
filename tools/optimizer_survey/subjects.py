"""The optimizers of the survey, and how to build and step each of them."""

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
"""Weight decay, for all optimizers that have it: it moves weights whose gradient is 0."""

LENGTH: Final = 200
"""The number of training steps to tell optimizers that ask for it."""

_Maker = Callable[[nn.Module], Any]

Backward = Callable[..., Tensor]
"""Clear the gradients, compute the loss, run backward or another given function on it, and return the loss."""


# --------------------------------------------------------------------------------------------------------------------
# Models


def images() -> nn.Sequential:
    """Return a small network of a convolution and two layers, for images of shape (2, 4, 4)."""
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))


def matrices() -> nn.Sequential:
    """Return a network of matrices only, for the same images: low-rank pairs, as in LoRA."""
    shapes = ((32, 4), (4, 8), (8, 2), (2, 3))
    return nn.Sequential(nn.Flatten(), *(nn.Linear(*shape, bias=False) for shape in shapes))


# --------------------------------------------------------------------------------------------------------------------
# Ways to make a step


def after_backward(optimizer: Any, backward: Backward) -> None:
    """Step as most optimizers do."""
    backward()
    optimizer.step()


def after_backward_with_graph(optimizer: Any, backward: Backward) -> None:
    """Step an optimizer that differentiates the gradients again."""
    backward(lambda loss: loss.backward(create_graph=True))
    optimizer.step()


def with_closure(optimizer: Any, backward: Backward) -> None:
    """Step an optimizer that evaluates a closure."""
    optimizer.step(backward)


def after_backward_with_closure(optimizer: Any, backward: Backward) -> None:
    """Step an optimizer that has its first gradients already, and evaluates a closure for the second ones."""
    backward()
    optimizer.step(backward)


def with_closure_of_pairs(optimizer: Any, backward: Backward) -> None:
    """Step an optimizer whose closure returns outputs and loss."""
    optimizer.step(lambda: (None, backward()))


def with_loss(optimizer: Any, backward: Backward) -> None:
    """Step an optimizer whose closure returns the loss as a number."""
    loss = float(backward())
    optimizer.step(lambda: loss)


def within_backward(optimizer: Any, backward: Backward) -> None:
    """Step an optimizer that updates the weights during backward, and has no step."""
    backward(lambda loss: optimizer.fused_backward(loss, 1e-3))


def of_two_tasks(optimizer: Any, backward: Backward) -> None:
    """Step an optimizer that takes the losses of several tasks."""
    backward(lambda loss: optimizer.pc_backward([loss, loss.square()]))
    optimizer.step()


# --------------------------------------------------------------------------------------------------------------------
# Subjects


@contextmanager
def one_process() -> Iterator[None]:
    """Keep a process group of one process inside the block."""
    store = distributed.HashStore()  # type: ignore[attr-defined]  # torch does not say that it exports it
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


@dataclass(frozen=True)
class Subject:
    """An optimizer, and how to train with it.

    Attributes:
        name: Its package and its name there.
        make: A function that builds it for a model.
        advance: A function that makes one step, given the backward pass.
        model: A function that builds a model that it can train.
        around: A context manager that is needed while it trains.
        missing: The missing package that it needs; empty if there is none.
    """

    name: str
    make: _Maker
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

_MATRICES_ALONE: Final = (
    "pytorch_optimizer.adalomo",
    "pytorch_optimizer.demo",
    "pytorch_optimizer.lorarite",
    "pytorch_optimizer.spectralsphere",
)

_IN_A_GROUP: Final = ("pytorch_optimizer.demo", "pytorch_optimizer.distributedmuon")

_ARGUMENTS: Final[dict[str, dict[str, Any]]] = {
    "pytorch_optimizer.bsam": {"num_data": 5},
    "pytorch_optimizer.ranger21": {"num_iterations": LENGTH},
    "timm.sgdp": {"lr": 1e-3},
    "timm.csgdp": {"lr": 1e-3},
}

_MADE_BY_HAND: Final[dict[str, _Maker]] = {
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
    """Yield all optimizers that the two packages register, and their wrappers."""
    for name in OPTIMIZERS:
        yield _subject(f"pytorch_optimizer.{name}", _maker_of_pytorch_optimizer(name))
    for name in timm.list_optimizers():
        yield _subject(f"timm.{name}", _maker_of_timm(name), _package_of_timm(name))
    yield from _wrappers()


def _subject(name: str, make: _Maker, package: str = "") -> Subject:
    package = package or _NEEDS.get(name, "")
    return Subject(
        name,
        _MADE_BY_HAND.get(name, make),
        _ADVANCE.get(name, after_backward),
        matrices if name in _MATRICES_ALONE else images,
        one_process if name in _IN_A_GROUP else nullcontext,
        "" if not package or find_spec(package) else package,
    )


def _maker_of_pytorch_optimizer(name: str) -> _Maker:
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


def _maker_of_timm(name: str) -> _Maker:
    arguments = _ARGUMENTS.get(f"timm.{name}", {})
    return lambda model: timm.create_optimizer_v2(model, name, weight_decay=DECAY, **arguments)


def _package_of_timm(name: str) -> str:
    """Return the package, which needs a GPU, that an optimizer of timm comes from; empty for timm's own."""
    kind = timm.get_optimizer_info(name).opt_class
    return str(kind).split(".")[0] if isinstance(kind, str) else ""


_SGD: Final[dict[str, Any]] = {"lr": 1e-2, "momentum": 0.9, "weight_decay": DECAY}
"""The optimizer that wrappers wrap."""


def _sgd(model: nn.Module) -> SGD:
    return SGD(model.parameters(), **_SGD)


def _wrappers() -> Iterator[Subject]:
    """Yield wrappers, and optimizers whose step consists of two."""
    yield _wrapper("lookahead", lambda model: foreign.Lookahead(_sgd(model), k=3))
    yield _wrapper(
        "lookahead_pullback", lambda model: foreign.Lookahead(_sgd(model), k=3, pullback_momentum="pullback")
    )
    yield _wrapper("orthograd", lambda model: foreign.OrthoGrad(_sgd(model)))
    yield _wrapper("schedulefreewrapper", lambda model: foreign.ScheduleFreeWrapper(_sgd(model)))
    yield _wrapper("trac", lambda model: foreign.TRAC(_sgd(model)))
    yield _wrapper("safefp16optimizer", lambda model: foreign.SafeFP16Optimizer(_sgd(model)))
    yield _wrapper("pcgrad", lambda model: foreign.PCGrad(_sgd(model)), of_two_tasks)
    yield _wrapper("sam", _sharp(foreign.SAM), after_backward_with_closure)
    yield _wrapper("looksam", _sharp(foreign.LookSAM), after_backward_with_closure)
    yield _wrapper("friendlysam", _sharp(foreign.FriendlySAM), after_backward_with_closure)
    yield _wrapper("wsam", lambda model: foreign.WSAM(model, model.parameters(), SGD, **_SGD), with_closure)
    yield _wrapper("gsam", _gsam, with_closure_of_pairs)
    yield Subject("timm.lookahead", lambda model: timm.Lookahead(AdamW(model.parameters(), weight_decay=DECAY), k=3))


def _wrapper(name: str, make: _Maker, advance: Callable[[Any, Backward], None] = after_backward) -> Subject:
    return Subject(f"pytorch_optimizer.{name}", make, advance)


def _sharp(kind: Any) -> _Maker:
    return lambda model: kind(model.parameters(), SGD, **_SGD)


def _gsam(model: nn.Module) -> Any:
    inner = _sgd(model)
    rates = foreign.LinearScheduler(inner, t_max=LENGTH, max_lr=1e-2, min_lr=1e-3)
    radius = foreign.ProportionScheduler(rates, max_lr=1e-2, min_lr=1e-3, max_value=0.05, min_value=0.01)
    return foreign.GSAM(model.parameters(), inner, model, radius)
