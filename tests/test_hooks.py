"""What happens in a model's life between steps: copies, saving, loading, second calls, stray writes."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from freezehooks import FrozenEntries, MaskedOptimizer, ParameterChangedError, freeze_entries

from .claims import assert_entries_hold, assert_gradients_clean, assert_model_holds, assert_training_holds, same_bits
from .zoo import IDS, ZOO, Animal

animals = pytest.mark.parametrize("animal", ZOO, ids=IDS)


def _spoil(model: nn.Module) -> None:
    """Write into every entry through `.data`, as many answers on the web do."""
    for parameter in model.parameters():
        parameter.data[...] = 7.0


@animals
def test_a_stray_write_is_undone_before_the_next_forward_and_in_what_is_saved(animal: Animal) -> None:
    model = animal.model()
    held = animal.held(model)
    freeze_entries(model, animal.spec)
    _spoil(model)
    model(*animal.batch())
    assert_model_holds(model, held, "after a forward that followed a stray write")
    _spoil(model)
    assert_entries_hold(model.state_dict(), held, "in state_dict() after a stray write")


@animals
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "after_a_forward"])
def test_a_deep_copy_trains_frozen_without_touching_the_original(animal: Animal, used: bool) -> None:
    model = animal.model()
    held = animal.held(model)
    freeze_entries(model, animal.spec)
    if used:
        animal.loss(model, animal.batch()).backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    twin = copy.deepcopy(model)
    (frozen,) = FrozenEntries.of(twin)
    optimizer = MaskedOptimizer(torch.optim.AdamW(twin.parameters(), lr=0.1, weight_decay=0.1), frozen)
    assert_training_holds(animal, twin, held, optimizer, steps=3)
    assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())
    assert all(ours is not theirs for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True))


def test_the_copy_keeps_on_its_own_what_it_loads() -> None:
    model = nn.Linear(2, 2)
    frozen = freeze_entries(model, "weight[0]")
    twin = copy.deepcopy(model)
    twin.load_state_dict({"weight": torch.full((2, 2), 9.0), "bias": torch.zeros(2)})
    twin(torch.ones(1, 2))
    assert twin.weight[0].tolist() == [9, 9]
    frozen.assert_frozen(guarded=False)
    model(torch.ones(1, 2))
    assert model.weight[0].tolist() != [9, 9]


_RELOAD = """
import sys, torch
sys.path.insert(0, {root!r})
from freezehooks import FrozenEntries, MaskedOptimizer
model = torch.load({path!r}, weights_only=False)
(frozen,) = FrozenEntries.of(model)
optimizer = MaskedOptimizer(torch.optim.AdamW(model.parameters(), weight_decay=0.1), frozen)
for _ in range(3):
    model(torch.randn(2, 3)).square().sum().backward()
    assert not model.weight.grad[0].any()
    optimizer.step()
    frozen.assert_frozen()
print(model.weight[0].tolist(), frozen)
"""


def test_a_whole_saved_model_stays_frozen_in_a_new_process(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    freeze_entries(model, "weight[0] = 0.5")
    torch.save(model, tmp_path / "model.pt")
    script = _RELOAD.format(root=str(Path(__file__).parents[1]), path=str(tmp_path / "model.pt"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[0.5, 0.5, 0.5] parameter")


@animals
def test_assigned_parameters_are_hooked_and_keep_follows_them(animal: Animal) -> None:
    model, plain = animal.model(), animal.model()
    freeze_entries(model, animal.spec)
    model.load_state_dict(plain.state_dict(), assign=True)
    held = animal.held(plain)
    animal.loss(model, animal.batch()).backward()
    assert_model_holds(model, held, "after load_state_dict(assign=True)")
    assert_gradients_clean(model, held)


def test_keep_follows_a_load_and_a_number_does_not() -> None:
    model = nn.Linear(2, 2)
    frozen = freeze_entries(model, "weight[0]\nweight[1] = 0.5")
    model.load_state_dict({"weight": torch.full((2, 2), 3.0), "bias": torch.zeros(2)})
    assert model.weight.tolist() == [[3, 3], [0.5, 0.5]]
    model(torch.ones(1, 2))
    assert model.weight.tolist() == [[3, 3], [0.5, 0.5]]
    frozen.assert_frozen(guarded=False)


def test_keep_does_not_follow_a_stray_write_when_a_load_leaves_the_parameter_out() -> None:
    model = nn.Linear(2, 2)
    freeze_entries(model, "weight[0]")
    before = model.weight[0].tolist()
    _spoil(model)
    model.load_state_dict({"bias": torch.zeros(2)}, strict=False)
    assert model.weight[0].tolist() == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat16"])
def test_values_are_rounded_once_from_those_first_given(dtype: torch.dtype) -> None:
    model = nn.Linear(3, 2)
    first = model.weight[1].detach().clone()
    freeze_entries(model, [{"weight": ("0", torch.tensor([0.1, 0.2, 0.3]))}, "weight[1]", "bias = 0.1"])
    model.to(dtype)
    model(torch.ones(1, 3, dtype=dtype))
    assert same_bits(model.weight[0], torch.tensor([0.1, 0.2, 0.3]).to(dtype))
    model.float()
    model(torch.ones(1, 3))
    assert same_bits(model.weight[0], torch.tensor([0.1, 0.2, 0.3]))
    assert same_bits(model.weight[1], first)
    assert same_bits(model.bias, torch.full((2,), 0.1))


def test_a_module_called_twice_with_a_no_grad_call_between_backpropagates() -> None:
    model = nn.Linear(3, 3)
    freeze_entries(model, "weight[0] = 1")
    output = model(torch.tanh(model(torch.ones(2, 3))))
    with torch.no_grad():
        model(torch.ones(2, 3))
    output.sum().backward()
    assert model.weight.grad is not None
    assert not bool(model.weight.grad[0].any())
    assert bool(model.weight.grad[1:].any())


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
def test_gradient_checkpointing_leaves_clean_gradients(reentrant: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
    freeze_entries(model, "0[0] = 1")
    checkpoint(model, torch.ones(2, 3, requires_grad=True), use_reentrant=reentrant).sum().backward()
    gradient = model.get_parameter("0.weight").grad
    assert gradient is not None
    assert not bool(gradient[0].any())
    assert bool(gradient[1:].any())


@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("region", ["[0]", "[[0, 3], [1, 2]]", "[smallest(0.5)]"], ids=["box", "scattered", "dense"])
def test_an_infinite_gradient_becomes_exactly_zero(number: float, region: str) -> None:
    weight = nn.Parameter(torch.randn(8, 8))
    frozen = freeze_entries({"weight": weight}, f"weight{region} = 0")
    (weight * number).sum().backward()
    assert weight.grad is not None
    held = frozen["weight"].frozen
    assert same_bits(weight.grad[held], torch.zeros(int(held.sum())))
    assert not bool(weight.grad[~held].isfinite().any())


def test_a_gradient_that_is_part_of_a_graph_is_replaced_not_written() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    freeze_entries({"weight": weight}, "weight[0]")
    with pytest.warns(UserWarning, match="create_graph=True"):
        weight.pow(3).sum().backward(create_graph=True)
    gradient, weight.grad = weight.grad, None
    assert gradient is not None
    assert gradient.tolist() == [0, 12]
    gradient.sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [0, 12]


@pytest.mark.parametrize("sparse_form", ["rows", "scattered"])
def test_sparse_gradients_are_zeroed_where_frozen(sparse_form: str) -> None:
    embedding = nn.Embedding(50, 4, sparse=True)
    freeze_entries(embedding, "weight[:25]" if sparse_form == "rows" else "weight[[3, 40], [1, 2]]")
    tokens = torch.tensor([3, 3, 40, 41])
    embedding(tokens).sum().backward()
    assert embedding.weight.grad is not None
    dense = embedding.weight.grad.to_dense()
    expected = torch.zeros(50, 4).index_add(0, tokens, torch.ones(4, 4))
    expected[(slice(25),) if sparse_form == "rows" else ([3, 40], [1, 2])] = 0
    assert dense.equal(expected)


def test_gradients_stay_clean_after_requires_grad_was_off() -> None:
    model = nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    freeze_entries(model, "weight[0] = 1")
    model(torch.ones(1, 2)).sum().backward()
    model.weight.requires_grad_(True)
    model(torch.ones(1, 2)).sum().backward()
    assert model.weight.grad is not None
    assert model.weight.grad.tolist() == [[0, 0], [1, 1]]


def test_a_gradient_from_before_freezing_is_cleaned() -> None:
    model = nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    freeze_entries(model, "weight[0] = 1")
    assert model.weight.grad is not None
    assert model.weight.grad.tolist() == [[0, 0], [1, 1]]


def test_another_parameter_of_the_same_shape_is_held_in_the_old_ones_place() -> None:
    model = nn.Linear(2, 2)
    frozen = freeze_entries(model, "weight[0] = 1")
    model.weight = nn.Parameter(torch.zeros(2, 2))
    with pytest.warns(UserWarning, match="`weight` was replaced"):
        model(torch.ones(1, 2)).sum().backward()
    assert model.weight.tolist() == [[1, 1], [0, 0]]
    assert model.weight.grad is not None
    assert model.weight.grad.tolist() == [[0, 0], [1, 1]]
    frozen.assert_frozen(guarded=False)


def test_another_parameter_of_another_shape_is_refused_by_name() -> None:
    model = nn.Linear(2, 2, bias=False)
    frozen = freeze_entries(model, "weight[0] = 1")
    model.weight = nn.Parameter(torch.zeros(3, 2))
    with pytest.raises(ParameterChangedError, match=r"`weight` had shape \(2, 2\) .* has \(3, 2\) now; remove"):
        model(torch.ones(1, 2))
    frozen.remove()
    model(torch.ones(1, 2))


def test_a_parameter_that_was_deleted_is_reported_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    frozen = freeze_entries(model, "0[0] = 1")
    del model[0].weight
    with pytest.raises(ParameterChangedError, match=r"`0\.weight` is gone from Linear; remove"):
        model(torch.ones(1, 2))
    with pytest.raises(ParameterChangedError, match="gone"):
        frozen.impose()
    frozen.remove()


def test_averaged_models_hold_in_their_forward_and_state_dict() -> None:
    model = nn.Linear(4, 4)
    frozen = freeze_entries(model, "weight[0] = 0.1\nweight[1]")
    held = model.weight[:2].detach().clone()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    averaged = average.module.get_parameter("weight")
    by_hand = copy.deepcopy(model)
    optimizer = MaskedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), frozen)
    for _ in range(10):
        optimizer.zero_grad()
        model(torch.randn(3, 4)).square().sum().backward()
        optimizer.step()
        average.update_parameters(model)
        for mine, other in zip(by_hand.parameters(), model.parameters(), strict=True):
            mine.data = 0.9 * mine.data + 0.1 * other.data  # moves a constant by a rounding error
    assert same_bits(averaged[:2], held)
    assert not same_bits(by_hand.weight[:2], held)
    assert same_bits(by_hand.state_dict()["weight"][:2], held)
    by_hand(torch.ones(1, 4))
    assert same_bits(by_hand.weight[:2], held)


def test_functional_call_computes_with_what_it_is_given() -> None:
    model = nn.Linear(2, 2, bias=False)
    freeze_entries(model, "weight = 1")
    given = {"weight": torch.full((2, 2), 3.0, requires_grad=True)}
    output = torch.func.functional_call(model, given, (torch.ones(1, 2),))
    assert output.tolist() == [[6, 6]]
    assert given["weight"].tolist() == [[3, 3], [3, 3]]
    assert model(torch.ones(1, 2)).tolist() == [[2, 2]]


def test_a_frozen_model_runs_in_inference_mode() -> None:
    model = nn.Linear(2, 2)
    freeze_entries(model, "weight[smallest(0.5)] = 1\nbias[0] = 2")
    with torch.inference_mode():
        model(torch.ones(1, 2))
    model(torch.ones(1, 2)).sum().backward()


def test_pruning_beside_freezing_holds_the_renamed_parameter() -> None:
    from torch.nn.utils import prune

    model = nn.Linear(4, 4)
    frozen = freeze_entries(model, "weight[0] = 0.5")
    prune.random_unstructured(model, "weight", 0.3)
    optimizer = MaskedOptimizer(torch.optim.AdamW(model.parameters(), weight_decay=0.1), frozen)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 4)).square().sum().backward()
        optimizer.step()
    assert model.get_parameter("weight_orig")[0].tolist() == [0.5] * 4
    prune.remove(model, "weight")
    model(torch.randn(2, 4))
    assert model.weight[0].tolist() == [0.5] * 4


@pytest.mark.parametrize("fullgraph", [False, True], ids=["default", "fullgraph"])
@pytest.mark.parametrize(
    "spec", ["weight[0] = 1", "weight[smallest(0.5)] = 0", "weight[1]"], ids=["box", "dense", "keep"]
)
def test_a_compiled_model_computes_with_the_values(spec: str, fullgraph: bool) -> None:
    torch.compiler.reset()
    model = nn.Linear(4, 4)
    frozen = freeze_entries(model, spec)
    compiled = torch.compile(model, fullgraph=fullgraph, backend="aot_eager")
    compiled(torch.ones(1, 4)).sum().backward()
    held = frozen["weight"].frozen
    assert model.weight.grad is not None
    assert not bool(model.weight.grad[held].any())
    model.weight.data[...] = 5
    output = compiled(torch.ones(1, 4))
    frozen.assert_frozen(guarded=False)
    assert torch.equal(output, model(torch.ones(1, 4)))


def test_saving_and_loading_by_buffer_keeps_plain_keys() -> None:
    model = nn.Linear(2, 2)
    plain_keys = list(model.state_dict())
    freeze_entries(model, "weight[0] = 1")
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    stream.seek(0)
    loaded: dict[str, Tensor] = torch.load(stream, weights_only=True)
    assert list(loaded) == plain_keys
    nn.Linear(2, 2).load_state_dict(loaded)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_deterministic_algorithms_are_enough_for_scattered_entries(layout: torch.memory_format) -> None:
    few = torch.zeros(8, 8, 3, 3, dtype=torch.bool)
    few[0, 0, 0, 0] = few[5, 2, 1, 2] = True
    model = nn.Conv2d(8, 8, 3).to(memory_format=layout)  # type: ignore[call-overload]  # torch's stubs
    kept = model.weight[few].detach().clone()
    torch.use_deterministic_algorithms(True)
    try:
        freeze_entries(model, {"weight": few})
        _spoil(model)
        model(torch.ones(1, 8, 3, 3)).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert same_bits(model.weight[few], kept)
    assert model.weight.grad is not None
    assert not bool(model.weight.grad[few].any())


class _Experts(nn.Module):
    """Computes with parameters in containers that are never called."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ParameterList([torch.randn(3, 3), torch.randn(3, 3)])
        self.blocks = nn.ModuleDict({"gates": nn.ParameterDict({"open": torch.ones(3)})})

    def forward(self, x: Tensor) -> Tensor:
        gates = self.blocks["gates"]
        assert isinstance(gates, nn.ParameterDict)
        return torch.mul(x @ self.experts[0] @ self.experts[1], gates["open"])


def test_parameters_in_containers_are_held_in_the_forward_and_in_copies() -> None:
    model = _Experts()
    freeze_entries(model, "experts.1[0] = 0.5\nblocks.gates.open[2] = 2")
    for each in (model, copy.deepcopy(model)):
        _spoil(each)
        each(torch.ones(1, 3)).sum().backward()
        assert each.experts[1][0].tolist() == [0.5] * 3
        gate = each.get_parameter("blocks.gates.open")
        assert gate.tolist() == [7, 7, 2]
        assert each.experts[1].grad is not None
        assert gate.grad is not None
        assert not bool(each.experts[1].grad[0].any())
        assert gate.grad[2] == 0


def test_an_output_projection_shared_by_two_attentions_is_held_under_both() -> None:
    first, second = nn.MultiheadAttention(4, 2), nn.MultiheadAttention(4, 2)
    second.out_proj = first.out_proj
    freeze_entries(nn.ModuleList([first, second]), "0.out_proj[0] = 0.5")
    for attention in (first, second):
        _spoil(attention)
        attention(*torch.ones(3, 2, 1, 4))
        assert attention.out_proj.weight[0].tolist() == [0.5] * 4


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own, inside jacfwd
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")  # the same since torch 2.14
@pytest.mark.parametrize("transform", ["grad", "jacrev", "jacfwd", "hessian", "vmap"])
def test_function_transforms_run_over_a_frozen_module(transform: str) -> None:
    model = nn.Linear(3, 1)
    freeze_entries(model, "weight[0, 1] = 0.5")
    _spoil(model)
    rows = (2, 3) if transform == "vmap" else (3,)
    output = getattr(torch.func, transform)(lambda x: torch.tanh(model(x)).sum())(torch.full(rows, 0.01))
    assert bool(output.isfinite().all())
    assert model.weight.tolist() == [[7, 0.5, 7]]


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="torch says when it exports since 2.7")
def test_a_frozen_model_exports() -> None:
    model = nn.Linear(3, 2)
    freeze_entries(model, "weight[0] = 0.5")
    program = torch.export.export(model, (torch.ones(1, 3),))
    assert torch.equal(program.module()(torch.ones(1, 3)), model(torch.ones(1, 3)))


def test_gradients_stay_clean_when_conversion_swaps_the_parameters() -> None:
    model = nn.Linear(3, 2)
    freeze_entries(model, "weight[0] = 0.5")
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    model(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
    assert model.weight.grad is not None
    assert model.weight.grad.tolist() == [[0, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize("region", ["[0]", "[smallest(0.5)]"], ids=["box", "dense"])
def test_a_lazily_conjugated_gradient_is_cleaned(region: str) -> None:
    weight = nn.Parameter(torch.randn(4, 4, dtype=torch.complex64))
    frozen = freeze_entries({"weight": weight}, f"weight{region} = 0")
    torch.view_as_real(weight.conj() + 1).pow(2).sum().backward()
    held = frozen["weight"].frozen
    assert weight.grad is not None
    assert same_bits(weight.grad[held], torch.zeros_like(weight.grad[held]))
    assert bool((weight.grad[~held] != 0).all())


def test_an_expanded_gradient_set_by_hand_is_cleaned_where_frozen_alone() -> None:
    weight = nn.Parameter(torch.ones(3, 3))
    frozen = freeze_entries({"weight": weight}, "weight[0] = 1")
    optimizer = MaskedOptimizer(torch.optim.SGD([weight], lr=0.5), frozen)
    weight.grad = torch.ones(1, 1).expand(3, 3)
    optimizer.step()
    assert weight.tolist() == [[1] * 3, [0.5] * 3, [0.5] * 3]


def test_a_model_frozen_by_a_function_pickles() -> None:
    model = nn.Linear(3, 2)
    frozen = freeze_entries(model, {"weight": (lambda parameter: parameter > -9, 0.5)})
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    (again,) = FrozenEntries.of(torch.load(stream, weights_only=False))
    again.assert_frozen(guarded=False)
    assert str(again.rules[0]) == str(frozen.rules[0]) == "weight[<<lambda>>] = 0.5"


@pytest.mark.parametrize("target", ["weight_orig", "weight"], ids=["after_pruning", "before_pruning"])
def test_a_pruned_module_computes_with_the_values(target: str) -> None:
    from torch.nn.utils import prune

    model = nn.Linear(4, 2)
    if target == "weight":
        freeze_entries(model, "weight[0] = 1")
    mask = torch.ones(2, 4)
    mask[1, 0] = 0
    prune.custom_from_mask(model, "weight", mask)
    if target == "weight_orig":
        freeze_entries(model, "weight_orig[0] = 1")
    _spoil(model)
    model(torch.ones(1, 4))
    assert model.weight.tolist() == [[1, 1, 1, 1], [0, 7, 7, 7]]


@pytest.mark.parametrize("region", ["[0]", "[[0, 3], [1, 2]]", "[smallest(0.5)]"], ids=["box", "scattered", "dense"])
def test_a_model_that_passes_through_the_meta_device_is_held_again(region: str, device: torch.device) -> None:
    model = nn.Linear(8, 8)
    frozen = freeze_entries(model, f"weight{region} = 0.5")
    model.to("meta")
    model.state_dict()
    model.to_empty(device=device)
    model(torch.ones(1, 8))
    frozen.assert_frozen(guarded=False)


@pytest.mark.parametrize("value", [0.0, 0.5, "keep"], ids=str)
def test_forwards_in_other_threads_never_see_a_weight_half_written(value: float | str) -> None:
    """A server evaluates one model in many threads; imposing again what is there must not show."""
    torch.set_num_threads(1)
    model = nn.Linear(256, 256)
    freeze_entries(model, {"weight": (lambda weight: weight > 0, value)})
    inputs = torch.ones(1, 256)
    with torch.no_grad():
        expected = model(inputs)
    wrong: list[Tensor] = []

    def serve() -> None:
        with torch.no_grad():
            for _ in range(150):
                output = model(inputs)
                if not output.equal(expected):
                    wrong.append(output)

    threads = [threading.Thread(target=serve) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(wrong) == 0
    assert model(inputs).equal(expected)


def test_a_compiled_copy_is_clean_once_its_handle_was_asked_for() -> None:
    torch.compiler.reset()
    model = nn.Linear(4, 4)
    freeze_entries(model, "weight[0] = 1")
    twin = copy.deepcopy(model)
    (frozen,) = FrozenEntries.of(twin)
    torch.compile(twin, backend="aot_eager")(torch.ones(1, 4)).sum().backward()
    assert twin.weight.grad is not None
    assert twin.weight.grad[:, 0].tolist() == [0, 1, 1, 1]
    frozen.assert_frozen(guarded=False)


def test_hooks_that_were_there_before_see_the_clean_gradient() -> None:
    model = nn.Linear(2, 2)
    seen: list[list[float]] = []

    def look(parameter: Tensor) -> None:
        assert parameter.grad is not None
        seen.append(parameter.grad[0].tolist())

    model.weight.register_post_accumulate_grad_hook(look)
    freeze_entries(model, "weight[0] = 1")
    model(torch.ones(1, 2)).sum().backward()
    assert seen == [[0, 0]]


def test_a_model_with_gradients_is_converted_by_swapping() -> None:
    model = nn.Linear(3, 2)
    frozen = freeze_entries(model, "weight[0] = 1")
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model(torch.ones(1, 3)).sum().backward()
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    optimizer = MaskedOptimizer(torch.optim.Adam(model.parameters()), frozen)
    optimizer.step()
    frozen.assert_frozen()
    assert not optimizer.state[model.weight]["exp_avg"][0].any()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:FutureWarning")  # since torch 2.14
def test_a_traced_program_has_no_trace_of_what_holds_the_entries() -> None:
    model = nn.Sequential(nn.Linear(64, 4))
    frozen = freeze_entries(model, "0.weight[nm(1, 2)] = 0")
    batch = torch.randn(2, 64)
    program = torch.jit.trace(model, (batch,))
    assert "copy_" not in str(program.inlined_graph)
    assert same_bits(program(batch), model(batch))
    frozen.assert_frozen(guarded=False)
