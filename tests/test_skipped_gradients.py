"""`skip_gradients=True`: frozen rows of a Linear get no gradient computed, and nothing else changes.

Numbers are small integers, so that products and sums are exact in any order and gradients may be compared to the bit.
"""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

import freezehooks._hooks.skipped as skipped
from freezehooks import FrozenEntries, MaskedOptimizer, UnsupportedParameterError, freeze_entries, train_only
from freezehooks._held.parameter import FrozenParameter

from .claims import held_twice, same_bits
from .draws import randint, randn
from .parallel import computes_in_shards
from .ranks import on_ranks

INPUTS, OUTPUTS = 4, 8


def whole_numbers(*shape: int, seed: int = 0) -> Tensor:
    return randint(-3, 4, *shape, seed=seed).float()


def with_whole_numbers(module: nn.Module) -> Any:
    for seed, parameter in enumerate(module.parameters()):
        parameter.data = whole_numbers(*parameter.shape, seed=seed).to(parameter.dtype)
    return module


def net(*, inplace: bool = True) -> nn.Sequential:
    layers = nn.Linear(3, INPUTS), nn.ReLU(), nn.Linear(INPUTS, OUTPUTS), nn.ReLU(inplace)
    return with_whole_numbers(nn.Sequential(*layers))  # type: ignore[no-any-return]


def gradients(model: nn.Module, rows: Tensor | None = None, call: Callable[..., Tensor] | None = None) -> list[Tensor]:
    """Return the gradients of all parameters after one backward pass."""
    model.zero_grad()
    output = (call or model)(whole_numbers(5, 3) if rows is None else rows)
    (output * whole_numbers(*output.shape, seed=7)).sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def assert_as_usual(make: Callable[[], nn.Module], spec: Any, measure: Callable[[nn.Module], list[Tensor]]) -> None:
    """Claim: a measurement of a model is the same with gradients skipped and without."""
    usual, quick = make(), make()
    freeze_entries(usual, spec)
    freeze_entries(quick, spec, skip_gradients=True)
    expected, found = measure(usual), measure(quick)
    assert len(expected) == len(found) > 0
    assert any(bool(each.any()) for each in expected)
    assert all(map(same_bits, expected, found))


@contextmanager
def counted(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Yield a list to which each call of a function appends its arguments."""
    calls: list[Any] = []
    real = getattr(owner, name)

    def count(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, count)
        yield calls


@pytest.fixture
def skips(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Yield a list to which each gradient of only free rows is appended."""
    with counted(skipped, "_gradient_of_weight", monkeypatch) as calls:
        yield calls


# What is computed

SPECS = {
    "all but the last": "2.weight[:-2]",
    "a range": "2.weight[2:5] = 1",
    "every other": "2.weight[::2] = 0",
    "scattered": "2.weight[[0, 1, 3, 6]] = 0",
    "and of the bias": "2.weight[:-2]\n2.bias[:-2] = 0",
    "others of the bias": "2.weight[:-2]\n2.bias[1::3] = 0",
    "all": "2.weight = 1",
    "and parts of others": "2.weight[1:] = 0\n2.weight[0, 1] = 2",
    "of two rules": "2.weight[:, :2] = 0\n2.weight[:7, 2:] = 1",
    "of both": "*.weight[:2]\n*.bias[:2]",
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_gradients_are_the_usual_ones(spec: str, skips: list[Any]) -> None:
    assert_as_usual(net, spec, gradients)
    assert len(skips) == (2 if "*" in spec else 1)


@pytest.mark.parametrize("shape", [(INPUTS,), (1, INPUTS), (0, INPUTS), (2, 5, INPUTS)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("wants_gradient", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
def test_inputs_of_every_shape(shape: tuple[int, ...], bias: bool, wants_gradient: bool, dtype: torch.dtype) -> None:
    def measure(module: nn.Module) -> list[Tensor]:
        rows = whole_numbers(*shape).to(dtype)
        if dtype.is_complex:
            rows = rows * (2 + 1j)
        rows.requires_grad_(wants_gradient)
        output = module(rows)
        (output * whole_numbers(*output.shape, seed=7)).sum().abs().backward()
        return [each.grad for each in (*module.parameters(), rows) if each.grad is not None] + [output.detach()]

    make = lambda: with_whole_numbers(nn.Linear(INPUTS, OUTPUTS, bias=bias, dtype=dtype))  # noqa: E731
    if 0 in shape:
        usual, quick = make(), make()
        freeze_entries(quick, "weight[:-2]", skip_gradients=True)
        assert all(map(torch.equal, measure(usual), measure(quick)))
    else:
        assert_as_usual(make, "weight[:-2]", measure)


def test_no_pass_cleans_what_comes_clean(monkeypatch: pytest.MonkeyPatch, skips: list[Any]) -> None:
    model = net()
    freeze_entries(model, "2.weight[:-2]\n2.bias[:-2]", skip_gradients=True)
    with counted(FrozenParameter, "add_zero_accumulated", monkeypatch) as cleaned:
        gradients(model)
    assert [frozen.name for frozen, *_ in cleaned] == ["2.bias"]
    assert len(skips) == 1


def test_what_comes_from_elsewhere_is_cleaned() -> None:
    def through_the_weight(model: nn.Module) -> list[Tensor]:
        weight = model.get_parameter("2.weight")
        return gradients(model, call=lambda rows: model(rows) + weight.sum(1) * 2)

    def twice(model: nn.Module) -> list[Tensor]:
        first = nn.Sequential(*list(model.children())[:2])
        return gradients(model, call=lambda rows: model(rows) + model[2](first(rows) * 2))  # type: ignore[index]

    def accumulated(model: nn.Module) -> list[Tensor]:
        for n in range(2):
            (model(whole_numbers(5, 3, seed=n)) * 2).sum().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    def scaled(model: nn.Module) -> list[Tensor]:
        model.get_parameter("2.weight").register_hook(lambda gradient: gradient.add_(1))
        return gradients(model)

    for measure in (through_the_weight, twice, accumulated, scaled):
        assert_as_usual(net, "2.weight[:-2]", measure)


def test_a_tied_embedding_gets_its_other_gradient(skips: list[Any]) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(OUTPUTS, INPUTS)
            self.head = nn.Linear(INPUTS, OUTPUTS, bias=False)
            self.head.weight = self.words.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.words(tokens))  # type: ignore[no-any-return]

    tokens = torch.arange(OUTPUTS).repeat(2)
    assert_as_usual(lambda: with_whole_numbers(Words()), "words[:-2]", lambda model: gradients(model, tokens))
    assert len(skips) == 1
    assert_as_usual(lambda: with_whole_numbers(Words()), "head[:-2]", lambda model: gradients(model, tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast(dtype: torch.dtype, skips: list[Any], device: torch.device) -> None:
    def measure(model: nn.Module) -> list[Tensor]:
        with torch.autocast(device.type, dtype):
            return gradients(model, call=lambda rows: model(rows).float())

    assert_as_usual(net, "*.weight[:-2]\n*.bias[:-2]", measure)
    assert len(skips) == 2


def test_second_derivatives_under_autocast(skips: list[Any], device: torch.device) -> None:
    def measure(model: Any) -> list[Tensor]:
        with torch.autocast(device.type, torch.bfloat16):
            output = model(whole_numbers(5, 3))
        (first,) = torch.autograd.grad(output.float().square().sum(), model[2].weight, create_graph=True)
        first[-2:].sum().backward()
        return [model[0].weight.grad, model[2].weight.grad]

    def after_float32() -> nn.Sequential:
        return nn.Sequential(nn.Linear(3, INPUTS), Float32(), nn.Linear(INPUTS, OUTPUTS))

    assert_as_usual(lambda: with_whole_numbers(after_float32()), "2.weight[:-2]\n2.bias[:-2]", measure)
    assert len(skips) == 2  # of the first and of the second derivative


class Float32(nn.Module):
    """Has the next layer's autocast convert its input, as behind an embedding or a norm."""

    def forward(self, rows: Tensor) -> Tensor:
        return rows.float()


def test_many_derivatives_in_one_backward_pass(skips: list[Any]) -> None:
    rows = whole_numbers(5, 3)

    def batched(model: Any) -> list[Tensor]:
        parameters = [model[0].weight, model[2].weight]
        each = torch.autograd.grad(model(rows).sum(0), parameters, torch.eye(OUTPUTS), is_grads_batched=True)
        return [each[0], each[1][:, -2:]]

    def jacobian(model: Any) -> list[Tensor]:
        return [torch.autograd.functional.jacobian(lambda x: model(x).sum(0), rows, vectorize=True)]

    def hessian(model: Any) -> list[Tensor]:
        return [torch.autograd.functional.hessian(lambda x: model(x).square().sum(), rows, vectorize=True)]

    def mapped(model: Any) -> list[Tensor]:
        output, parameters = model(rows).sum(0), [model[0].weight, model[2].weight]
        grads = vmap(lambda row: torch.autograd.grad(output, parameters, row, retain_graph=True))(torch.eye(OUTPUTS))
        return [grads[0], grads[1][:, -2:]]

    for measure in (batched, jacobian, hessian, mapped):
        assert_as_usual(lambda: net(inplace=False), "2.weight[:-2]\n2.bias[:-2]", measure)
    assert len(skips) == 5


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors_compute_as_usual(layout: torch.layout) -> None:
    def measure(module: Any) -> list[Tensor]:
        nested = torch.nested.nested_tensor([whole_numbers(2, INPUTS), whole_numbers(3, INPUTS)], layout=layout)
        (module(nested) * 2).to_padded_tensor(0.0).sum().backward()
        return [module.weight.grad, module.bias.grad]

    assert_as_usual(lambda: with_whole_numbers(nn.Linear(INPUTS, OUTPUTS)), "weight[:-2]\nbias[:-2]", measure)


@pytest.mark.parametrize("wants_gradient", [False, True])
def test_a_step_between_forward_and_backward_is_as_usual(wants_gradient: bool) -> None:
    """Without a gradient for the input, nothing in the backward pass depends on the weight."""

    def measure(module: Any) -> list[Tensor]:
        output = module(whole_numbers(5, INPUTS).requires_grad_(wants_gradient))
        with torch.no_grad():
            module.weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace") if wants_gradient else nullcontext():
            output.sum().backward()
        return [module.weight if wants_gradient else module.weight.grad]

    assert_as_usual(lambda: with_whole_numbers(nn.Linear(INPUTS, OUTPUTS)), "weight[:-2]\nbias[:-2]", measure)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed(use_reentrant: bool, skips: list[Any]) -> None:
    def measure(model: nn.Module) -> list[Tensor]:
        rows = whole_numbers(5, 3).requires_grad_()
        return gradients(model, rows, lambda rows: checkpoint(model, rows, use_reentrant=use_reentrant))

    assert_as_usual(net, "*.weight[:-2]", measure)
    assert len(skips) == 2


def test_second_derivatives(skips: list[Any]) -> None:
    def measure(model: nn.Module) -> list[Tensor]:
        output = model(whole_numbers(5, 3)).pow(2).sum()
        first = torch.autograd.grad(output, list(model.parameters()), create_graph=True)
        sum((each[-2:].pow(2).sum() for each in first), torch.zeros(())).backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    assert_as_usual(net, "2.weight[:-2]", measure)
    assert skips


# Other hooks and tools


def test_hooks_of_others_see_and_change_what_they_did() -> None:
    def doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * 2

    def before(model: nn.Module) -> None:
        model[2].register_forward_hook(doubled)  # type: ignore[index, operator]

    def first(model: nn.Module) -> None:
        model[2].register_forward_hook(doubled, prepend=True)  # type: ignore[index, operator]

    def inputs(model: nn.Module) -> None:
        model[2].register_forward_pre_hook(lambda module, args: (args[0] * 3,))  # type: ignore[index, operator]

    def backward(model: nn.Module) -> None:
        model[2].register_full_backward_hook(lambda module, into, out: (into[0] * 2,))  # type: ignore[index, operator]
        model[2].register_full_backward_pre_hook(lambda module, out: (out[0] * 2,))  # type: ignore[index, operator]

    for register in (before, first, inputs, backward):
        expected, found, early = (net(inplace=False) for _ in range(3))  # which torch refuses behind backward hooks
        register(early)
        freeze_entries(expected, "2.weight[:-2]")
        freeze_entries(found, "2.weight[:-2]", skip_gradients=True)
        freeze_entries(early, "2.weight[:-2]", skip_gradients=True)
        register(expected)
        register(found)
        wanted = gradients(expected)
        assert all(map(same_bits, wanted, gradients(found)))
        assert all(map(same_bits, wanted, gradients(early)))


def test_a_hook_for_all_modules_may_change_the_output() -> None:
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: output * 2 if isinstance(module, nn.Linear) else None
    )
    try:
        assert_as_usual(net, "2.weight[:-2]", gradients)
    finally:
        handle.remove()


def test_a_forward_put_on_the_module_is_called() -> None:
    def measure(model: nn.Module) -> list[Tensor]:
        real = model[2].forward  # type: ignore[index]
        model[2].forward = lambda rows: real(rows) * 2  # type: ignore[index]
        return gradients(model)

    assert_as_usual(net, "2.weight[:-2]", measure)


def test_pruned_or_parametrized_later() -> None:
    def pruned(model: nn.Module) -> list[Tensor]:
        prune.random_unstructured(model[2], "bias", 2)  # type: ignore[index]
        return gradients(model)

    class Doubled(nn.Module):
        def forward(self, bias: Tensor) -> Tensor:
            return bias * 2

    def parametrized(model: nn.Module) -> list[Tensor]:
        parametrize.register_parametrization(model[2], "bias", Doubled())  # type: ignore[index]
        return gradients(model)

    for measure in (pruned, parametrized):
        torch.manual_seed(0)
        expected = net()
        freeze_entries(expected, "2.weight[:-2]")
        wanted = measure(expected)
        torch.manual_seed(0)
        found = net()
        freeze_entries(found, "2.weight[:-2]", skip_gradients=True)
        assert all(map(same_bits, wanted, measure(found)))


@pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated")
def test_functional_calls_and_transforms_compute_as_usual() -> None:
    def foreign(model: nn.Module) -> list[Tensor]:
        others = {name: parameter.detach().clone().requires_grad_() for name, parameter in net().named_parameters()}
        (functional_call(model, others, (whole_numbers(5, 3),)) * 2).sum().backward()
        return [each.grad for each in others.values() if each.grad is not None]

    def foreign_bias(model: Any) -> list[Tensor]:
        other = net().get_parameter("2.bias").detach().requires_grad_()
        (functional_call(model, {"2.bias": other}, (whole_numbers(5, 3),)) * 2).sum().backward()
        return [other.grad, *(each.grad for each in model.parameters() if each.grad is not None)]

    def by_sample(model: nn.Module) -> list[Tensor]:
        own = {name: parameter.detach() for name, parameter in model.named_parameters()}
        loss = lambda weights, row: functional_call(model, weights, (row[None],)).sum()  # noqa: E731
        return list(vmap(grad(loss), in_dims=(None, 0))(own, whole_numbers(5, 3)).values())

    def forward_mode(model: nn.Module) -> list[Tensor]:
        rows = whole_numbers(5, 3)
        return list(jvp(model, (rows,), (torch.ones_like(rows),)))

    def traced(model: nn.Module) -> list[Tensor]:
        program = torch.jit.trace(model, (whole_numbers(5, 3),), check_trace=False)
        return gradients(model, call=program)

    for measure in (foreign, foreign_bias, by_sample, forward_mode, traced):
        assert_as_usual(net, "2.weight[:-2]\n2.bias[:-2]", measure)


@pytest.mark.parametrize("called_before", [False, True])
def test_traced_by_make_fx(called_before: bool) -> None:
    rows = whole_numbers(5, 3)

    def measure(model: Any) -> list[Tensor]:
        if called_before:
            gradients(model)
        traced = make_fx(lambda rows: torch.autograd.grad(model(rows).sum(), [model[0].weight, model[2].weight]))(rows)
        with torch.no_grad():
            return list(traced(rows + 1))

    for spec in ("2.weight[:-2]\n2.bias[:-2]", "2.weight[[0, 3]]"):
        usual, quick = net(inplace=False), net(inplace=False)
        freeze_entries(usual, spec)
        frozen = freeze_entries(quick, spec, skip_gradients=True)["2.weight"].frozen
        expected, found = measure(usual), measure(quick)
        assert same_bits(expected[0], found[0])
        assert same_bits(expected[1].masked_fill(frozen, 0), found[1])


def test_compiled_frames_compute_as_usual() -> None:
    def measure(model: nn.Module) -> list[Tensor]:
        return gradients(model, call=torch.compile(model, backend="aot_eager", fullgraph=True))

    assert_as_usual(net, "2.weight[:-2]", measure)


def test_two_threads_in_one_module(skips: list[Any]) -> None:
    model = net()
    freeze_entries(model, "2.weight[:-2]", skip_gradients=True)
    barrier, found = threading.Barrier(2), []

    def meet(module: nn.Module, args: Any) -> None:
        barrier.wait()

    model[2].register_forward_pre_hook(meet)
    weight: Any = model[2].weight

    inputs = whole_numbers(5, 3)

    def work() -> None:
        output = model(inputs)
        found.append(torch.autograd.grad(output.sum(), weight)[0])

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(skips) == 2
    assert same_bits(*found)


def test_an_error_in_the_forward_leaves_nothing_behind() -> None:
    model = net()
    freeze_entries(model, "2.weight[:-2]", skip_gradients=True)
    before = dict(vars(model[2]))
    with pytest.raises(RuntimeError):
        model(torch.ones(5, 7))
    assert dict(vars(model[2])) == before
    usual = net()
    freeze_entries(usual, "2.weight[:-2]")
    assert all(map(same_bits, gradients(usual), gradients(model)))


# Over ranks


def assert_as_usual_over_ranks(first: str, spread: Callable[[nn.Sequential], Any]) -> None:
    """Claim: the gradients of a model that is spread over ranks are those of one process without skipping."""
    spec = "*.weight[:-2]\n2.bias[:3]"
    usual = net()
    freeze_entries(usual, spec)
    expected = gradients(usual)
    model = net()
    if first == "frozen":
        freeze_entries(model, spec, skip_gradients=True)
        called = spread(model)
    else:
        called = spread(model)
        freeze_entries(model, spec, skip_gradients=True)
    with pytest.MonkeyPatch.context() as patch, counted(skipped, "_gradient_of_weight", patch) as made:
        for _ in range(2):
            found = [getattr(each, "full_tensor", lambda each=each: each)() for each in gradients(model, call=called)]
            assert all(map(same_bits, expected, found))
    assert len(made) == 4


@on_ranks(
    2,
    {
        "frozen first": {"first": "frozen"},
        "replicated first": {"first": "spread", "gradient_as_bucket_view": True},
    },
)
def test_gradients_of_replicas_are_the_usual_ones(first: str, **options: Any) -> None:
    assert_as_usual_over_ranks(first, lambda model: DistributedDataParallel(model, **options))


@computes_in_shards
@on_ranks(
    2,
    {
        "layers, frozen first": {"layers": True, "first": "frozen"},
        "layers sharded first": {"layers": True, "first": "spread"},
        "layers resharded, frozen first": {"layers": True, "first": "frozen", "reshard_after_forward": True},
        "root, frozen first": {"layers": False, "first": "frozen"},
        "root sharded first": {"layers": False, "first": "spread"},
    },
)
def test_gradients_of_shards_are_the_usual_ones(first: str, layers: bool, **options: Any) -> None:
    def shard(model: nn.Sequential) -> Any:
        for layer in (model[0], model[2]) if layers else ():
            fully_shard(layer, **options)
        return fully_shard(model, **options)

    assert_as_usual_over_ranks(first, shard)


# While it lasts


def test_copies_skip_too(skips: list[Any]) -> None:
    model = net()
    freeze_entries(model, "2.weight[:-2]", skip_gradients=True)
    usual = gradients(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        skips.clear()
        assert all(map(same_bits, usual, gradients(copied)))
        assert len(skips) == 1
        assert skips[0][2] is copied[2].weight
        (frozen,) = FrozenEntries.of(copied)
        assert "no gradient is computed for frozen rows of 2.weight" in str(frozen)
        frozen.remove()
        assert not copied[2]._forward_hooks


def test_it_leaves_with_the_handle_and_comes_back(skips: list[Any]) -> None:
    model, untouched = net(), net()
    frozen = freeze_entries(model, "2.weight[:-2]", skip_gradients=True)
    frozen.remove()
    assert not model[2]._forward_hooks
    assert all(map(same_bits, gradients(untouched), gradients(model)))
    assert not skips
    frozen.attach()
    gradients(model)
    assert len(skips) == 1


def test_thawed_rows_get_their_gradient() -> None:
    model = net()
    frozen = freeze_entries(model, "2.weight[:-2]", skip_gradients=True)
    gradients(model)
    frozen.thaw("2.weight[:3]")
    usual = net()
    freeze_entries(usual, "2.weight[3:-2]")
    assert all(map(same_bits, gradients(usual), gradients(model)))
    frozen.thaw("2.weight")
    assert all(map(same_bits, gradients(net()), gradients(model)))


@pytest.mark.parametrize("target", ["2.weight", "2.weight[:-2]", "2.weight[:-2, 0]", "2.bias", "2.bias[0]", "2.*"])
def test_weight_and_bias_may_be_thawed_apart(target: str) -> None:
    spec = "2.weight[:-2]\n2.bias[:-2]"
    model, usual = net(), net()
    for each, skip in ((usual, False), (model, True)):
        freeze_entries(each, spec, skip_gradients=skip).thaw(target)
    for _ in range(2):
        assert all(map(same_bits, gradients(usual), gradients(model)))


@held_twice
def test_of_several_handles_all_frozen_rows_are_skipped(skips: list[Any]) -> None:
    model, usual = net(), net()
    for each, skip in ((usual, False), (model, True)):
        freeze_entries(each, "2.weight[:2] = 0", skip_gradients=skip)
        freeze_entries(each, "2.weight[1:4] = 0", skip_gradients=skip)
        freeze_entries(each, "2.weight[5, 1] = 0")
    assert all(map(same_bits, gradients(usual), gradients(model)))
    assert len(skips) == 1
    assert skips[0][3].weight == slice(4, 8, 1)


def test_moved_to_another_dtype(skips: list[Any]) -> None:
    assert_as_usual(net, "2.weight[[0, 3, 4]]", lambda model: gradients(model.double(), whole_numbers(5, 3).double()))
    assert len(skips) == 1


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("make", [
    lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
    lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1),
], ids=["SGD", "AdamW"])  # fmt: skip
def test_training_and_resuming(make: Callable[..., Any], compact: bool) -> None:
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
    spec = "0[:-4]\n0.bias[:-4]\n2.weight[[0, 3, 5]] = 0"

    def train(model: nn.Module, optimizer: Any, steps: range) -> None:
        for step in steps:
            rows = randn(8, 16, seed=step)
            model(rows).pow(2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    def begin(skip: bool, state: Any = None) -> tuple[nn.Module, FrozenEntries, Any]:
        model = copy.deepcopy(start)
        frozen = freeze_entries(model, spec, skip_gradients=skip, state=state)
        return model, frozen, MaskedOptimizer(make(model.parameters()), frozen, compact=compact)

    model, frozen, optimizer = begin(True)
    train(model, optimizer, range(10))
    saved = copy.deepcopy([model.state_dict(), frozen.state_dict(), optimizer.state_dict()])
    train(model, optimizer, range(10, 20))
    frozen.assert_frozen()
    usual, _, usual_optimizer = begin(False)
    train(usual, usual_optimizer, range(20))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, usual.get_parameter(name))  # products of other shapes round otherwise
    resumed, _, resumed_optimizer = begin(True, saved[1])
    resumed.load_state_dict(saved[0])
    resumed_optimizer.load_state_dict(saved[2])
    train(resumed, resumed_optimizer, range(10, 20))
    assert all(map(same_bits, model.state_dict().values(), resumed.state_dict().values()))


def test_train_only(skips: list[Any]) -> None:
    model = net()
    frozen = train_only(model, "2.weight[-2:]", skip_gradients=True)
    expected = net()
    train_only(expected, "2.weight[-2:]")
    assert all(map(same_bits, gradients(expected), gradients(model)))
    assert len(skips) == 1
    assert "no gradient is computed for frozen rows of 2.weight" in str(frozen)


# Refusals


class Scaled(nn.Linear):
    def forward(self, rows: Tensor) -> Tensor:
        return nn.functional.linear(rows, self.weight * 2, self.bias)


class Named(nn.Linear):
    pass


def test_a_subclass_with_the_same_forward_skips(skips: list[Any]) -> None:
    assert_as_usual(lambda: with_whole_numbers(Named(3, OUTPUTS)), "weight[:2]", gradients)
    assert len(skips) == 1


def pruned_layer() -> Any:
    return prune.random_unstructured(nn.Linear(3, 4), "weight", 2)


REFUSED = {
    "a convolution": (lambda: nn.Conv2d(1, 4, 3), "weight[0]", "belongs to Conv2d"),
    "an embedding": (lambda: nn.Embedding(4, 3), "weight[0]", "belongs to Embedding"),
    "no row": (lambda: nn.Linear(3, 4), "weight[:, 0]", "no row of it is frozen entirely"),
    "a bias alone": (lambda: nn.Linear(3, 4), "bias[0]", "the bias beside it"),
    "another forward": (lambda: Scaled(3, 4), "weight[0]", "has a forward of its own"),
    "never called": (lambda: nn.MultiheadAttention(4, 2), "out_proj.weight[0]", "without calling its module"),
    "its projections": (lambda: nn.MultiheadAttention(4, 2), "in_proj_weight[0]", "rows of a weight"),
    "tied": (lambda: nn.Linear(3, 4), "weight = tied(0, start=mean)", "tied need every gradient"),
    "pruned": (pruned_layer, "weight_orig[0]", "rows of a weight"),
    "bare": (lambda: {"w": torch.ones(3, 4, requires_grad=True)}, "w[0]", "a bare tensor has no forward"),
    "nothing": (lambda: nn.Linear(3, 4), "", "nothing is frozen"),
}


@pytest.mark.parametrize(("make", "spec", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused_with_the_reason(make: Callable[[], Any], spec: str, reason: str) -> None:
    model = make()
    hooks = len(model._forward_hooks) if isinstance(model, nn.Module) else 0
    with pytest.raises(UnsupportedParameterError, match=reason):
        freeze_entries(model, spec, skip_gradients=True)
    if isinstance(model, nn.Module):
        assert len(model._forward_hooks) == hooks
        assert not FrozenEntries.of(model)


def test_what_can_be_skipped_is_said() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 3))
    frozen = freeze_entries(model, "0[center] = 0\n2[0]", skip_gradients=True)
    assert str(frozen).splitlines()[-1] == "no gradient is computed for frozen rows of 2.weight"
    frozen.remove()
    assert "no gradient" not in str(frozen)
