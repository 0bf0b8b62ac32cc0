"""Events that other files do not cover: schedulers, wrappers, faults, threads, third-party optimizers."""

from __future__ import annotations

import copy
import inspect
import io
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer, lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, update_bn

from freezehooks import FreezeError, FrozenEntries, MaskedOptimizer, StateMismatchError, freeze_entries
from freezehooks._rules.region import Index, Slice

from .claims import same_bits
from .devices import default, on_cpu
from .draws import randn
from .strategies import masks, near_indices


def _model() -> nn.Linear:
    torch.manual_seed(2)
    return nn.Linear(4, 3)


def _frozen_pair(spec: str = "weight[0] = 0.5") -> tuple[nn.Linear, MaskedOptimizer]:
    model = _model()
    return model, MaskedOptimizer(SGD(model.parameters(), lr=0.1, momentum=0.9), freeze_entries(model, spec))


def _backward(model: Callable[..., Any], seed: int = 0) -> Tensor:
    batch = randn(5, 4, seed=seed)
    loss = torch.sum(model(batch) ** 2)
    loss.backward()
    return loss


# --------------------------------------------------------------------------------------------------------------------
# Schedulers

_SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.StepLR(o, 1)], o),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.StepLR(o, 1)], [2]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2, cycle_momentum=True),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=9),
    "SWALR": lambda o: SWALR(o, swa_lr=0.05),
}


def test_every_scheduler_of_torch_is_here() -> None:
    found = {
        name
        for name, kind in vars(lr_scheduler).items()
        if inspect.isclass(kind) and issubclass(kind, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    assert found - {"LRScheduler"} <= set(_SCHEDULERS)


def _scheduler_cases() -> list[Any]:
    """Each scheduler by name; in torch 2.6 SequentialLR itself calls `step(0)`, which torch then warns of."""
    warned = "scheduler.step(0)" in inspect.getsource(lr_scheduler.SequentialLR.step)
    own = pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
    return [
        pytest.param(schedule, id=name, marks=[own] if warned and name == "SequentialLR" else [])
        for name, schedule in _SCHEDULERS.items()
    ]


@pytest.mark.parametrize("place", ["inner_before_freezing", "inner_after_wrapping", "wrapper"])
@pytest.mark.parametrize("schedule", _scheduler_cases())
def test_a_scheduler_moves_what_it_moves_without_the_wrapper_and_warns_of_nothing(
    schedule: Callable[[Optimizer], Any], place: str
) -> None:
    model, plain = _model(), _model()
    inner, reference = SGD(model.parameters(), lr=0.1, momentum=0.9), SGD(plain.parameters(), lr=0.1, momentum=0.9)
    early = schedule(inner) if place == "inner_before_freezing" else None
    optimizer = MaskedOptimizer(inner, freeze_entries(model, "weight[0] = 0.5"))
    scheduler = early or schedule(inner if place == "inner_after_wrapping" else optimizer)
    plain_scheduler = schedule(reference)
    for epoch in range(6):
        for each, its_model, its_scheduler in ((optimizer, model, scheduler), (reference, plain, plain_scheduler)):
            each.zero_grad()
            _backward(its_model, epoch)
            each.step()
            its_scheduler.step(*([1.0] if isinstance(its_scheduler, lr_scheduler.ReduceLROnPlateau) else []))
        assert model.weight[0].tolist() == [0.5] * 4
        for name in ("lr", "momentum"):
            assert optimizer.param_groups[0][name] == reference.param_groups[0][name]
        again = schedule(AdamW(_model().parameters())) if place == "wrapper" and "Cyc" not in str(schedule) else None
        if again is not None and not isinstance(again, lr_scheduler.CyclicLR | lr_scheduler.OneCycleLR):
            again.load_state_dict(scheduler.state_dict())


# --------------------------------------------------------------------------------------------------------------------
# Gradients and clipping


def test_clipping_by_norm_sees_the_free_entries_alone() -> None:
    model, optimizer = _frozen_pair()
    del optimizer
    _backward(model)
    free = torch.cat([p.grad[1:].flatten() if p.ndim > 1 else p.grad for p in model.parameters() if p.grad is not None])
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    torch.testing.assert_close(norm, free.norm())
    assert model.weight.grad is not None
    assert same_bits(model.weight.grad[0], torch.zeros(4))


def test_clipping_by_value_leaves_clean_gradients() -> None:
    model, _ = _frozen_pair()
    _backward(model)
    torch.nn.utils.clip_grad_value_(model.parameters(), 0.01)
    assert model.weight.grad is not None
    assert same_bits(model.weight.grad[0], torch.zeros(4))
    assert bool((model.weight.grad[1:].abs() <= 0.01).all())


def test_gradients_stay_clean_while_they_accumulate() -> None:
    model, optimizer = _frozen_pair()
    for seed in range(4):
        _backward(model, seed)
        assert model.weight.grad is not None
        assert same_bits(model.weight.grad[0], torch.zeros(4))
    optimizer.step()
    assert model.weight[0].tolist() == [0.5] * 4


def test_autograd_grad_returns_what_the_graph_says() -> None:
    """No hook sees these gradients, which are returned to the caller."""
    model, _ = _frozen_pair()
    (gradient,) = torch.autograd.grad(model(torch.ones(1, 4)).sum(), [model.weight])
    assert gradient.tolist() == [[1] * 4] * 3
    assert model.weight.grad is None


def test_anomaly_mode_finds_nothing_to_complain_of() -> None:
    model, optimizer = _frozen_pair()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Anomaly Detection has been enabled")
        with torch.autograd.detect_anomaly():
            _backward(model)
    optimizer.step()
    assert model.weight[0].tolist() == [0.5] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_computes_with_the_rounded_values_and_keeps_the_exact_ones(
    dtype: torch.dtype, device: torch.device
) -> None:
    model, optimizer = _frozen_pair("weight[0] = 0.1")
    with torch.autocast(device.type, dtype=dtype):
        output = model(torch.eye(4))
    expected = (torch.tensor(0.1).to(dtype) + model.bias[0].to(dtype)).float()
    torch.testing.assert_close(output[:, 0].float(), expected.expand(4), rtol=1e-2, atol=1e-3)
    output.float().sum().backward()
    optimizer.step()
    assert same_bits(model.weight[0], torch.full((4,), 0.1))


def test_requires_grad_off_and_on_again_in_mid_training() -> None:
    model, optimizer = _frozen_pair()
    for requires_grad in (True, False, True):
        model.weight.requires_grad_(requires_grad)
        optimizer.zero_grad()
        _backward(model)
        optimizer.step()
        assert model.weight[0].tolist() == [0.5] * 4
        assert model.weight.grad is None or same_bits(model.weight.grad[0], torch.zeros(4))


# --------------------------------------------------------------------------------------------------------------------
# Writes from outside


def _through_data(model: nn.Linear) -> None:
    model.weight.data[0] = 9


def _under_no_grad(model: nn.Linear) -> None:
    with torch.no_grad():
        model.weight.add_(9)


def _by_copy(model: nn.Linear) -> None:
    with torch.no_grad():
        model.weight.copy_(torch.full((3, 4), 9.0))


def _from_vector(model: nn.Linear) -> None:
    vector = torch.nn.utils.parameters_to_vector(model.parameters()) + 9
    torch.nn.utils.vector_to_parameters(vector.detach(), model.parameters())


def _by_new_storage(model: nn.Linear) -> None:
    model.weight.data = torch.full((3, 4), 9.0)


@pytest.mark.parametrize("write", [_through_data, _under_no_grad, _by_copy, _from_vector, _by_new_storage])
def test_a_stray_write_is_undone_by_forward_step_and_saving(write: Callable[[nn.Linear], None]) -> None:
    model, optimizer = _frozen_pair()

    def step() -> None:
        _backward(model)
        write(model)
        optimizer.step()

    ways: list[Callable[[], object]] = [lambda: model(torch.ones(1, 4)), step, model.state_dict]
    for undo in ways:
        write(model)
        assert model.weight[0, 0] != 0.5
        undo()
        assert model.weight[0].tolist() == [0.5] * 4


def test_batch_norm_statistics_are_updated_for_an_averaged_frozen_model() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    frozen = freeze_entries(model, "0[0] = 0.5\n1.weight = 2")
    optimizer = MaskedOptimizer(SGD(model.parameters(), lr=0.1), frozen)
    average = AveragedModel(model)
    for seed in range(3):
        _backward(model, seed)
        optimizer.step()
        average.update_parameters(model)
    update_bn([torch.randn(8, 4)], average)
    assert average.module.get_parameter("0.weight")[0].tolist() == [0.5] * 4
    assert average.module.get_parameter("1.weight").tolist() == [2] * 3


def test_compiling_before_freezing_holds_through_gradient_and_step() -> None:
    """A compiled module does not see later forward hooks: a stray write shows in its forward, and nothing else does."""
    torch.compiler.reset()
    model = _model()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(torch.ones(1, 4))
    frozen = freeze_entries(model, "weight[0] = 0.5")
    optimizer = MaskedOptimizer(AdamW(model.parameters(), lr=0.1, weight_decay=0.1), frozen)
    for seed in range(3):
        optimizer.zero_grad()
        _backward(compiled, seed)
        assert model.weight.grad is not None
        assert same_bits(model.weight.grad[0], torch.zeros(4))
        optimizer.step()
        frozen.assert_frozen()


def test_a_compiled_module_takes_rules_by_the_names_it_shows() -> None:
    compiled: Any = torch.compile(_model(), backend="aot_eager")
    frozen = freeze_entries(compiled, "_orig_mod.weight[0] = 0.5")
    compiled(torch.ones(1, 4))
    frozen.assert_frozen(guarded=False)


# --------------------------------------------------------------------------------------------------------------------
# Threads


def test_threads_with_models_of_their_own_do_not_disturb_one_another(device: torch.device) -> None:
    results: dict[int, Tensor] = {}

    def train(n: int) -> None:
        with default(device):
            model = nn.Linear(4, 3)
            frozen = freeze_entries(model, f"weight[:2] = {n}")
            optimizer = MaskedOptimizer(AdamW(model.parameters(), lr=0.1), frozen)
            for seed in range(20):
                optimizer.zero_grad()
                _backward(model, seed)
                optimizer.step()
                frozen.assert_frozen()
        results[n] = model.weight.detach()

    threads = [threading.Thread(target=train, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert {n: weight[0, 0].item() for n, weight in results.items()} == {n: float(n) for n in range(4)}


# --------------------------------------------------------------------------------------------------------------------
# Third-party wrappers


class Lookahead(Optimizer):
    """Slow weights that follow the fast ones every k steps, as timm's optimizer of this name has them."""

    def __init__(self, base: Optimizer, k: int = 2, alpha: float = 0.5) -> None:
        super().__init__([{"params": group["params"]} for group in base.param_groups], {})
        self.base, self.k, self.alpha, self.steps = base, k, alpha, 0
        self.param_groups = base.param_groups

    def step(self, closure: Any = None) -> Any:
        """Step the base optimizer; every k-th time, pull the weights half-way back."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("slow_buffer", parameter.detach().clone())
        loss = self.base.step(closure)
        self.steps += 1
        if self.steps % self.k == 0:
            for parameter, state in self.state.items():
                state["slow_buffer"].add_(parameter.data - state["slow_buffer"], alpha=self.alpha)
                parameter.data.copy_(state["slow_buffer"])
        return loss


@pytest.mark.parametrize("outside", [True, False], ids=["lookahead_outside", "lookahead_inside"])
def test_lookahead_holds_around_and_inside(outside: bool) -> None:
    model = _model()
    base = AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    lookahead: Optimizer
    if outside:
        frozen = freeze_entries(model, "weight[0] = 0.3")
        optimizer: Optimizer = Lookahead(MaskedOptimizer(base, frozen))
        frozen.guard(optimizer)
        lookahead = optimizer
    else:
        lookahead = Lookahead(base)
        _backward(model)
        lookahead.step()
        slow = lookahead.state[model.weight]["slow_buffer"].clone()
        frozen = freeze_entries(model, "weight[0] = 0.3")
        optimizer = MaskedOptimizer(lookahead, frozen)
        assert same_bits(lookahead.state[model.weight]["slow_buffer"], slow)  # its own business, and no class of torch
    for seed in range(5):
        optimizer.zero_grad()
        _backward(model, seed)
        optimizer.step()
        frozen.assert_frozen()


class SharpnessAware(Optimizer):
    """Two steps, up to the worst point nearby and down from there, as in SAM."""

    def __init__(self, base: Optimizer) -> None:
        super().__init__([{"params": group["params"]} for group in base.param_groups], {})
        self.base_optimizer = base
        self.param_groups = base.param_groups

    def first_step(self) -> None:
        """Climb along the gradient."""
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["climb"] = parameter.grad * 0.05
            parameter.data.add_(self.state[parameter]["climb"])

    def second_step(self) -> None:
        """Return and step the optimizer inside, bypassing the hooks of this one."""
        for parameter in self.param_groups[0]["params"]:
            parameter.data.sub_(self.state[parameter]["climb"])
        self.base_optimizer.step()


def test_the_two_steps_of_sharpness_aware_minimization_hold() -> None:
    model = _model()
    frozen = freeze_entries(model, "weight[0] = 0.3")
    optimizer: Any = MaskedOptimizer(SharpnessAware(AdamW(model.parameters(), lr=0.1, weight_decay=0.1)), frozen)
    for seed in range(3):
        for step in (optimizer.first_step, optimizer.second_step):
            optimizer.zero_grad()
            _backward(model, seed)
            step()
            frozen.assert_frozen()
    frozen.remove()
    _backward(model)
    optimizer.second_step()
    assert frozen.violations()


def test_groups_with_options_of_their_own_hold() -> None:
    model = _model()
    frozen = freeze_entries(model, "weight[0] = 0.3\nbias[1] = 2")
    groups = [{"params": [model.weight], "lr": 0.1, "weight_decay": 0.5}, {"params": [model.bias], "momentum": 0.9}]
    optimizer = MaskedOptimizer(SGD(groups, lr=0.01), frozen)
    bias = model.bias.detach().clone()
    for seed in range(3):
        optimizer.zero_grad()
        _backward(model, seed)
        optimizer.step()
        frozen.assert_frozen()
    assert (model.bias != bias).tolist() == [True, False, True]
    assert model.bias[1] == 2


@on_cpu("Accelerate chooses the device")
def test_accelerate_prepares_accumulates_and_restores(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    model = _model()
    frozen = freeze_entries(model, "weight[0] = 0.5\nweight[1, 2]")
    kept = model.weight[1, 2].item()
    inner = AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    prepared, optimizer = accelerator.prepare(model, MaskedOptimizer(inner, frozen))
    for seed in range(8):
        with accelerator.accumulate(prepared):
            accelerator.backward(torch.sum(prepared(torch.full((2, 4), seed / 8)) ** 2))
            optimizer.step()
            optimizer.zero_grad()
            frozen.assert_frozen()
    assert inner.state[model.weight]["step"] == 2
    accelerator.save_state(str(tmp_path))
    trained = model.weight.detach().clone()
    prepared(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    accelerator.load_state(str(tmp_path))
    assert same_bits(model.weight, trained)
    assert inner.state[model.weight]["step"] == 2
    assert model.weight[0].tolist() == [0.5] * 4
    assert model.weight[1, 2].item() == kept


# --------------------------------------------------------------------------------------------------------------------
# A slow reference in numpy


@st.composite
def _specs(draw: st.DrawFn) -> tuple[tuple[int, int], list[tuple[Index | Tensor, float | None]]]:
    """A shape, and rules for it: an index or a mask, and a number or None for `keep`."""
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    rule = st.tuples(near_indices(shape) | masks(shape), st.sampled_from([0.0, 1.0, None]))
    return shape, draw(st.lists(rule, min_size=1, max_size=3))


@settings(max_examples=200, deadline=None)
@given(_specs())
def test_specs_agree_with_a_slow_reference(
    drawn: tuple[tuple[int, int], list[tuple[Index | Tensor, float | None]]],
) -> None:
    """What is frozen, what is held and what is rejected, computed in numpy entry by entry."""
    shape, rules = drawn
    model = nn.Linear(shape[1], shape[0])
    start = model.weight.detach().cpu().numpy().copy()
    expected = _expected_in_numpy(start, rules)
    spec = [{"weight": (region, "keep" if value is None else value)} for region, value in rules]
    try:
        frozen = freeze_entries(model, spec)
    except FreezeError:
        assert expected is None
        assert (model.weight.detach().cpu().numpy() == start).all()
        return
    assert expected is not None
    optimizer = MaskedOptimizer(SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1), frozen)
    for _ in range(2):
        model(torch.randn(5, shape[1])).square().sum().backward()
        optimizer.step()
    found = model.weight.detach().cpu().numpy()
    for position, number in expected.items():
        assert found[position] == np.float32(number)
    assert frozen["weight"].frozen_count == len(expected)
    moved = {tuple(map(int, position)) for position in zip(*np.nonzero(found != start), strict=True)}
    assert moved >= set(np.ndindex(shape)) - set(expected)


def _expected_in_numpy(
    start: Any, rules: list[tuple[Index | Tensor, float | None]]
) -> dict[tuple[int, ...], float] | None:
    """Return the value of each frozen entry, or None if the rules must be rejected."""
    expected: dict[tuple[int, ...], float] = {}
    for region, value in rules:
        positions = _positions_in_numpy(region, start.shape)
        if not positions:
            return None  # out of range, or nothing selected
        for position in positions:
            number = float(start[position]) if value is None else value
            if expected.setdefault(position, number) != number:
                return None  # two rules disagree
    return expected


def _positions_in_numpy(region: Index | Tensor, shape: tuple[int, ...]) -> set[tuple[int, ...]]:
    """Return the positions that numpy selects, or none if it raises."""
    key = region.cpu().numpy() if isinstance(region, Tensor) else tuple(map(_as_numpy, region.items))
    try:
        selected = np.atleast_1d(np.arange(np.prod(shape)).reshape(shape)[key]).flatten()
    except (IndexError, DeprecationWarning):  # numpy 1 warns of a list out of range where nothing is selected
        return set()
    return {tuple(map(int, np.unravel_index(n, shape))) for n in selected}


def _as_numpy(item: Any) -> Any:
    if item is ... or isinstance(item, int):
        return item
    return slice(item.start, item.stop, item.step) if isinstance(item, Slice) else np.array(item, dtype=int)


# --------------------------------------------------------------------------------------------------------------------
# Faults

_TRAIN = """
import os, sys, torch
sys.path.insert(0, {root!r})
from freezehooks import MaskedOptimizer, freeze_entries
path, die_at = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
inner = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
start, state = 0, None
if os.path.exists(path):
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    inner.load_state_dict(saved["optimizer"])
    start, state = saved["step"], saved["frozen"]
frozen = freeze_entries(model, "0[smallest(0.5)] = 0\\n2[0, ::2]", state=state)
optimizer = MaskedOptimizer(inner, frozen)
for step in range(start, 12):
    if step == die_at:
        os.kill(os.getpid(), 9)
    optimizer.zero_grad()
    model(torch.randn(6, 4, generator=torch.Generator().manual_seed(step))).square().sum().backward()
    optimizer.step()
    frozen.assert_frozen()
    if step % 3 == 2:
        torch.save({{"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                    "frozen": frozen.state_dict(), "step": step + 1}}, path + ".new")
        os.replace(path + ".new", path)
torch.save(model.state_dict(), path + ".end")
"""


@on_cpu("processes of its own")
def test_a_run_that_is_killed_and_resumed_ends_bit_equal_to_one_that_never_was(tmp_path: Path) -> None:
    script = _TRAIN.format(root=str(Path(__file__).parents[1]))
    die_at = int(np.random.default_rng(3).integers(4, 11))

    def run(name: str, die: int) -> int:
        command = [sys.executable, "-c", script, str(tmp_path / name), str(die)]
        return subprocess.run(command, capture_output=True, timeout=120).returncode

    assert run("whole", -1) == 0
    assert run("killed", die_at) == -9
    assert run("killed", -1) == 0
    whole, killed = (torch.load(tmp_path / f"{name}.end", weights_only=True) for name in ("whole", "killed"))
    assert all(same_bits(whole[name], killed[name]) for name in whole)


@pytest.mark.parametrize("cut", [0.3, 0.9], ids=["early", "late"])
def test_a_checkpoint_cut_short_leaves_the_model_as_it_was(cut: float, tmp_path: Path) -> None:
    model, _ = _frozen_pair()
    (frozen,) = FrozenEntries.of(model)
    stream = io.BytesIO()
    torch.save(frozen.state_dict(), stream)
    (tmp_path / "cut.pt").write_bytes(stream.getvalue()[: int(len(stream.getvalue()) * cut)])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(Exception, match=r"zip|central directory|corrupt|PytorchStreamReader"):
        frozen.load_state_dict(torch.load(tmp_path / "cut.pt", weights_only=True))
    assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())


def test_a_checkpoint_with_another_models_rules_is_refused_by_name() -> None:
    model, _ = _frozen_pair()
    (frozen,) = FrozenEntries.of(model)
    other = freeze_entries(nn.Linear(4, 5), "weight[0] = 0.5")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StateMismatchError, match=r"on shape \(5, 4\), the present rules say .* on shape \(3, 4\)"):
        frozen.load_state_dict(other.state_dict())
    assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())
