"""The handle: a mapping, a table, attaching and removing, thawing, saving."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from freezehooks import (
    DriftError,
    FrozenEntries,
    MaskedOptimizer,
    OptimizerMismatchError,
    ParameterChangedError,
    Rule,
    RuleConflictError,
    SpecError,
    StateMismatchError,
    TargetError,
    center,
    entries,
    freeze_entries,
)

from .claims import same_bits


def _model() -> Any:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(18, 4))


SPEC = "0[center] = 0\n2.weight[:2]\n2.weight[2, ::3] = 1\n2.bias = -1"


def _step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(3, 1, 5, 5)).square().sum().backward()
    optimizer.step()


def test_it_is_a_mapping_from_parameter_name_to_part() -> None:
    model = _model()
    kept = model[2].weight[:2].detach().clone()
    frozen = freeze_entries(model, SPEC)
    assert list(frozen) == ["0.weight", "2.weight", "2.bias"]
    assert len(frozen) == 3
    part = frozen["2.weight"]
    assert part.frozen.dtype == torch.bool
    assert part.frozen_count == int(part.frozen.sum()) == 36 + 6
    assert part.free_count == 72 - 42
    assert same_bits(part.values, model[2].weight[part.frozen])
    assert same_bits(part.values[:36].view(2, 18), kept)
    assert part.rules == (Rule("2.weight", entries[:2]), Rule("2.weight", entries[2, ::3], 1))
    assert "1.weight" not in frozen
    assert frozen.frozen_count == 2 + 42 + 4


def test_it_prints_as_a_table() -> None:
    lines = repr(freeze_entries(_model(), SPEC)).splitlines()
    assert lines[0].split() == ["parameter", "shape", "rules", "frozen", "free"]
    assert lines[1].split() == ["0.weight", "(2,", "1,", "3,", "3)", "0[center]", "=", "0", "2", "16"]
    assert len(lines) == 4
    assert str(freeze_entries(_model(), "")) == "nothing is frozen"


@pytest.mark.parametrize(
    "spec", ["", "# nothing yet\n", [], {}, ()], ids=["text", "comment", "list", "mapping", "tuple"]
)
def test_an_empty_spec_freezes_nothing(spec: Any) -> None:
    model = _model()
    frozen = freeze_entries(model, spec)
    assert len(frozen) == 0
    _step(model, MaskedOptimizer(torch.optim.SGD(model.parameters()), frozen))


def test_a_tied_parameter_stands_under_its_first_name_and_is_found_under_both() -> None:
    model: Any = nn.ModuleDict({"embedding": nn.Embedding(4, 2), "head": nn.Linear(2, 4, bias=False)})
    model["head"].weight = model["embedding"].weight
    frozen = freeze_entries(model, "head[0] = 1\nembedding[1] = 2")
    assert list(frozen) == ["embedding.weight"]
    assert frozen["head.weight"] is frozen["embedding.weight"]
    assert frozen["head.weight"].names == ("embedding.weight", "head.weight")
    assert model["head"].weight[:2].tolist() == [[1, 1], [2, 2]]


def test_a_violation_of_one_entry_says_one_entry() -> None:
    model = _model()
    frozen = freeze_entries(model, SPEC)
    model[2].bias.data[2] = 4.0
    assert str(frozen.violations()[0]) == "`2.bias[2]` holds 4.0 instead of -1.0 (1 entry drifted)"


def test_violations_name_the_worst_entry_and_count_them() -> None:
    model = _model()
    frozen = freeze_entries(model, SPEC)
    assert frozen.violations() == ()
    model[2].bias.data[1:3] = torch.tensor([-1.5, 4.0])
    (violation,) = frozen.violations()
    assert (violation.name, violation.count, violation.index) == ("2.bias", 2, (2,))
    assert (violation.found, violation.expected) == (4.0, -1.0)
    with pytest.raises(
        DriftError, match=r"`2\.bias\[2\]` holds 4\.0 instead of -1\.0 \(2 entries drifted\); guard every"
    ):
        frozen.assert_frozen()
    frozen.impose()
    frozen.assert_frozen(guarded=False)


def test_minus_zero_and_nan_count_as_drift() -> None:
    weight = nn.Parameter(torch.zeros(2))
    frozen = freeze_entries({"weight": weight}, "weight = 0")
    weight.data[0] = -0.0
    assert frozen.violations()[0].count == 1
    weight.data[0] = torch.nan
    assert frozen.violations()[0].count == 1


def test_removed_entries_train_and_attached_ones_return_to_their_values() -> None:
    model = _model()
    frozen = freeze_entries(model, SPEC)
    kept = model[2].weight[:2].detach().clone()
    optimizer = MaskedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1), frozen)
    frozen.remove()
    assert not frozen.attached
    _step(model, optimizer)
    assert not bool((model[0].weight[:, :, 1, 1] == 0).any())
    assert frozen.attach() is frozen
    frozen.assert_frozen()
    assert same_bits(model[2].weight[:2], kept)
    _step(model, optimizer)
    frozen.assert_frozen()


def test_a_with_block_holds_inside_and_lets_go_behind() -> None:
    model = _model()
    with freeze_entries(model, SPEC) as frozen:
        assert frozen.attached
    assert not frozen.attached
    assert FrozenEntries.of(model) == ()
    with frozen:
        assert frozen.attached


def test_thawing_lets_one_parameter_go_and_holds_the_others() -> None:
    model = _model()
    frozen = freeze_entries(model, SPEC)
    optimizer = MaskedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1), frozen)
    _step(model, optimizer)
    frozen.thaw("2")
    assert list(frozen) == ["0.weight", "2.bias"]
    before = model[2].weight.detach().clone()
    _step(model, optimizer)
    assert bool((model[2].weight != before).all())
    assert model[0].weight[:, :, 1, 1].tolist() == [[0], [0]]
    frozen.thaw("*")
    assert len(frozen) == 0
    with pytest.raises(TargetError, match=r"nothing of `2\.weight` is frozen"):
        frozen.thaw("2.weight")


def test_thawing_a_removed_handle_does_not_attach_it() -> None:
    model = _model()
    frozen = freeze_entries(model, SPEC)
    frozen.remove()
    frozen.thaw("0")
    assert not frozen.attached
    assert "0.weight" not in frozen


def test_a_thawed_entry_trains_as_one_that_never_moved() -> None:
    """Decayed weights leave momentum behind at frozen entries; thawing forgets it."""
    weight = nn.Parameter(torch.ones(4))
    frozen = freeze_entries({"weight": weight}, "weight[:2] = 1")
    optimizer = MaskedOptimizer(torch.optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=0.5), frozen)
    for _ in range(5):
        weight.grad = torch.zeros(4)
        optimizer.step()
    assert bool((optimizer.state[weight]["momentum_buffer"][:2] != 0).all())
    frozen.thaw("weight")
    assert not bool(optimizer.state[weight]["momentum_buffer"][:2].any())
    assert bool((optimizer.state[weight]["momentum_buffer"][2:] != 0).all())


def test_two_handles_hold_side_by_side_and_go_in_either_order() -> None:
    for first_leaves in (True, False):
        model = _model()
        handles = [freeze_entries(model, "2.weight[0] = 1"), freeze_entries(model, "2.weight[1] = 2")]
        optimizer = MaskedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1), handles)
        _step(model, optimizer)
        assert model[2].weight[0, 0] == 1
        assert model[2].weight[1, 0] == 2
        leaving, staying = handles if first_leaves else reversed(handles)
        leaving.remove()
        _step(model, optimizer)
        staying.assert_frozen()
        assert leaving.violations()
        staying.remove()
        assert FrozenEntries.of(model) == ()


def test_a_second_handle_that_disagrees_is_refused() -> None:
    model = _model()
    freeze_entries(model, "2.weight[0] = 1")
    with pytest.raises(
        RuleConflictError, match=r"`2\.weight\[0\] = 1` and `2\.weight\[:, 3\] = 0` disagree about entry \[0, 3\]"
    ):
        freeze_entries(model, "2.weight[:, 3] = 0")
    assert len(FrozenEntries.of(model)) == 1


def test_handles_of_a_copy_are_its_own() -> None:
    model = _model()
    freeze_entries(model, SPEC)
    twin = copy.deepcopy(model)
    (handle,) = FrozenEntries.of(twin)
    handle.remove()
    assert FrozenEntries.of(twin) == ()
    assert len(FrozenEntries.of(model)) == 1


def test_a_handle_pickles_with_its_model() -> None:
    frozen = pickle.loads(pickle.dumps(freeze_entries(_model(), SPEC)))
    frozen.assert_frozen(guarded=False)
    model = frozen.model
    model[2].bias.data.zero_()
    model(torch.ones(1, 1, 5, 5))
    frozen.assert_frozen(guarded=False)
    frozen.remove()
    assert FrozenEntries.of(model) == ()


def test_dropping_the_handle_leaves_the_entries_frozen_and_nothing_leaks() -> None:
    model = _model()
    handle = weakref.ref(freeze_entries(model, SPEC))
    gc.collect()
    assert handle() is None
    model[2].bias.data.zero_()
    model(torch.ones(1, 1, 5, 5))
    assert model[2].bias.tolist() == [-1] * 4
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_guarded_optimizer_is_not_kept_alive_by_the_handle() -> None:
    model = _model()
    frozen = freeze_entries(model, SPEC)
    optimizer = MaskedOptimizer(torch.optim.SGD(model.parameters()), frozen)
    inner = weakref.ref(optimizer.inner)
    del optimizer
    gc.collect()
    assert inner() is None


def test_bare_tensors_are_held_through_gradients_and_steps() -> None:
    tensors = {"a": torch.randn(3, 3, requires_grad=True), "b": torch.randn(2, requires_grad=True)}
    frozen = freeze_entries(tensors, {"a": (entries[0], 0.5), "b": entries[1]})
    optimizer = MaskedOptimizer(torch.optim.AdamW(tensors.values(), lr=0.1, weight_decay=0.1), frozen)
    for _ in range(5):
        optimizer.zero_grad()
        (tensors["a"].square().sum() + tensors["b"].sum()).backward()
        assert tensors["a"].grad is not None
        assert not bool(tensors["a"].grad[0].any())
        optimizer.step()
        frozen.assert_frozen()
    assert tensors["a"][0].tolist() == [0.5] * 3


def test_state_survives_weights_only_loading_and_carries_regions_and_kept_values() -> None:
    first, second = _model(), _model()
    spec = "2.weight[smallest(0.5)]\n0[center] = 0"
    saved = freeze_entries(first, spec)
    stream = io.BytesIO()
    torch.save(saved.state_dict(), stream)
    stream.seek(0)
    state = torch.load(stream, weights_only=True)
    frozen = freeze_entries(second, spec, state=state)
    assert frozen["2.weight"].frozen.equal(saved["2.weight"].frozen)
    assert same_bits(frozen["2.weight"].values, saved["2.weight"].values)
    assert same_bits(second[2].weight[frozen["2.weight"].frozen], saved["2.weight"].values)

    third = _model()
    loaded = freeze_entries(third, spec)
    loaded.load_state_dict(state)
    assert same_bits(loaded["2.weight"].values, saved["2.weight"].values)
    loaded.assert_frozen(guarded=False)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("0[center] = 1", r"for `0\.weight` it says `0\[center\] = 0` .* the present rules say `0\[center\] = 1`"),
        ("0[center] = 0\n2.bias", r"for `2\.bias` it says nothing, the present rules say `2\.bias = keep`"),
    ],
    ids=["other_value", "other_parameter"],
)
def test_a_state_saved_under_other_rules_is_refused_and_changes_nothing(spec: str, message: str) -> None:
    state = freeze_entries(_model(), "0[center] = 0").state_dict()
    model = _model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StateMismatchError, match=message):
        freeze_entries(model, spec, state=state)
    assert FrozenEntries.of(model) == ()
    assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("given", [torch.Tensor.clone, lambda mask: mask.cpu().numpy()], ids=["tensors", "arrays"])
def test_a_state_saved_with_another_mask_or_tensor_is_refused(given: Any) -> None:
    mask = torch.eye(4, 18).bool()
    state = freeze_entries(_model(), {"2.weight": given(mask)}).state_dict()
    with pytest.raises(StateMismatchError, match=r"rule `2\.weight\[<.*: it was saved with another mask"):
        freeze_entries(_model(), {"2.weight": given(~mask)}, state=state)
    state = freeze_entries(_model(), {"2.bias": (entries[:], given(torch.arange(4.0)))}).state_dict()
    with pytest.raises(StateMismatchError, match=r"it was saved with other values \(parameter `2\.bias`\); use"):
        freeze_entries(_model(), {"2.bias": (entries[:], given(torch.ones(4)))}, state=state)


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.pop("parameters"),
        lambda state: state["parameters"]["2.weight"]["constraints"][0].pop("entries"),
        lambda state: state["parameters"]["2.weight"]["constraints"].pop(),
        lambda state: state["parameters"]["2.weight"]["constraints"][0].update(value=torch.ones(3)),
        lambda state: state.update(format=99),
        lambda state: state["parameters"]["2.weight"].update(shape=[4, 17]),
    ],
    ids=["no_parameters", "no_entries", "too_few_constraints", "wrong_values", "other_format", "other_shape"],
)
def test_a_damaged_state_is_refused_and_changes_nothing(damage: Any) -> None:
    frozen = freeze_entries(_model(), SPEC)
    values = frozen["2.weight"].values
    state = frozen.state_dict()
    damage(state)
    with pytest.raises(StateMismatchError):
        frozen.load_state_dict(state)
    assert same_bits(frozen["2.weight"].values, values)
    frozen.assert_frozen(guarded=False)


def test_memory_that_runs_out_is_not_called_a_state_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = freeze_entries(_model(), SPEC)
    state = frozen.state_dict()

    def fail(*args: Any) -> Any:
        raise torch.OutOfMemoryError("on purpose")

    monkeypatch.setattr("freezehooks._held.fixed.EntrySet.from_state", fail)
    with pytest.raises(torch.OutOfMemoryError, match="on purpose"):
        frozen.load_state_dict(state)


def test_optimizers_may_be_guarded_while_another_thread_checks() -> None:
    model = _model()
    frozen = freeze_entries(model, SPEC)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1)]
    frozen.guard(optimizers[0])
    wrong: list[Exception] = []

    def guard() -> None:
        for _ in range(200):
            optimizers.append(torch.optim.SGD(model.parameters(), lr=0.1))
            frozen.guard(optimizers[-1])

    thread = threading.Thread(target=guard)
    thread.start()
    while thread.is_alive():
        try:
            frozen.assert_frozen()
        except Exception as error:
            wrong.append(error)
    thread.join()
    assert wrong == []


def test_a_copied_optimizer_is_guarded_for_every_handle_that_guarded_it() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    first, second = freeze_entries(model, "0.weight[0] = 0"), freeze_entries(model, "1.weight[0]")
    optimizer = MaskedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5), first)
    second.guard(optimizer.inner)
    twin, copied = copy.deepcopy((model, optimizer))
    for _ in range(2):
        twin(torch.ones(1, 3)).square().sum().backward()
        copied.step()
        for handle in FrozenEntries.of(twin):
            handle.assert_frozen()
    assert len(FrozenEntries.of(twin)) == 2


def test_a_model_of_another_kind_is_refused() -> None:
    with pytest.raises(SpecError, match="`model` must be a module or a mapping from name to tensor, found list"):
        freeze_entries([torch.ones(1)], "a")  # type: ignore[arg-type]  # on purpose


def test_guarding_twice_is_guarding_once_and_a_guard_can_be_removed() -> None:
    model = _model()
    frozen = freeze_entries(model, Rule("0", center, 0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    guard = frozen.guard(optimizer)
    assert frozen.guard(optimizer) is guard
    assert len(optimizer._optimizer_step_post_hooks) == 1  # type: ignore[attr-defined]  # undeclared
    guard.remove()
    assert not optimizer._optimizer_step_post_hooks  # type: ignore[attr-defined]  # undeclared
    frozen.guard(optimizer)
    assert len(optimizer._optimizer_step_post_hooks) == 1  # type: ignore[attr-defined]  # undeclared


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    frozen = freeze_entries(_model(), SPEC)
    with pytest.raises(
        OptimizerMismatchError, match=r"`SGD` steps none of the frozen parameters \(0\.weight, 2\.weight"
    ):
        frozen.guard(torch.optim.SGD(_model().parameters()))
    with pytest.raises(SpecError, match=r"`optimizer` must be a torch\.optim\.Optimizer, found str"):
        frozen.guard("adam")  # type: ignore[arg-type]  # on purpose


def test_zeros_are_taken_from_the_state_where_a_fresh_model_has_none() -> None:
    pruned = nn.Linear(4, 4)
    pruned.weight.data[0] = 0
    state = freeze_entries(pruned, "weight[zeros]").state_dict()
    fresh = nn.Linear(4, 4)
    freeze_entries(fresh, "weight[zeros]", state=state)
    assert fresh.weight[0].tolist() == [0] * 4


def test_a_state_loaded_into_a_handle_cleans_gradients_and_moments() -> None:
    model, other = nn.Linear(4, 4), nn.Linear(4, 4)
    state = freeze_entries(other, "weight[smallest(0.5)] = 0").state_dict()
    frozen = freeze_entries(model, "weight[smallest(0.5)] = 0")
    optimizer = MaskedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), frozen)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    frozen.load_state_dict(state)
    held = frozen["weight"].frozen
    assert model.weight.grad is not None
    assert not bool(model.weight.grad[held].any())
    assert not bool(optimizer.state[model.weight]["momentum_buffer"][held].any())


def test_a_copy_inside_another_module_loads_its_own_state() -> None:
    model = nn.Linear(4, 4)
    freeze_entries(model, "weight[0]")
    (handle,) = FrozenEntries.of(torch.optim.swa_utils.AveragedModel(model))
    handle.load_state_dict(handle.state_dict())
    handle.assert_frozen(guarded=False)


def test_a_second_handle_that_disagrees_is_refused_on_bare_tensors_and_when_attached_again() -> None:
    weight = nn.Parameter(torch.zeros(3))
    first = freeze_entries({"weight": weight}, "weight[0] = 1")
    with pytest.raises(RuleConflictError, match="disagree"):
        freeze_entries({"w": weight}, "w[0] = 2")
    first.remove()
    freeze_entries({"w": weight}, "w[0] = 2")
    with pytest.raises(RuleConflictError, match=r"`w\[0\] = 2` and `weight\[0\] = 1` disagree about entry \[0\]"):
        first.attach()
    assert not first.attached
    assert weight.tolist() == [2, 0, 0]


def test_a_kept_entry_may_not_be_another_handles_number_even_where_they_are_equal_now() -> None:
    model = nn.Linear(2, 2)
    model.weight.data.zero_()
    freeze_entries(model, "weight[zeros]")
    with pytest.raises(RuleConflictError, match="disagree"):
        freeze_entries(model, "weight[0] = 0")


def test_within_one_handle_a_load_gives_the_kept_entry_the_number() -> None:
    model = nn.Linear(2, 2)
    model.weight.data.zero_()
    frozen = freeze_entries(model, "weight[zeros]\nweight[0] = 0")
    model.load_state_dict({"weight": torch.full((2, 2), 3.0), "bias": torch.zeros(2)})
    assert model.weight.tolist() == [[0, 0], [3, 3]]
    frozen.assert_frozen(guarded=False)


def test_parameters_tied_after_freezing_hold_both_parts() -> None:
    model: Any = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    frozen = freeze_entries(model, "a[0] = 0\nb[1] = 1")
    model["b"].weight = model["a"].weight
    with pytest.warns(UserWarning, match=r"`b\.weight` was replaced"):
        optimizer = MaskedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1), frozen)
    model["a"].weight.grad = torch.ones(2, 2)
    optimizer.step()
    assert model["a"].weight.tolist() == [[0, 0], [1, 1]]


def test_zero_and_minus_zero_are_two_values() -> None:
    with pytest.raises(RuleConflictError, match=r"`weight = 0` and `weight = -0` disagree"):
        freeze_entries(nn.Linear(2, 2), "weight = 0\nweight = -0")


def test_a_handle_knows_when_another_of_the_same_entries_removed_the_hooks() -> None:
    model = nn.Linear(2, 2)
    frozen = freeze_entries(model, "weight[0] = 1")
    (found,) = FrozenEntries.of(model)
    found.remove()
    assert not frozen.attached
    frozen.attach()
    model.weight.data.zero_()
    model(torch.ones(1, 2))
    assert model.weight[0].tolist() == [1, 1]


@pytest.mark.parametrize("names", [("w_q", "w_v"), ("x", "x_orig"), ("k_g", "k_v")], ids=["v", "orig", "g_and_v"])
def test_ordinary_names_that_end_like_renamed_ones_freeze(names: tuple[str, str]) -> None:
    model = nn.Module()
    for name in names:
        model.register_parameter(name, nn.Parameter(torch.ones(2)))
    assert list(freeze_entries(model, "*[0] = 0")) == list(names)


def test_an_optimizer_without_hooks_is_refused_each_time() -> None:
    class Bare(torch.optim.Optimizer):
        def __init__(self, parameters: list[torch.Tensor]) -> None:
            self.param_groups = [{"params": parameters}]
            self.state = {}  # type: ignore[assignment]  # as such classes do

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            """Do nothing."""

    model = nn.Linear(2, 2)
    frozen = freeze_entries(model, "weight[0]")
    for _ in range(2):
        with pytest.raises(SpecError, match=r"`Bare` has no step hooks: .*; call super\(\).__init__"):
            frozen.guard(Bare(list(model.parameters())))


def test_a_sequence_of_handles_is_taken_whole_or_not_at_all() -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    handles = [freeze_entries(each, "weight[0]") for each in (model, other)]
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(OptimizerMismatchError):
        MaskedOptimizer(optimizer, handles)
    assert not optimizer._optimizer_step_post_hooks  # type: ignore[attr-defined]  # undeclared


def test_state_that_only_shares_a_name_with_weights_is_left_alone() -> None:
    class Follow(torch.optim.SGD):
        """An optimizer whose state has a number under the name of schedule-free's weights."""

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            """Count steps under that name."""
            for parameter in self.param_groups[0]["params"]:
                self.state[parameter]["z"] = self.state[parameter].get("z", 0) + 1
                self.state[parameter]["ax"] = None

    model = nn.Linear(2, 2)
    optimizer = MaskedOptimizer(Follow(model.parameters()), freeze_entries(model, "weight[0]"))
    optimizer.step()
    optimizer.step()
    assert optimizer.state[model.weight]["z"] == 2


def test_thawing_one_parameter_works_where_another_is_broken() -> None:
    model: Any = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    frozen = freeze_entries(model, "*.weight[0] = 0")
    del model["a"].weight
    frozen.thaw("b")
    assert list(frozen) == ["a.weight"]
    model["b"](torch.ones(1, 2)).sum().backward()
    assert bool((model["b"].weight.grad != 0).all())


def test_a_slice_and_a_list_of_its_integers_are_two_rules() -> None:
    frozen = freeze_entries(nn.Linear(4, 4), "weight[0:1:2] = 0\nweight[[0, 1, 2]] = 0")
    assert frozen["weight"].frozen_count == 12


def test_a_function_is_asked_once() -> None:
    calls: list[torch.Tensor] = []

    def region(parameter: torch.Tensor) -> torch.Tensor:
        calls.append(parameter)
        return torch.rand(4, 4) < 0.5

    model = nn.Linear(4, 4)
    frozen = freeze_entries(model, {"weight": (region, torch.tensor(1.0))})
    assert len(calls) == 1
    assert bool((frozen["weight"].values == 1).all())


def test_a_tensor_value_is_compared_with_the_saved_one_under_any_region() -> None:
    state = freeze_entries(_model(), {"0": (center, torch.tensor(1.0))}).state_dict()
    with pytest.raises(StateMismatchError, match="it was saved with other values"):
        freeze_entries(_model(), {"0": (center, torch.tensor(2.0))}, state=state)


def test_a_number_is_the_rules_to_say_and_not_the_states() -> None:
    frozen = freeze_entries(_model(), "0[center] = 0")
    state = frozen.state_dict()
    state["parameters"]["0.weight"]["constraints"][0]["value"] = 5.0
    frozen.load_state_dict(state)
    assert frozen["0.weight"].values.tolist() == [0, 0]


def test_thawing_the_last_parameter_takes_off_the_optimizers_hooks() -> None:
    model = _model()
    optimizer = torch.optim.SGD(model.parameters())
    frozen = freeze_entries(model, "2.bias = 1")
    frozen.guard(optimizer)
    frozen.thaw("2.bias")
    assert not frozen.attached
    assert not optimizer._optimizer_step_post_hooks  # type: ignore[attr-defined]  # undeclared


def test_values_have_the_dtype_of_parameters_that_a_load_assigned() -> None:
    model = nn.Linear(2, 2)
    frozen = freeze_entries(model, "weight[0]")
    model.load_state_dict({name: value.double() for name, value in model.state_dict().items()}, assign=True)
    assert frozen["weight"].values.dtype == torch.float64


def test_a_module_that_was_replaced_is_reported() -> None:
    model = _model()
    frozen = freeze_entries(model, "0[center] = 0\n2.weight[0] = 0.5")
    model[2] = nn.Linear(18, 4)
    for ask in (frozen.assert_frozen, lambda: frozen.guard(torch.optim.SGD(model.parameters()))):
        with pytest.raises(ParameterChangedError, match=r"the Linear that owned `2\.weight` is no longer"):
            ask()
    frozen.remove()
    with pytest.raises(ParameterChangedError, match="call remove"):
        frozen.attach()


def test_a_module_that_was_wrapped_is_still_held() -> None:
    model = _model()
    frozen = freeze_entries(model, "2.weight[0] = 0.5")
    model[2] = nn.Sequential(model[2])
    model[2][0].weight.data.zero_()
    model(torch.ones(1, 1, 5, 5))
    frozen.assert_frozen(guarded=False)


def test_a_pruning_mask_over_a_value_counts_as_drift() -> None:
    model = nn.Linear(3, 2)
    frozen = freeze_entries(model, "weight[0] = 0.5\nweight[1] = 0")
    prune.custom_from_mask(model, "weight", torch.tensor([[1, 0, 1], [0, 1, 1]]))
    (violation,) = frozen.violations()
    assert (violation.count, violation.index, violation.found, violation.expected) == (1, (0, 1), 0.0, 0.5)


def test_a_spectral_norm_put_on_later_is_refused() -> None:
    model = nn.Linear(3, 2)
    freeze_entries(model, "weight[0] = 0.5")
    torch.nn.utils.spectral_norm(model)
    with pytest.raises(ParameterChangedError, match="`weight` is gone from Linear"):
        model(torch.ones(1, 3))


def test_a_part_shows_what_it_is() -> None:
    frozen = freeze_entries(nn.Linear(3, 2), "weight[0] = 1")
    assert repr(frozen["weight"]) == "FrozenParameter('weight', shape=(2, 3), frozen=3, free=3)"


class _Namesakes(nn.Module):
    """A parameter, and another whose name differs by that of a wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 2)
        self.module = nn.ModuleDict({"a": nn.Linear(2, 2)})


def test_names_that_differ_by_a_wrapper_are_told_apart() -> None:
    model = _Namesakes()
    frozen = freeze_entries(model, "*a.weight[0]")
    assert [frozen[name].name for name in frozen] == ["a.weight", "module.a.weight"]
    kept = [frozen[name].values for name in frozen]
    frozen.load_state_dict(frozen.state_dict())
    assert all(same_bits(frozen[name].values, values) for name, values in zip(frozen, kept, strict=True))
    frozen.thaw("module.a.weight")
    assert list(frozen) == ["a.weight"]


@pytest.mark.parametrize(
    "wrapper", ["module", "_orig_mod", "_module", "base_model.model", "head.modules_to_save.default"]
)
def test_names_of_wrappers_may_be_left_out_or_written_where_there_are_none(wrapper: str) -> None:
    wrapped: nn.Module = nn.Linear(2, 2)
    for part in reversed(wrapper.split(".")):
        wrapped = nn.ModuleDict({part: wrapped})
    name, plain = f"{wrapper}.weight", f"{'head.' if 'head' in wrapper else ''}weight"
    frozen = freeze_entries(wrapped, f"{plain}[0]")
    assert list(frozen) == [name]
    assert frozen[plain].name == name
    model = nn.ModuleDict({"head": nn.Linear(2, 2)}) if "head" in wrapper else nn.Linear(2, 2)
    assert list(freeze_entries(model, f"{name}[0]", state=frozen.state_dict())) == [plain]


@pytest.mark.parametrize("compact", [False, True])
def test_a_handle_whose_parameters_require_no_gradient_is_passed_over(compact: bool) -> None:
    model = _model()
    handles = [freeze_entries(model, "2.weight[0] = 1"), freeze_entries(model, "0.weight[0] = 1")]
    model[2].requires_grad_(False)
    optimizer = MaskedOptimizer(torch.optim.SGD(model[0].parameters(), lr=0.1), handles, compact=compact)
    _step(model, optimizer)
    for handle in handles:
        handle.assert_frozen()
    model[2].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[2].parameters()), "weight_decay": 0.1})
    _step(model, optimizer)
    for handle in handles:
        handle.assert_frozen()


def test_a_found_handle_has_the_names_of_the_model_that_is_asked_about() -> None:
    net = _model()
    frozen = freeze_entries(net, "2.weight[0] = 1\n0.weight[0] = 2")
    outer: Any = nn.ModuleDict({"net": copy.deepcopy(net)})
    (found,) = FrozenEntries.of(outer)
    (part,) = FrozenEntries.of(outer["net"][2])
    assert list(frozen) == ["2.weight", "0.weight"]
    assert list(found) == ["net.0.weight", "net.2.weight"]
    assert list(part) == ["weight"]
    outer["net"][2].weight.data.fill_(3)
    assert [each.name for each in found.violations()] == ["net.2.weight"]
    found.impose()
    assert [name for name, _ in found.report().parts.items()] == list(found)
    found.thaw("net.2.weight[0, :1]")
    assert found["net.2.weight"].frozen_count == frozen["2.weight"].frozen_count - 1
    found.thaw("net.0.weight")
    assert list(found) == ["net.2.weight"]


def test_a_name_without_its_wrapper_that_fits_two_parameters_is_refused() -> None:
    model = nn.ModuleDict({"module": nn.Linear(2, 2), "_orig_mod": nn.Linear(2, 2)})
    with pytest.raises(TargetError, match=r"`weight` may be `module\.weight` or `_orig_mod\.weight`"):
        freeze_entries(model, "weight = 0")


def test_a_copys_handle_that_was_removed_and_attached_leaves_no_hook() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    freeze_entries(model, "0.weight[0]")
    twin = copy.deepcopy(model)
    (frozen,) = FrozenEntries.of(twin)
    frozen.remove()
    frozen.attach()
    frozen.remove()
    assert not any(module._forward_pre_hooks for module in twin.modules())
