"""Every optimizer of torch.optim, in every configuration that torch's own tests list and every kernel of the CPU."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from freezehooks import MaskedOptimizer, freeze_entries

from .claims import (
    FreeEntriesAlone,
    assert_gradients_clean,
    assert_model_holds,
    assert_training_holds,
    largest_difference,
    same_bits,
)
from .draws import rand, randn
from .zoo import ZOO, Animal, Held

pytest.importorskip("expecttest")  # torch's test database imports it

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_optimizers import optim_db

STEPS = 8
MIXING = {"Adafactor", "LBFGS", "Muon"}
"""Optimizers whose update of one entry depends on others; `docs/guarantees.md` says what the free entries follow."""

ANIMALS = [animal for animal in ZOO if animal.name in ("matrix_alone", "several_rules", "conv2d_center")]


@dataclass(frozen=True)
class Case:
    """One optimizer in one configuration, run by one kind of kernel."""

    name: str
    kind: type[Optimizer]
    options: dict[str, Any]
    kernel: str

    def make(self, parameters: list[Tensor]) -> Optimizer:
        return self.kind(parameters, **copy.deepcopy(self.options))

    @property
    def mixes(self) -> bool:
        return self.kind.__name__ in MIXING


def _cases() -> Iterator[Case]:
    for info in optim_db:
        kernels = [k for k in ("foreach", "fused") if k in info.supported_impls]
        for wanted in info.optim_inputs_func(device="cpu"):
            for kernel in ["single", *kernels]:
                off = dict.fromkeys(kernels, False)
                options = {**wanted.kwargs, **off, **({kernel: True} if kernel != "single" else {})}
                kind: Any = info.optim_cls  # declared as an instance there
                case = Case(f"{kind.__name__}-{wanted.desc}-{kernel}", kind, options, kernel)
                if _torch_accepts(case):
                    yield case


def _torch_accepts(case: Case) -> bool:
    """Return whether torch supports this combination: a tensor as `lr`, for instance, needs capturable kernels."""
    weight = torch.zeros(2, 2, requires_grad=True)
    weight.grad = torch.zeros(2, 2)
    try:
        optimizer = case.make([weight])
        if case.kernel == "fused":
            optimizer.step()  # Adagrad says only here that it has no such kernel for CUDA
    except (ValueError, RuntimeError):
        return False
    return True


def _torch_steps_sparse(case: Case) -> bool:
    """Return whether torch itself steps sparse gradients in this configuration."""
    weight = torch.zeros(3, 2, requires_grad=True)
    weight.grad = torch.ones(3, 2).to_sparse(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.make([weight]).step()
    except (RuntimeError, TypeError):
        return False
    return True


CASES = [case for case in _cases() if case.kind is not torch.optim.SparseAdam]
SPARSE = [case for case in _cases() if _torch_steps_sparse(case)]

cases = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
animals = pytest.mark.parametrize("animal", ANIMALS, ids=[animal.name for animal in ANIMALS])


def _fits(case: Case, animal: Animal) -> bool:
    return case.kind.__name__ != "Muon" or animal.name == "matrix_alone"  # Muon takes matrices and nothing else


PAIRS = [(case, animal) for case in CASES for animal in ANIMALS if _fits(case, animal)]
pairs = pytest.mark.parametrize(("case", "animal"), PAIRS, ids=[f"{case.name}-{animal.name}" for case, animal in PAIRS])


def test_every_optimizer_of_torch_is_here() -> None:
    everywhere = {kind for kind in vars(torch.optim).values() if isinstance(kind, type) and issubclass(kind, Optimizer)}
    listed: set[Any] = {info.optim_cls for info in optim_db}
    assert everywhere - {Optimizer} == listed


def _step(optimizer: Optimizer, loss: Callable[[], Tensor]) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    if "LBFGS" in repr(type(getattr(optimizer, "inner", optimizer))):
        optimizer.step(closure)  # type: ignore[arg-type]  # torch's annotation wants a float
    else:
        closure()
        optimizer.step()


@pairs
def test_frozen_entries_hold_at_every_point(case: Case, animal: Animal) -> None:
    model = animal.model()
    held = animal.held(model)
    optimizer = MaskedOptimizer(case.make(list(model.parameters())), freeze_entries(model, animal.spec))
    if case.kind is not torch.optim.LBFGS:
        assert_training_holds(animal, model, held, optimizer, STEPS)
        return
    for _ in range(STEPS):
        _step(optimizer, partial(_held_loss, animal, model, held, animal.batch()))
        assert_gradients_clean(model, held)
        assert_model_holds(model, held, "after the step")


def _held_loss(animal: Animal, model: nn.Module, held: dict[str, Held], batch: tuple[Any, ...]) -> Tensor:
    assert_model_holds(model, held, "inside the closure")
    return animal.loss(model, batch)


ELEMENTWISE = [(case, animal) for case, animal in PAIRS if not case.mixes]


@pytest.mark.parametrize(("case", "animal"), ELEMENTWISE, ids=[f"{c.name}-{a.name}" for c, a in ELEMENTWISE])
def test_free_entries_follow_the_optimizer_that_holds_them_alone_bit_for_bit(case: Case, animal: Animal) -> None:
    model = animal.model()
    held = animal.held(model)
    reference = FreeEntriesAlone(copy.deepcopy(model), held, case.make, same_layout=case.kernel == "fused")
    optimizer = MaskedOptimizer(case.make(list(model.parameters())), freeze_entries(model, animal.spec))
    for _ in range(STEPS):
        batch = animal.batch()
        _step(optimizer, partial(animal.loss, model, batch))
        reference.step(partial(_loss_of, animal, batch))
    together = zip(model.parameters(), reference.model.parameters(), strict=True)
    assert all(same_bits(ours, theirs) for ours, theirs in together), largest_difference(model, reference.model)


def _loss_of(animal: Animal, batch: tuple[Any, ...], model: nn.Module) -> Tensor:
    return animal.loss(model, batch)


@cases
def test_with_nothing_frozen_every_optimizer_is_itself(case: Case) -> None:
    animal = ANIMALS[-1]
    torch.manual_seed(6)
    ours = animal.model()
    plain = copy.deepcopy(ours)
    wrapped, reference = MaskedOptimizer(case.make(list(ours.parameters())), ()), case.make(list(plain.parameters()))
    for _ in range(3):
        batch = animal.batch()
        _step(wrapped, partial(animal.loss, ours, batch))
        _step(reference, partial(animal.loss, plain, batch))
    assert all(same_bits(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))
    again = case.make(list(plain.parameters()))
    again.load_state_dict(wrapped.state_dict())
    wrapped.load_state_dict(reference.state_dict())
    batch = animal.batch()
    _step(wrapped, partial(animal.loss, ours, batch))
    _step(again, partial(animal.loss, plain, batch))
    assert all(same_bits(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))


WARM = [case for case in CASES if case.kernel == "single" or "default" in case.name]


@pytest.mark.parametrize("case", WARM, ids=[case.name for case in WARM])
def test_freezing_thawing_and_freezing_something_else_in_mid_training(case: Case) -> None:
    """Exact each time; thawed entries train on from the value at which they were held."""
    animal = ANIMALS[-1]
    model = nn.Linear(12, 16, bias=False)
    optimizer = MaskedOptimizer(case.make(list(model.parameters())), ())
    _train(animal, model, optimizer)
    first = freeze_entries(model, "weight[0]\nweight[1:3, ::2] = 0.25")
    first.guard(optimizer)
    held = model.weight.detach().clone()
    _train(animal, model, optimizer)
    assert same_bits(model.weight[first["weight"].frozen], held[first["weight"].frozen])
    first.thaw("weight")
    scattered = rand(16, 12, seed=0) < 0.5  # not by magnitude: some diverge
    second = freeze_entries(model, {"weight": (scattered, -0.5)})
    second.guard(optimizer)
    moved = model.weight[0].detach().clone()
    _train(animal, model, optimizer)
    second.assert_frozen()
    free = ~second["weight"].frozen[0]
    assert bool((model.weight[0, free] != moved[free]).all())


def _train(animal: Animal, model: nn.Module, optimizer: Optimizer) -> None:
    for seed in range(3):
        batch = (randn(5, 12, seed=seed),)
        _step(optimizer, partial(animal.loss, model, batch))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's own, inside Adagrad
@pytest.mark.parametrize("case", SPARSE, ids=[case.name for case in SPARSE])
def test_sparse_gradients_hold(case: Case) -> None:
    torch.manual_seed(8)
    embedding = nn.Embedding(12, 3, sparse=True)
    before = embedding.weight.detach().clone()
    frozen = freeze_entries(embedding, "weight[:6]\nweight[8, 1] = 0.5")
    optimizer = MaskedOptimizer(case.make(list(embedding.parameters())), frozen)
    tokens = torch.tensor([1, 1, 5, 7, 8])
    for _ in range(4):
        optimizer.zero_grad()
        embedding(tokens).square().sum().backward()
        optimizer.step()
        frozen.assert_frozen()
    assert same_bits(embedding.weight[:6], before[:6])
    assert bool((embedding.weight[7] != before[7]).all())
