"""The optimizer's state at frozen entries: known items are reset, and unknown ones are left alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import pytest
import torch
from torch import Tensor, nn
from torch.optim import ASGD, SGD, Adadelta, Adagrad, Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop

from freezehooks import FrozenEntries, MaskedOptimizer, freeze_entries

from .claims import same_bits
from .draws import randn

SHAPE: Final = (6, 6)
FROZEN: Final = torch.zeros(SHAPE, dtype=torch.bool)
FROZEN[0] = FROZEN[3:, 1::2] = True

# --------------------------------------------------------------------------------------------------------------------
# Unknown optimizers, each with a kind of state in which 0 does not mean "no history"


class Unknown(Optimizer):
    """Steps by the gradient, and keeps state of the weight's shape that it checks at every step."""

    def __init__(self, parameters: list[Tensor], lr: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr, "train_mode": True})

    def starts(self, weight: Tensor) -> dict[str, Any]:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight] or self.state[weight]
                state.update({} if state else self.starts(weight))
                weight.sub_(group["lr"] * weight.grad)


class EightBit(Unknown):
    """Codes in which 0 means -0.99 times the largest of a block."""

    def starts(self, weight: Tensor) -> dict[str, Any]:
        codes = torch.full_like(weight, 127, dtype=torch.uint8)
        return {"exp_avg": codes, "exp_avg_sq": codes.clone(), "state1": codes.clone(), "absmax": torch.ones(1)}


class Preconditioner(Unknown):
    """Square matrices for a square weight, and moments in the basis of their eigenvectors."""

    def starts(self, weight: Tensor) -> dict[str, Any]:
        square = torch.randn(6, 6)
        names = ("row_preconditioner", "col_preconditioner", "Q", "exp_avg", "exp_avg_sq", "momentum_buffer")
        return {name: (square @ square.T).clone() for name in names}


class Anchored(Unknown):
    """State that starts at the weight, or at one: MADGRAD, Lookahead, schedule-free."""

    def starts(self, weight: Tensor) -> dict[str, Any]:
        anchors = {name: weight.clone() for name in ("x0", "lookahead_slow_buff", "slow_buffer", "z", "x", "y", "ax")}
        return {**anchors, "sum": torch.ones_like(weight), "scale": torch.ones_like(weight), "step_size": weight + 3}


class Tricky(Tensor):
    """A tensor subclass that nothing may write to, copy or compare, as quantized state is."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("__get__", "__deepcopy__", "__reduce_ex__"):
            return super().__torch_function__(func, types, args, kwargs or {})
        raise NotImplementedError(func)


class Subclassed(Unknown):
    def starts(self, weight: Tensor) -> dict[str, Any]:
        return {"exp_avg": torch.full_like(weight, 3.0).as_subclass(Tricky)}


class OtherAdam(AdamW):
    """Named like one of torch's, with a step of its own: its moments may mean anything."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.param_groups[0]["params"][0].sub_(0.1)
        state = self.state[self.param_groups[0]["params"][0]]
        state.setdefault("exp_avg", torch.full(SHAPE, 5.0))
        state.setdefault("old_dirs", [torch.ones(36)])


UNKNOWN: Final = [EightBit, Preconditioner, Anchored, Subclassed, OtherAdam]
unknown = pytest.mark.parametrize("kind", UNKNOWN, ids=[kind.__name__ for kind in UNKNOWN])


def _numbers(state: dict[Any, Any]) -> list[Tensor]:
    own = next(iter(state.values()))
    tensors = [each for item in own.values() for each in (item if isinstance(item, list) else [item])]
    return [each.as_subclass(Tensor).clone() for each in tensors if isinstance(each, Tensor)]


def _guard_and_let_go(optimizer: Optimizer, frozen: FrozenEntries, look: Callable[[], None]) -> None:
    """Trigger every event at which known state is reset."""
    guard = frozen.guard(optimizer)
    look()
    optimizer.step()
    look()
    optimizer.state_dict()
    look()
    frozen.load_state_dict(frozen.state_dict())
    look()
    guard.remove()
    look()
    frozen.guard(optimizer)
    frozen.thaw("weight")
    look()
    optimizer.step()
    look()
    frozen.remove()
    look()


@unknown
@pytest.mark.parametrize("is_warm", [False, True], ids=["cold", "warm"])
def test_the_state_of_an_optimizer_that_is_not_known_is_never_written_to(kind: Any, is_warm: bool) -> None:
    weight, bias = nn.Parameter(torch.randn(SHAPE)), nn.Parameter(torch.zeros(1))
    weight.grad, bias.grad = torch.ones(SHAPE), torch.ones(1)
    optimizer = kind([weight], lr=0.1)
    if is_warm:
        optimizer.step()
    frozen = freeze_entries({"weight": weight, "bias": bias}, {"weight": (FROZEN, 0.5)})
    frozen.guard(optimizer)
    optimizer.step()
    assert same_bits(weight[FROZEN], torch.full((int(FROZEN.sum()),), 0.5))
    before = _numbers(optimizer.state)
    items = [id(item) for item in optimizer.state[weight].values()]

    def look() -> None:
        assert all(map(same_bits, _numbers(optimizer.state), before))
        assert [id(item) for item in optimizer.state[weight].values()] == items

    _guard_and_let_go(optimizer, frozen, look)


@pytest.mark.parametrize("kind", [EightBit, Preconditioner, Anchored], ids=lambda kind: kind.__name__)
def test_the_state_of_an_optimizer_that_is_not_known_is_loaded_and_copied_as_it_is(kind: Any) -> None:
    weight = nn.Parameter(torch.randn(SHAPE))
    weight.grad = torch.ones(SHAPE)
    optimizer = kind([weight])
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    plain = kind([weight])
    plain.load_state_dict(copy.deepcopy(saved))
    masked = MaskedOptimizer(kind([weight]), freeze_entries({"weight": weight}, {"weight": FROZEN}))
    masked.load_state_dict(saved)
    expected = _numbers(plain.state)
    for each in (masked, copy.deepcopy(masked), pickle.loads(pickle.dumps(masked)) if kind is EightBit else masked):
        assert all(map(same_bits, _numbers(each.state), expected))


@pytest.mark.parametrize(
    "item",
    [
        torch.full(SHAPE, 127, dtype=torch.uint8),
        torch.full(SHAPE, 2.0, dtype=torch.float64),
        torch.full(SHAPE, 2.0).as_subclass(Tricky),
        torch.eye(6).to_sparse(),
        torch.full((6,), 2.0),
        "text",
    ],
    ids=["codes", "other_dtype", "subclass", "sparse", "other_shape", "no_tensor"],
)
def test_a_known_item_of_an_unexpected_form_is_left_alone(item: Any) -> None:
    weight = nn.Parameter(torch.randn(SHAPE))
    optimizer = AdamW([weight])
    optimizer.state[weight] = {"step": torch.tensor(3.0), "exp_avg": item, "exp_avg_sq": torch.ones(SHAPE)}
    frozen = freeze_entries({"weight": weight}, {"weight": FROZEN})
    frozen.guard(optimizer)
    optimizer.state_dict()
    frozen.remove()
    assert optimizer.state[weight]["exp_avg"] is item
    if isinstance(item, Tensor) and type(item) is Tensor and not item.is_sparse:
        assert bool((item != 0).all())
    assert not bool(optimizer.state[weight]["exp_avg_sq"][FROZEN].any())


def test_what_a_user_keeps_in_the_state_of_a_known_optimizer_is_left_alone() -> None:
    for compact in (False, True):
        weight = nn.Parameter(torch.randn(SHAPE))
        optimizer = AdamW([weight])
        mine = torch.full(SHAPE, 7.0)
        optimizer.state[weight]["importance"] = mine
        optimizer.state[weight].update(
            step=torch.tensor(1.0), exp_avg=torch.zeros(SHAPE), exp_avg_sq=torch.zeros(SHAPE)
        )
        frozen = freeze_entries({"weight": weight}, {"weight": FROZEN})
        masked = MaskedOptimizer(optimizer, frozen, compact=compact)
        weight.grad = torch.ones(SHAPE)
        masked.step()
        assert same_bits(masked.state_dict()["state"][0]["importance"], mine)
        frozen.remove()
        assert optimizer.state[weight]["importance"] is mine
        assert bool((mine == 7).all())


# --------------------------------------------------------------------------------------------------------------------
# One canonical state

COUPLED: Final[dict[str, Callable[[list[Tensor]], Optimizer]]] = {
    "sgd": partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam": partial(Adam, lr=0.1, amsgrad=True, weight_decay=0.1),
    "nadam": partial(NAdam, lr=0.1, weight_decay=0.1),
    "radam": partial(RAdam, lr=0.1, weight_decay=0.1),
    "rmsprop": partial(RMSprop, lr=0.1, centered=True, momentum=0.5, weight_decay=0.1),
    "adagrad": partial(Adagrad, lr=0.1, initial_accumulator_value=0.25, weight_decay=0.1),
    "adadelta": partial(Adadelta, weight_decay=0.1),
    "asgd": partial(ASGD, lr=0.1, t0=1, weight_decay=0.1),
}
coupled = pytest.mark.parametrize("make", COUPLED.values(), ids=COUPLED)
either_mode = pytest.mark.parametrize("compact", [False, True], ids=["masked", "compact"])
STARTS: Final = {"sum": 0.25, "ax": 0.5}


def _step(weight: Tensor, optimizer: Optimizer, steps: int = 4, start: int = 0) -> None:
    for seed in range(start, start + steps):
        weight.grad = randn(*SHAPE, seed=seed)
        optimizer.step()


def _same_state(first: dict[str, Any], second: dict[str, Any]) -> bool:
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    return True


def _run(
    make: Any, compact: bool, guarded: bool = False, whole: bool = False
) -> tuple[nn.Parameter, FrozenEntries, Optimizer]:
    torch.manual_seed(1)
    weight = nn.Parameter(torch.randn(SHAPE))
    frozen = freeze_entries({"weight": weight}, "weight = 0.5" if whole else {"weight": (FROZEN, 0.5)})
    if not guarded:
        return weight, frozen, MaskedOptimizer(make([weight]), frozen, compact=compact)
    optimizer = make([weight])
    frozen.guard(optimizer, compact=compact)
    return weight, frozen, optimizer


@coupled
@either_mode
@pytest.mark.parametrize("guarded", [False, True], ids=["wrapped", "guarded"])
def test_what_is_saved_is_as_it_starts_at_frozen_entries(make: Any, compact: bool, guarded: bool) -> None:
    weight, _, optimizer = _run(make, compact, guarded)
    _step(weight, optimizer)
    saved = optimizer.state_dict()["state"][0]
    items = {name: item for name, item in saved.items() if isinstance(item, Tensor) and item.shape == SHAPE}
    assert items
    for name, item in items.items():
        assert same_bits(item[FROZEN], torch.full_like(item[FROZEN], STARTS.get(name, 0.0))), name
        assert bool((item[~FROZEN] != STARTS.get(name, 0.0)).any()), name


@pytest.mark.parametrize("name", ["sgd", "adam", "rmsprop", "adagrad"])
@either_mode
def test_an_unfrozen_run_that_loads_a_saved_state_moves_no_entry_without_a_gradient(name: str, compact: bool) -> None:
    weight, _, optimizer = _run(COUPLED[name], compact)
    _step(weight, optimizer)
    plain = partial(COUPLED[name], weight_decay=0)([weight])  # type: ignore[call-arg]
    state = optimizer.state_dict()
    state["param_groups"][0]["weight_decay"] = 0
    plain.load_state_dict(copy.deepcopy(state))
    weight.grad = torch.zeros(SHAPE)
    plain.step()
    assert same_bits(weight[FROZEN], torch.full((int(FROZEN.sum()),), 0.5))


@coupled
@either_mode
def test_the_state_is_the_same_whether_a_run_was_resumed_or_not(make: Any, compact: bool) -> None:
    weight, _, optimizer = _run(make, compact)
    _step(weight, optimizer)
    saved, numbers = copy.deepcopy(optimizer.state_dict()), weight.detach().clone()
    _step(weight, optimizer, 3, 4)
    for into in (False, True):
        again, _, resumed = _run(make, into)
        again.data.copy_(numbers)
        resumed.load_state_dict(copy.deepcopy(saved))
        _step(again, resumed, 3, 4)
        assert same_bits(again, weight)
        assert _same_state(resumed.state_dict(), optimizer.state_dict())


@coupled
@either_mode
@pytest.mark.parametrize("way", ["load", "load_then_guard", "load_then_remove"])
def test_loading_writes_to_nobodys_dict(make: Any, compact: bool, way: str) -> None:
    weight = nn.Parameter(torch.randn(SHAPE))
    plain = make([weight])
    _step(weight, plain)
    given = copy.deepcopy(plain.state_dict())
    before = copy.deepcopy(given)
    frozen = freeze_entries({"weight": weight}, {"weight": (FROZEN, 0.5)})
    optimizer = make([weight])
    if way == "load_then_guard":
        optimizer.load_state_dict(given)
    frozen.guard(optimizer, compact=compact)
    if way != "load_then_guard":
        optimizer.load_state_dict(given)
    if way == "load_then_remove":
        frozen.remove()
    optimizer.state_dict()
    assert _same_state(given, before)
    other = make([nn.Parameter(torch.randn(SHAPE))])
    other.load_state_dict(given)  # nothing of it was lost
    assert _same_state(other.state_dict(), before)


def test_loading_one_dict_twice_gives_the_same_state() -> None:
    """As torch's own test_state_dict_deterministic asks."""
    weight = nn.Parameter(torch.randn(SHAPE))
    plain = Adam([weight], weight_decay=0.1)
    _step(weight, plain)
    given = plain.state_dict()
    runs = []
    for _ in range(2):
        _, _, optimizer = _run(COUPLED["adam"], compact=False)
        optimizer.load_state_dict(copy.deepcopy(given))
        runs.append(optimizer.state_dict())
    assert _same_state(*runs)
