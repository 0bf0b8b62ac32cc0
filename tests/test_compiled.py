"""A compiled module computes with the values, after any write, on every release of torch that is supported."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.checkpoint import checkpoint

from freezehooks import FrozenEntries, MaskedOptimizer, freeze_entries
from freezehooks._torch import is_exporting

from .claims import same_bits

SPECS = {
    "box": "weight[0] = 1",
    "sparse": "weight[0, 0] = 1\nweight[2, 3] = 3",
    "dense": "weight[smallest(0.5)] = 0",
    "value": "weight[smallest(0.5)] = 2",
    "keep": "weight[1]",
    "tied": "weight = tied(0, start=first)",
}

BACKENDS = ["eager", "aot_eager"]


@pytest.fixture(autouse=True)
def _compile_anew() -> None:
    torch.compiler.reset()


def _frozen(spec: str = "box") -> tuple[nn.Linear, FrozenEntries]:
    model = nn.Linear(4, 4)
    return model, freeze_entries(model, SPECS[spec])


def _spoil(model: nn.Linear) -> None:
    """Write in a way that no version counter sees."""
    model.weight.data[...] = torch.arange(16.0).view(4, 4)


def _inputs(rows: int = 2) -> Tensor:
    return torch.ones(rows, 4, requires_grad=True)


def _gradient(model: nn.Linear, output: Tensor) -> Tensor:
    model.zero_grad()
    output.square().sum().backward()
    assert model.weight.grad is not None
    return model.weight.grad.clone()


def _check(forward: Callable[[Tensor], Tensor], model: nn.Linear, frozen: FrozenEntries, rows: int = 2) -> None:
    """A compiled forward after a stray write computes, and leads back, what the eager one does with the values."""
    _spoil(model)
    output = forward(_inputs(rows))
    frozen.assert_frozen(guarded=False)
    expected = nn.functional.linear(_inputs(rows), model.weight, model.bias)
    torch.testing.assert_close(output, expected)
    gradient = _gradient(model, output)
    torch.testing.assert_close(gradient, _gradient(model, model(_inputs(rows))))


# Values


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spec", SPECS)
def test_a_compiled_forward_computes_with_the_values(spec: str, backend: str) -> None:
    model, frozen = _frozen(spec)
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(2):
        _check(compiled, model, frozen)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_a_forward_compiled_to_machine_code_computes_with_the_values() -> None:
    model, frozen = _frozen("value")
    compiled: Any = torch.compile(model, fullgraph=True)
    for _ in range(2):
        _check(compiled, model, frozen)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_module_that_compiles_itself_computes_with_the_values(backend: str) -> None:
    model, frozen = _frozen()
    model.compile(backend=backend, fullgraph=True)
    _spoil(model)
    output = model(_inputs())
    frozen.assert_frozen(guarded=False)
    assert torch.equal(output, nn.functional.linear(_inputs(), model.weight, model.bias))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_module_inside_a_compiled_function_computes_with_the_values(backend: str) -> None:
    model, frozen = _frozen()

    def called(inputs: Tensor) -> Tensor:
        return torch.mul(model(inputs), 1)

    compiled: Any = torch.compile(called, backend=backend, fullgraph=True)
    _check(compiled, model, frozen)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_compiled_layer_of_an_eager_model_computes_with_the_values(backend: str) -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    frozen = freeze_entries(model, "*.weight[0] = 1")
    compiled: Any = nn.Sequential(cast("nn.Module", torch.compile(model[0], backend=backend, fullgraph=True)), model[1])
    for layer in model:
        _spoil(layer)
    output = compiled(_inputs())
    frozen.assert_frozen(guarded=False)
    assert torch.equal(output, model(_inputs()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_calls_no_module_computes_with_the_values(backend: str) -> None:
    """MultiheadAttention uses its output projection without calling it."""
    model = nn.MultiheadAttention(4, 2)
    frozen = freeze_entries(model, "out_proj.weight[0] = 1")
    compiled: Any = torch.compile(model, backend=backend)
    x = torch.ones(3, 4)
    compiled(x, x, x)
    _spoil(model.out_proj)
    output, _ = compiled(x, x, x)
    frozen.assert_frozen(guarded=False)
    torch.testing.assert_close(output, model(x, x, x)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_hooks_of_the_module_are_called_in_their_order(backend: str) -> None:
    """torch.compile of torch 2.7 to 2.12 mixes up hooks after `prepend` has moved one."""
    model = nn.Linear(4, 4)

    def first(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0] + 1,)

    def second(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0] * 3,)

    model.register_forward_pre_hook(first)
    model.register_forward_pre_hook(second)
    frozen = freeze_entries(model, "weight[0] = 1\nbias = 2")
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    _spoil(model)
    output = compiled(torch.ones(1, 4))
    frozen.assert_frozen(guarded=False)
    assert torch.equal(output, nn.functional.linear(torch.full((1, 4), 6.0), model.weight, model.bias))


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_handles_compile_to_one_forward(backend: str) -> None:
    model, frozen = _frozen()
    other = freeze_entries(model, "weight[2] = 5")
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    _check(compiled, model, frozen)
    other.assert_frozen(guarded=False)


# Modes


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_a_compiled_forward_without_gradients_computes_with_the_values(mode: Any, backend: str) -> None:
    model, frozen = _frozen("value")
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    with mode():
        _spoil(model)
        output = compiled(torch.ones(2, 4))
        frozen.assert_frozen(guarded=False)
        assert torch.equal(output, model(torch.ones(2, 4)))
    _check(compiled, model, frozen)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_forward_of_weights_that_do_not_train_computes_with_the_values(backend: str) -> None:
    model, frozen = _frozen()
    model.requires_grad_(False)
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    _spoil(model)
    output = compiled(torch.ones(2, 4))
    frozen.assert_frozen(guarded=False)
    assert torch.equal(output, model(torch.ones(2, 4)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_of_many_shapes_compute_with_the_values(backend: str) -> None:
    model, frozen = _frozen("value")
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for rows in (2, 3, 5, 7):
        _check(compiled, model, frozen, rows)


# Several forwards in one backward


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("again", ["call", "checkpoint"])
def test_a_module_called_twice_in_one_graph_leads_back(again: str, backend: str) -> None:
    model, frozen = _frozen()

    def twice(x: Tensor) -> Tensor:
        def run(y: Tensor) -> Tensor:
            return model(model(y).relu())  # type: ignore[no-any-return]

        return checkpoint(run, x, use_reentrant=False) if again == "checkpoint" else run(x)  # type: ignore[no-any-return]

    _spoil(model)
    compiled: Any = torch.compile(twice, backend=backend, fullgraph=True)
    output = compiled(_inputs())
    frozen.assert_frozen(guarded=False)
    torch.testing.assert_close(output, twice(_inputs()))
    torch.testing.assert_close(_gradient(model, output), _gradient(model, twice(_inputs())))


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_compiled_forwards_lead_back_together(backend: str) -> None:
    model, _ = _frozen()
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    first, second = compiled(_inputs()), compiled(2 * _inputs())
    with torch.no_grad():
        compiled(_inputs())
    gradient = _gradient(model, first + second)
    torch.testing.assert_close(gradient, _gradient(model, model(_inputs()) + model(2 * _inputs())))


def test_a_compiled_forward_after_an_eager_one_is_refused_by_a_backward_through_both() -> None:
    """The compiler counts its write to the weight, which the eager graph remembers. torch says so; nothing is lost."""
    model, frozen = _frozen()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    output = model(_inputs()) + compiled(_inputs())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
    _check(compiled, model, frozen)


# Around the forward


def test_a_compiled_model_and_a_compiled_step_train_as_eager_ones_do() -> None:
    def trained(wrap: Callable[[Any], Any]) -> nn.Linear:
        torch.manual_seed(0)
        model, frozen = _frozen("value")
        optimizer = MaskedOptimizer(AdamW(model.parameters(), lr=0.1, weight_decay=0.1), frozen)
        forward, step = wrap(model), wrap(optimizer.step)
        for n in range(3):
            optimizer.zero_grad()
            forward(torch.full((2, 4), n + 1.0)).square().sum().backward()
            step()
            frozen.assert_frozen()
        return model

    torch.testing.assert_close(
        trained(lambda what: torch.compile(what, backend="aot_eager")).weight, trained(lambda what: what).weight
    )


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own, inside compiled autograd
def test_gradients_are_clean_under_compiled_autograd() -> None:
    model, frozen = _frozen()

    def train(x: Tensor) -> None:
        model(x).square().sum().backward()

    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(train, backend="aot_eager")(_inputs())
    assert model.weight.grad is not None
    assert same_bits(model.weight.grad[0], torch.zeros(4))
    assert bool(model.weight.grad[1:].any())
    frozen.assert_frozen(guarded=False)


# Exporting


def test_compiling_is_not_taken_for_exporting() -> None:
    seen = torch.compile(lambda x: x + is_exporting(), backend="eager", fullgraph=True)
    assert seen(torch.zeros(1)).tolist() == [0]
