"""Many small parameters in compact mode: they are copied together, and nobody can tell from the results."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from freezehooks import MaskedOptimizer, UnsupportedParameterError, freeze_entries

from .claims import same_bits
from .devices import on_cpu
from .draws import rand, randn
from .operations import Ops
from .test_compact import MAKERS, Maker

LAYERS: Final = 7


class _Net(nn.Module):
    """Small matrices, and a bias of which nothing is held."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers: Any = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(LAYERS))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x + self.bias


class _Run:
    """A model that has scattered frozen entries in every matrix, and its optimizer."""

    def __init__(self, make: Maker = MAKERS["adamw"], *, compact: bool = True, width: int = 6) -> None:
        self.model = _Net(width)
        masks = {f"layers.{n}.weight": (rand(width, width, seed=n) < 0.4, 0.5) for n in range(LAYERS)}
        self.frozen = freeze_entries(self.model, masks)
        self.optimizer = MaskedOptimizer(make(list(self.model.parameters())), self.frozen, compact=compact)

    @property
    def second(self) -> nn.Parameter:
        return self.model.get_parameter("layers.1.weight")

    @property
    def state(self) -> dict[str, Any]:
        """The optimizer's state of the second matrix."""
        state: dict[str, Any] = self.optimizer.inner.state[self.second]
        return state

    def backward(self, seed: int, *, without: Iterable[int] = ()) -> Tensor:
        loss: Tensor = self.model(randn(4, len(self.model.bias), seed=seed)).square().sum()
        loss.backward()
        for n in without:
            self.model.get_parameter(f"layers.{n}.weight").grad = None
        return loss

    def train(self, *seeds: int, without: Iterable[int] = ()) -> None:
        for seed in seeds:
            self.optimizer.zero_grad()
            self.backward(seed, without=without)
            self.optimizer.step()


def _load_own_state(run: _Run) -> None:
    run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))


def _train_without_another_each_time(run: _Run) -> None:
    for n in range(3):
        run.train(20 + n, without=[n])


@torch.inference_mode()
def _thaw_and_step_in_inference_mode(run: _Run) -> None:
    run.frozen.thaw("layers.1.weight[:3]")
    run.optimizer.step()


def _take_one_out_for_a_step(run: _Run) -> None:
    group = run.optimizer.param_groups[0]
    group["params"] = [parameter for parameter in group["params"] if parameter is not run.second]
    run.train(20)
    run.optimizer.add_param_group({"params": [run.second]})


def _add_group(run: _Run) -> None:
    run.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "lr": 1.0})


def _keep_moment(run: _Run) -> None:
    kept = run.state["exp_avg"]
    run.train(20, without=[2])
    kept.zero_()


def _replace_moment(run: _Run) -> None:
    run.state["exp_avg"] = run.state["exp_avg"] * 2


CHANGES: Final[dict[str, Callable[[_Run], object]]] = {
    "nothing": lambda run: None,
    "steps without a gradient for one": lambda run: run.train(20, 21, without=[1]),
    "steps without a gradient for another each time": _train_without_another_each_time,
    "a step without any gradient": lambda run: run.train(20, without=range(LAYERS)),
    "one thawed": lambda run: run.frozen.thaw("layers.1.weight"),
    "some entries thawed": lambda run: run.frozen.thaw("layers.1.weight[:3]"),
    "more frozen": lambda run: freeze_entries(run.model, "bias[1] = 0").guard(run.optimizer.inner),
    "loaded": _load_own_state,
    "a weight written": lambda run: run.second.data.mul_(2),
    "a weight moved": lambda run: setattr(run.second, "data", run.second.data.clone()),
    "a weight laid out anew": lambda run: setattr(run.second, "data", run.second.data.t().contiguous().t()),
    "another learning rate": lambda run: run.optimizer.param_groups[0].update(lr=0.02),
    "a group added": _add_group,
    "one taken out of its group for a step": _take_one_out_for_a_step,
    "removed": lambda run: run.frozen.remove(),
}
CHANGES_OF_ADAM: Final[dict[str, Callable[[_Run], object]]] = {
    "a moment at 0": lambda run: run.state["exp_avg"].zero_(),
    "a moment at 0 that was looked up before a step": _keep_moment,
    "a moment in other memory": lambda run: setattr(run.state["exp_avg"], "data", run.state["exp_avg"] * 2),
    "a moment replaced": _replace_moment,
    "its count of steps set": lambda run: run.state["step"].fill_(40),
    "its count of steps set past autograd": lambda run: run.state["step"].data.fill_(40),
    "every count of steps moved": lambda run: [each["step"].add_(5) for each in run.optimizer.state.values()],
    "some entries thawed, and a step, in inference mode": _thaw_and_step_in_inference_mode,
    "its state dropped": lambda run: run.optimizer.inner.state.pop(run.second),
}


def _assert_as_whole(make: Maker, change: Callable[[_Run], object]) -> None:
    runs = [_Run(make, compact=compact) for compact in (False, True)]
    for run in runs:
        run.train(0, 1, 2)
        change(run)
        run.train(3, 4, 5)
    whole, compact = (run.model.parameters() for run in runs)
    assert all(same_bits(a, b) for a, b in zip(whole, compact, strict=True))


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "adamw_fused"])  # rounds the ends of tensors apart
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_they_train_as_with_whole_state(name: str, change: Callable[[_Run], object]) -> None:
    _assert_as_whole(MAKERS[name], change)


@pytest.mark.parametrize("change", CHANGES_OF_ADAM.values(), ids=CHANGES_OF_ADAM)
def test_their_state_may_change_between_steps(change: Callable[[_Run], object]) -> None:
    _assert_as_whole(MAKERS["adamw"], change)


def _in_columns(run: _Run) -> None:
    for layer in run.model.layers:
        layer.weight.data = layer.weight.data.t().contiguous().t()


def _with_strides(run: _Run) -> None:
    for layer in run.model.layers:
        layer.weight.data = layer.weight.data.repeat_interleave(2, dim=1)[:, ::2]


LAYOUTS: Final = {"in columns": _in_columns, "with strides": _with_strides}


@pytest.mark.parametrize("lay_out", LAYOUTS.values(), ids=LAYOUTS)
def test_weights_may_lie_in_memory_in_any_order(lay_out: Callable[[_Run], None]) -> None:
    _assert_as_whole(MAKERS["adamw"], lay_out)


def test_gradients_may_lie_in_memory_otherwise_than_weights_and_be_part_of_a_graph() -> None:
    runs = [_Run(compact=compact) for compact in (False, True)]
    for run in runs:
        for seed in range(3):
            run.backward(seed)
            for layer in run.model.layers:
                layer.weight.grad = layer.weight.grad.t().contiguous().t() * run.model.bias.detach().requires_grad_()
            run.optimizer.step()
            run.optimizer.zero_grad()
    whole, compact = (run.model.parameters() for run in runs)
    assert all(same_bits(a, b) for a, b in zip(whole, compact, strict=True))


@pytest.mark.parametrize(
    "region", ["[:, 1] = 0.5", "[:, 1 | 3] = 0.5", "[1:5, 1:5] = 0.5", "[diagonal] = 0.5", " = 0.5"]
)
def test_what_is_held_may_be_a_slice_or_all(region: str) -> None:
    results = []
    for compact in (False, True):
        model = _Net()
        frozen = freeze_entries(model, f"layers.*.weight{region}")
        optimizer = MaskedOptimizer(AdamW(model.parameters(), lr=0.05), frozen, compact=compact)
        for seed in range(3):
            optimizer.zero_grad()
            model(randn(4, 6, seed=seed)).square().sum().backward()
            optimizer.step()
        results.append(list(model.parameters()))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("is_counted", [True, False])
def test_a_stray_write_before_the_step_is_put_right(is_counted: bool) -> None:
    run = _Run()
    run.train(0, 1)
    held = run.second.detach().clone()
    run.backward(2)
    with torch.no_grad():
        (run.second if is_counted else run.second.data).add_(1)
    run.optimizer.step()
    mask = run.frozen["layers.1.weight"].frozen
    if not is_counted:
        assert not torch.equal(run.second[mask], held[mask])  # as documented, the next forward does it
        run.backward(3)
    assert same_bits(run.second[mask], held[mask])
    others = [run.model.get_parameter(f"layers.{n}.weight") for n in range(LAYERS) if n != 1]
    assert all(float(each.detach().abs().max()) < 2 for each in others)


@on_cpu("compiles for the CPU")
def test_steps_may_be_compiled_between_others() -> None:
    runs = [_Run(compact=compact) for compact in (False, True)]
    for run in runs:
        run.train(0, 1)
        compiled = torch.compile(run.optimizer.step, backend="aot_eager")
        for seed in (2, 3):
            run.optimizer.zero_grad()
            run.backward(seed)
            compiled()
        run.train(4, 5)
    whole, compact = (run.model.parameters() for run in runs)
    assert all(same_bits(a, b) for a, b in zip(whole, compact, strict=True))


def test_the_guard_counts_what_it_keeps_for_them() -> None:
    run = _Run()
    guard = run.frozen.guard(run.optimizer.inner, compact=True)
    run.train(0, 1)
    free = sum(run.frozen[f"layers.{n}.weight"].free_count for n in range(LAYERS))
    assert guard.nbytes == free * (4 + 4 + 8 + 8)  # flat, its gradient, positions in each and in all


@on_cpu("counts the CPU's kernels")
@pytest.mark.parametrize(("width", "copies"), [(6, 1), (130, LAYERS)], ids=["small", "large"])
def test_small_ones_are_copied_together(width: int, copies: int) -> None:
    run = _Run(width=width)
    run.train(0)
    run.backward(1)
    with Ops() as ops:
        run.optimizer.step()
    assert (ops.counts["index_select"], ops.counts["scatter_"]) == (2 * copies, copies)


@pytest.mark.parametrize("width", [6, 130], ids=["small", "large"])
def test_a_refused_step_leaves_no_trace(width: int) -> None:
    runs = [_Run(width=width) for _ in range(2)]
    for run, is_refused in zip(runs, (False, True), strict=True):
        run.train(0, 1)
        if is_refused:
            run.backward(2, without=[3])
            run.second.grad = torch.as_tensor(run.second.grad).to_sparse()
            with pytest.raises(UnsupportedParameterError, match="sparse_coo"):
                run.optimizer.step()
        run.train(3, 4)
    usual, refused = (run.model.parameters() for run in runs)
    assert all(same_bits(a, b) for a, b in zip(usual, refused, strict=True))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_steps_may_be_taken_in_inference_mode(name: str) -> None:
    runs = [_Run(MAKERS[name], compact=compact) for compact in (False, True)]
    for run in runs:
        for seed, without in enumerate([(), (), (1,), ()]):
            run.optimizer.zero_grad()
            run.backward(seed, without=without)
            with torch.inference_mode():
                run.optimizer.step()
    whole, compact = (run.model.parameters() for run in runs)
    assert all(same_bits(a, b) for a, b in zip(whole, compact, strict=True))


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="a gradient has the parameter's dtype before torch 2.10")
def test_gradients_of_another_dtype_may_come_and_go() -> None:
    runs = [_Run(lambda params: SGD(params, lr=0.05), compact=compact) for compact in (False, True)]
    for run in runs:
        weight: Any = run.second
        weight.grad_dtype = None
        for seed, dtype in enumerate([torch.bfloat16, torch.float32, torch.bfloat16]):
            run.optimizer.zero_grad()
            run.backward(seed)
            weight.grad = weight.grad.to(dtype)
            run.optimizer.step()
    whole, compact = (run.model.parameters() for run in runs)
    assert all(same_bits(a, b) for a, b in zip(whole, compact, strict=True))


def test_memory_stays_as_it_is_when_gradients_stop_one_by_one() -> None:
    run = _Run()
    guard = run.frozen.guard(run.optimizer.inner, compact=True)
    run.train(0)
    before = guard.nbytes, _state_bytes(run)
    for n in range(LAYERS):
        run.train(1 + n, without=range(n))
    assert (guard.nbytes, _state_bytes(run)) == before


def _state_bytes(run: _Run) -> int:
    items = (item for state in run.optimizer.state.values() for item in state.values())
    return sum({item.untyped_storage().data_ptr(): item.untyped_storage().nbytes() for item in items}.values())


class _Asking(AdamW):
    """Looks at its groups before the closure, as every AdamW does where there is a GPU."""

    def _accelerator_graph_capture_health_check(self) -> None:
        assert all(group["params"] for group in self.param_groups)

    _cuda_graph_capture_health_check = _accelerator_graph_capture_health_check


def test_a_closure_may_write_to_weights_and_leave_some_without_a_gradient() -> None:
    def closure(run: _Run, seed: int, without: tuple[int, ...]) -> Tensor:
        run.second.data.mul_(1.01)
        run.model.get_parameter("layers.4.weight").data.mul_(1.01)
        return run.backward(seed, without=without)

    runs = [_Run(lambda params: _Asking(params, lr=0.05), compact=compact) for compact in (False, True)]
    for run in runs:
        for seed, without in enumerate([(), (), (1, 2), (3,), ()]):
            run.model.load_state_dict({name: 1.1 * weight for name, weight in run.model.state_dict().items()})
            run.second.grad = None
            run.optimizer.step(partial(closure, run, seed, without))
    whole, compact = (run.model.parameters() for run in runs)
    assert all(same_bits(a, b) for a, b in zip(whole, compact, strict=True))


def test_each_has_a_state_of_its_own_to_look_at_and_to_save() -> None:
    runs = [_Run(compact=compact) for compact in (False, True)]
    for run in runs:
        run.train(0, 1, 2)
    whole, compact = (run.optimizer.state_dict()["state"] for run in runs)
    for ours, theirs in zip(compact.values(), whole.values(), strict=True):
        assert list(ours) == list(theirs)
        assert all(same_bits(ours[name], theirs[name]) for name in ours)
    sizes = [_saved_bytes(each) for each in (compact, whole)]
    assert sizes[0] <= sizes[1]
    state = runs[1].state
    assert state["exp_avg"].shape == (runs[1].frozen["layers.1.weight"].free_count,)
    state["step"].add_(1)
    others = [each["step"] for parameter, each in runs[1].optimizer.state.items() if parameter is not runs[1].second]
    assert {float(step) for step in others} == {3.0}


def _saved_bytes(state: Any) -> int:
    file = io.BytesIO()
    torch.save(state, file)
    return file.tell()


def test_a_copied_optimizer_steps_nothing_of_the_original() -> None:
    run = _Run()
    run.train(0, 1)
    copied = copy.deepcopy(run.optimizer)
    before = [parameter.detach().clone() for parameter in run.model.parameters()]
    copied.step()
    assert all(same_bits(now, then) for now, then in zip(run.model.parameters(), before, strict=True))
