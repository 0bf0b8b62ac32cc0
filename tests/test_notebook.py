"""Notebooks: cells that run twice, handles that were removed, wrong arguments, tools that walk through data."""

from __future__ import annotations

import collections.abc
import copy
import math
import pickle
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from freezehooks import (
    FreezeError,
    FrozenEntries,
    FrozenValueError,
    MaskedOptimizer,
    RegionError,
    Rule,
    RuleConflictError,
    RuleSyntaxError,
    SpecError,
    TargetError,
    UnguardedError,
    UnsupportedOptimizerError,
    center,
    diagonal,
    entries,
    freeze_entries,
    nm,
    parse_region,
    parse_rule,
    smallest,
    tied,
    triu,
)

from .claims import same_bits


def _model() -> Any:
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


def _step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()


# --------------------------------------------------------------------------------------------------------------------
# The cell that freezes, run twice

HELD_ALREADY: Final = r"^8 entries are held by an earlier handle already \(4 of `0\.weight`, 4 of `1\.weight`\)"
WAY_OUT: Final = r"`for f in FrozenEntries\.of\(model\): f\.remove\(\)`.*freeze_entries\(\.\.\., replace=True\)"


def test_freezing_what_an_earlier_handle_holds_warns_with_the_count_and_the_way_out() -> None:
    model = _model()
    freeze_entries(model, "0.weight[0] = 1\n1.weight[:, :2] = 0")
    with pytest.warns(UserWarning, match=f"{HELD_ALREADY}.*{WAY_OUT}") as caught:
        freeze_entries(model, "0.weight[:2] = 1\n1.weight[:, :2] = 0")
    assert caught[0].filename == __file__


def test_one_entry_that_is_held_already_is_one_entry() -> None:
    model = _model()
    freeze_entries(model, "0.weight[0] = 1")
    with pytest.warns(UserWarning, match=r"^1 entry is held by an earlier handle already \(1 of `0\.weight`\)"):
        freeze_entries(model, "0.weight[0, 1] = 1\n0.weight[1] = 3")


def test_entries_beside_those_of_an_earlier_handle_are_frozen_without_a_word() -> None:
    model = _model()
    freeze_entries(model, "0.weight[0] = 1")
    freeze_entries(model, "0.weight[1] = 1\n1.weight = 0")


def test_a_warning_that_is_an_error_leaves_the_model_as_it_was() -> None:
    model = _model()
    freeze_entries(model, "0.weight[0] = 1")
    before = model[1].weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="held by an earlier handle"):
            freeze_entries(model, "0.weight[0] = 1\n1.weight[0] = 7")
    assert same_bits(model[1].weight, before)
    assert len(FrozenEntries.of(model)) == 1


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "without gradients"])
def test_free_entries_are_counted_over_all_handles(trained: bool) -> None:
    model = _model().requires_grad_(trained)
    first, second = freeze_entries(model, "0.weight[0] = 1"), freeze_entries(model, "0.weight[1] = 2")
    for handle in (first, second):
        assert (handle["0.weight"].frozen_count, handle["0.weight"].free_count) == (4, 4)
        assert [part.free_count for part in handle.values()] == [4]
        assert repr(handle).splitlines()[1].split()[-2:] == ["4", "4"]
        assert handle.report().parts["0.weight"].free == 4
    second.remove()
    assert first["0.weight"].free_count == 8


def test_entries_that_two_handles_hold_are_counted_once() -> None:
    model = _model()
    first = freeze_entries(model, "0.weight[0] = 1")
    with pytest.warns(UserWarning, match="4 entries are held"):
        second = freeze_entries(model, "0.weight[:2] = 1")
    assert first["0.weight"].free_count == second["0.weight"].free_count == 4
    assert first.trainable().trainable == 4 + 3 + 8


def test_free_entries_of_a_tied_parameter_are_counted_under_either_name() -> None:
    model: Any = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    model["b"].weight = model["a"].weight
    freeze_entries(model, "a[0] = 1")
    assert freeze_entries(model["b"], "weight[1] = 1")["weight"].free_count == 0


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "without gradients"])
def test_a_conflict_with_an_earlier_handle_says_so_with_the_way_out(trained: bool) -> None:
    model = _model().requires_grad_(trained)
    freeze_entries(model, "0.weight[0] = 1")
    message = (
        r"^an earlier handle holds `0\.weight` at other values: rules `0\.weight\[0\] = 1` and `0\.weight\[:, 1\] = 2` "
        r"disagree about entry \[0, 1\]"
    )
    with pytest.raises(RuleConflictError, match=f"{message}.*{WAY_OUT}"):
        freeze_entries(model, "0.weight[:, 1] = 2")


def test_the_way_out_is_one() -> None:
    model = _model()
    freeze_entries(model, "0.weight[0] = 1")
    for f in FrozenEntries.of(model):
        f.remove()
    freeze_entries(model, "0.weight[0] = 2").assert_frozen(guarded=False)


# replace=True


def test_replacing_drops_what_earlier_handles_hold_of_the_same_parameters_alone() -> None:
    model = _model()
    earlier = freeze_entries(model, "0.weight[0] = 1\n1.weight[0] = 2")
    later = freeze_entries(model, "0.weight[1] = 3", replace=True)
    assert list(earlier) == ["1.weight"]
    assert later["0.weight"].free_count == 8
    _step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert bool((model[0].weight[0] != 1).all())
    model(torch.ones(1, 4))
    assert model[0].weight[1].tolist() == [3] * 4
    assert model[1].weight[0].tolist() == [2] * 3
    assert earlier.attached
    earlier.assert_frozen(guarded=False)
    assert len(FrozenEntries.of(model)) == 2


def test_a_cell_with_replace_may_run_any_number_of_times() -> None:
    model = _model()
    for number in (1, 2, 2, 3):
        frozen = freeze_entries(model, f"0.weight[0] = {number}\n1.bias = {number}", replace=True)
        assert FrozenEntries.of(model)[0].rules == frozen.rules
        assert len(FrozenEntries.of(model)) == 1
        model(torch.ones(1, 4))
        assert model[0].weight[0].tolist() == [number] * 4
    frozen.remove()
    assert not any(module._forward_pre_hooks or module._state_dict_pre_hooks for module in model.modules())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_a_handle_of_which_all_was_replaced_says_removed_and_holds_nothing() -> None:
    model = _model()
    earlier = freeze_entries(model, "0.weight[0] = 1")
    freeze_entries(model, "0.weight[0] = 2", replace=True)
    assert not earlier.attached
    assert len(earlier) == 0
    assert repr(earlier) == str(earlier.report()) == "removed: another handle has thawed all of it"
    with pytest.raises(UnguardedError, match=r"^removed: another handle has thawed all of it; freeze again$"):
        earlier.assert_frozen()
    for leave in (earlier.remove, earlier.impose, lambda: earlier.__exit__(None, None, None)):
        leave()  # as a callback does when its epoch has come
    assert model[0].weight[0].tolist() == [2] * 4


@pytest.mark.parametrize("compact", [False, True], ids=["mask", "compact"])
def test_optimizers_that_the_earlier_handle_guarded_are_guarded_by_the_one_in_its_place(compact: bool) -> None:
    model = _model()
    earlier = freeze_entries(model, "0.weight[0] = 1\n1.weight[0] = 2")
    optimizer = MaskedOptimizer(
        torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5), earlier, compact=compact
    )
    _step(model, optimizer)
    later = freeze_entries(model, "0.weight[1:] = 3", replace=True)
    for _ in range(2):
        _step(model, optimizer)
        later.assert_frozen()
        earlier.assert_frozen()
    assert optimizer.state[model[0].weight]["exp_avg"].numel() == (4 if compact else 12)
    later.remove()
    earlier.remove()
    _step(model, optimizer)
    assert (model[0].weight != 3).all()
    assert (model[1].weight != 2).all()


def test_the_same_parameters_of_bare_tensors_are_replaced_too() -> None:
    weight = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1, weight_decay=0.5)
    freeze_entries({"weight": weight}, "weight[0] = 1").guard(optimizer)
    later = freeze_entries({"w": weight}, "w[1] = 2", replace=True)
    weight.grad = torch.ones(3)
    optimizer.step()
    assert weight[0].item() != 1
    later.assert_frozen()


def test_the_handle_of_a_copied_model_is_replaced() -> None:
    model = _model()
    original = freeze_entries(model, "0.weight[0] = 1")
    twin = copy.deepcopy(model)
    freeze_entries(twin, "0.weight[0] = 2", replace=True)
    assert twin[0].weight[0].tolist() == [2] * 4
    original.assert_frozen(guarded=False)


@pytest.mark.parametrize(
    "spec",
    [
        "0.weight[9] = 0",
        "0.weight[0] = 1\n0.weight[0] = 2",
        "0.weight = tied(0)",
        "2.weight = 0",
        7,
        "0.weight[0] = 1e99",
    ],
    ids=["region", "rules that disagree", "copies that differ", "target", "spec", "value"],
)
def test_a_refused_spec_replaces_nothing(spec: Any) -> None:
    model = _model()
    earlier = freeze_entries(model, "0.weight[0] = 1")
    optimizer = MaskedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1), earlier)
    _step(model, optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(FreezeError):
        freeze_entries(model, spec, replace=True)
    assert str(before) == str(optimizer.state_dict())
    earlier.assert_frozen()
    assert len(FrozenEntries.of(model)) == 1


def test_an_earlier_handle_stays_where_a_compact_optimizer_of_it_cannot_take_the_new_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = _model()
    earlier = freeze_entries(model, "0.weight[0] = 1")
    optimizer = MaskedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1), earlier, compact=True)

    def refuse(*args: Any) -> None:
        raise UnsupportedOptimizerError("on purpose")

    monkeypatch.setattr("freezehooks._handle.check_elementwise", refuse)
    with pytest.raises(UnsupportedOptimizerError, match="on purpose"):
        freeze_entries(model, "0.weight[1] = 1", replace=True)
    _step(model, optimizer)
    earlier.assert_frozen()


def test_replacing_where_nothing_is_held_is_freezing() -> None:
    model = _model()
    freeze_entries(model, "0.weight[0] = 1").remove()
    freeze_entries(model, "0.weight[0] = 2", replace=True).assert_frozen(guarded=False)


# --------------------------------------------------------------------------------------------------------------------
# A handle that was removed


def test_a_removed_handle_says_so_wherever_it_is_asked() -> None:
    frozen = freeze_entries(_model(), "0.weight[0] = 1")
    frozen.remove()
    assert repr(frozen).splitlines()[-1] == "removed: none of it is held"
    report = frozen.report()
    assert report.removed == "removed: none of it is held"
    assert not report.holds
    assert str(report).splitlines()[-1].startswith("removed: none of it is held; missing: the gradient hook")
    assert "<p>removed: none of it is held" in report._repr_html_()
    with pytest.raises(UnguardedError, match=r"^removed: none of it is held, so missing is .*frozen\.attach\(\)$"):
        frozen.assert_frozen(guarded=False)


def test_a_handle_that_is_attached_again_no_longer_says_removed() -> None:
    frozen = freeze_entries(_model(), "0.weight[0] = 1")
    frozen.remove()
    frozen.attach()
    assert "removed" not in repr(frozen) + str(frozen.report())
    frozen.assert_frozen(guarded=False)


def test_drift_of_a_removed_handle_says_removed_too() -> None:
    model = _model()
    frozen = freeze_entries(model, "0.weight[0] = 1")
    frozen.remove()
    model[0].weight.data.zero_()
    with pytest.raises(
        FreezeError, match=r"^removed: none of it is held, so frozen entries drifted: `0\.weight\[0, 0\]`"
    ):
        frozen.assert_frozen()


def test_a_handle_of_which_another_let_a_part_go_names_it_and_holds_it_again() -> None:
    model = _model()
    frozen = freeze_entries(model, "0.weight[0] = 1\n1.weight[0] = 2")
    FrozenEntries.of(model[1])[0].remove()
    assert repr(frozen).splitlines()[-1] == "removed: `1.weight`"
    assert not frozen.attached
    frozen.attach()
    model[1].weight.data.zero_()
    model(torch.ones(1, 4))
    frozen.assert_frozen(guarded=False)
    frozen.remove()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_handle_of_which_another_thawed_a_part_holds_the_rest() -> None:
    model = _model()
    frozen = freeze_entries(model, "0.weight[0] = 1\n1.weight[0] = 2")
    FrozenEntries.of(model)[0].thaw("1.weight")
    assert frozen.attached
    assert "removed" not in repr(frozen)


def test_a_handle_of_which_all_was_thawed_has_nothing_to_hold() -> None:
    frozen = freeze_entries(_model(), "0.weight[0] = 1")
    frozen.thaw("*")
    assert repr(frozen) == "nothing is frozen"
    frozen.assert_frozen()


# --------------------------------------------------------------------------------------------------------------------
# Accurate messages


def test_a_rule_on_a_tensor_that_is_neither_says_so() -> None:
    model = _model()
    model[0].scale = torch.ones(3)
    with pytest.raises(
        TargetError, match=r"`0\.scale` is a plain tensor and not a parameter.* or make it an nn\.Parameter"
    ):
        freeze_entries(model, "0.scale = 0")


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTM(3, 3, bidirectional=True, proj_size=2), nn.GRU(3, 3)
        self.lstm_cell, self.gru_cell, self.plain = nn.LSTMCell(3, 3), nn.GRUCell(3, 3), nn.RNN(3, 3)
        self.attention = nn.MultiheadAttention(3, 1)


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (
            "lstm.weight_hh_l0[diagonal]",
            r"`lstm\.weight_hh_l0` stacks 4 gates of shape \(3, 2\).*`each\(4, diagonal\)`",
        ),
        ("lstm.weight_ih_l0_reverse[~triu(1)] = 0", r"stacks 4 gates of shape \(3, 3\), and `triu\(1\)`"),
        ("gru.weight_hh_l0[0 | tril(-1)]", r"stacks 3 gates of shape \(3, 3\), and `tril\(-1\)`"),
        ("lstm_cell.weight_hh[triu & ~diagonal]", "stacks 4 gates"),
        ("gru_cell.weight_ih[zeros | diagonal]", "stacks 3 gates"),
        ("attention.in_proj_weight[tril]", "stacks 3 projections"),
    ],
)
def test_a_matrix_pattern_on_stacked_gates_warns(rule: str, says: str) -> None:
    with pytest.warns(UserWarning, match=f"{says}.* for the same in each$") as caught:
        freeze_entries(_Recurrent(), rule)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    "rule",
    ["lstm.weight_hh_l0[(0:3) & diagonal]", "plain.weight_hh_l0[diagonal]", "lstm.weight_hr_l0[diagonal]",
     "lstm.weight_hh_l0[0:3] = 0", "attention.out_proj.weight[triu(1)] = 0"],
)  # fmt: skip
def test_one_matrix_is_frozen_without_a_word(rule: str) -> None:
    freeze_entries(_Recurrent(), rule)


def test_the_rule_that_the_warning_tells_of_freezes_every_gate() -> None:
    model = nn.LSTM(3, 3)
    frozen = freeze_entries(model, "weight_hh_l0[each(4, diagonal)] = 0")
    assert frozen["weight_hh_l0"].frozen_count == 12


# --------------------------------------------------------------------------------------------------------------------
# Rubbish


class _Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __index__(self) -> int:
        raise RuntimeError("no index")

    @property
    def shape(self) -> Any:
        raise RuntimeError("no shape")


def _quietly(make: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


RUBBISH: Final[dict[str, Any]] = {
    "None": None, "number": 3.5, "nan": math.nan, "inf": math.inf, "truth": True, "huge": 10**400, "vast": 10**5000,
    "minus vast": -(10**5000), "bytes": b"0[0]", "empty": "", "space": " ", "nul": "\0", "list": [1.0],
    "dict": {"a": 1}, "set": {1}, "object": object(), "unprintable": _Unprintable(), "type": int,
    "no arguments": lambda: 0, "complex": 1j, "complex nan": complex("nan"),
    "numpy float": np.float32(2), "numpy int": np.int64(9), "numpy bool": np.bool_(True),
    "numpy complex": np.complex64(1j),
    "numpy text": np.str_("a"), "numpy nan": np.float64("nan"), "numpy array": np.ones((3, 4)),
    "numpy mask": np.ones((3, 4), bool),
    "numpy objects": np.array([None, "x"], dtype=object), "nan tensor": torch.full((3, 4), math.nan),
    "complex tensor": torch.ones(3, 4, dtype=torch.complex64), "bool tensor": torch.zeros(3, 4, dtype=torch.bool),
    "large tensor": torch.ones(2, 2, 2, 2), "scalar nan": torch.tensor(math.nan),
    "quantized": _quietly(lambda: torch.quantize_per_tensor(torch.ones(3, 4), 0.1, 0, torch.qint8)),
    "nested": _quietly(lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])),
    "jagged": _quietly(lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)),
    "sparse": torch.eye(3, 4).to_sparse(), "sparse mask": (torch.eye(3, 4) == 1).to_sparse(),
    "csr": _quietly(lambda: torch.eye(3, 4).to_sparse_csr()), "meta": torch.ones(3, 4, device="meta"),
    "lazy": nn.UninitializedParameter(), "subclass": TwoTensor(torch.ones(3, 4), torch.ones(3, 4)),
    "subclass mask": TwoTensor(torch.ones(3, 4) == 1, torch.ones(3, 4) == 1), "optimizer": torch.optim.SGD,
    "module": nn.Linear(1, 1), "slice": slice(0, 2), "pattern of two numbers": nm, "dtype": torch.float32,
}  # fmt: skip

ENTRY_POINTS: Final[dict[str, Callable[[Any], Any]]] = {
    "a model": lambda rubbish: freeze_entries(rubbish, "a"),
    "a spec": lambda rubbish: freeze_entries(_model(), rubbish),
    "a part of a spec": lambda rubbish: freeze_entries(_model(), [rubbish]),
    "a target": lambda rubbish: Rule(rubbish),
    "a value": lambda rubbish: freeze_entries(_model(), {"0.weight": (entries[0], rubbish)}),
    "a value of a whole tensor": lambda rubbish: freeze_entries(_model(), {"0.weight": (..., rubbish)}),
    "a rule's value": lambda rubbish: str(Rule("0.weight", value=rubbish)),
    "a rule's region": lambda rubbish: str(Rule("0.weight", rubbish)),
    "a saved state": lambda rubbish: freeze_entries(_model(), "0.weight[0]", state=rubbish),
    "a name": lambda rubbish: freeze_entries(_model(), "0.weight[0]")[rubbish],
    "a name to thaw": lambda rubbish: freeze_entries(_model(), "0.weight[0]").thaw(rubbish),
    "a state to load": lambda rubbish: freeze_entries(_model(), "0.weight[0]").load_state_dict(rubbish),
    "an optimizer": lambda rubbish: freeze_entries(_model(), "0.weight[0]").guard(rubbish),
    "a copied model": lambda rubbish: FrozenEntries.of(rubbish),
    "a handle made by hand": lambda rubbish: FrozenEntries(rubbish),
    "an index": lambda rubbish: freeze_entries(_model(), {"0.weight": entries[rubbish]}),
    "an index of one dimension": lambda rubbish: freeze_entries(_model(), {"0.weight": entries[:, rubbish]}),
    "a list in an index": lambda rubbish: freeze_entries(_model(), {"0.weight": entries[[rubbish]]}),
    "a slice": lambda rubbish: freeze_entries(_model(), {"0.weight": entries[rubbish:rubbish:rubbish]}),
    "a diagonal": lambda rubbish: freeze_entries(_model(), {"0.weight": diagonal(rubbish)}),
    "a triangle": lambda rubbish: freeze_entries(_model(), {"0.weight": triu(rubbish)}),
    "a group": lambda rubbish: nm(1, rubbish),
    "a fraction": lambda rubbish: smallest(rubbish),
    "a dimension to tie": lambda rubbish: str(tied(rubbish)),
    "a start": lambda rubbish: str(tied(0, start=rubbish)),
    "a region beside another": lambda rubbish: center | rubbish,
    "a region before another": lambda rubbish: rubbish & center,
    "text of a rule": parse_rule,
    "text of a region": parse_region,
    "an optimizer to wrap": lambda rubbish: MaskedOptimizer(rubbish, freeze_entries(_model(), "0.weight[0]")),
    "a handle": lambda rubbish: MaskedOptimizer(torch.optim.SGD(_model().parameters()), rubbish),
}


@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_rubbish_gets_an_error_of_the_library_s_own_and_a_short_one(entry: str) -> None:
    for name, rubbish in RUBBISH.items():
        try:
            ENTRY_POINTS[entry](rubbish)
        except Exception as error:
            if not isinstance(error, FreezeError) or len(str(error)) > 1000:
                pytest.fail(f"{name} as {entry}: {type(error).__name__}: {error}")


_of, _handle, _tied = (cast(Any, each) for each in (FrozenEntries.of, FrozenEntries, tied))

REGIONS: Final = {name: rubbish for name, rubbish in RUBBISH.items() if name != "module"}  # which is a function


@pytest.mark.parametrize("name", REGIONS)
def test_rubbish_as_a_region_is_refused_or_read(name: str) -> None:
    for target in ("0.weight", "0.bias"):
        with suppress(FreezeError):
            repr(freeze_entries(_model(), {target: REGIONS[name]}))


@pytest.mark.parametrize("name", [name for name in RUBBISH if name != "lazy"])
def test_what_is_no_name_is_in_no_handle(name: str) -> None:
    frozen = freeze_entries(_model(), "0.weight[0]")
    assert RUBBISH[name] not in frozen
    assert frozen.get(RUBBISH[name]) is None
    assert frozen.get(RUBBISH[name], 7) == 7


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda frozen: frozen[3], TargetError, "a parameter's name is text, found 3; give one of"),
        (lambda frozen: frozen.thaw(3), SpecError, "a target is a parameter's name, found 3; give one of"),
        (lambda frozen: _of({"w": torch.ones(2)}), SpecError, "`model` must be a module, found dict"),
        (lambda frozen: _handle([("0.weight", 1)]), SpecError, "a handle is not made by hand, found list; call"),
        (lambda frozen: freeze_entries(frozen, "0.weight"), SpecError, "found FrozenEntries; call freeze_entries"),
        (lambda frozen: center | 3, SpecError, "combined with a region by `|` and `&`, found int; write an index"),
        (lambda frozen: torch.ones(2) & center, SpecError, "found Tensor; write an index"),
        (lambda frozen: np.ones(2) | center, SpecError, "found ndarray; write an index"),
        (lambda frozen: entries[10**5000], RegionError, "an integer of more than 1000 digits is not a position"),
        (lambda frozen: diagonal(10**5000), RegionError, "`k` of `diagonal` must be an integer, found int, which"),
        (lambda frozen: tied(10**5000), SpecError, "`dim` of `tied` must be an integer, found int, which cannot"),
        (lambda frozen: _tied(0, start=np.ones(3)), RegionError, "must be first or mean, found array"),
        (lambda frozen: Rule("w", value=10**5000), FrozenValueError, "must be finite, found int, which cannot"),
    ],
)  # fmt: skip
def test_rubbish_is_refused_in_words(call: Callable[[Any], Any], error: type[FreezeError], says: str) -> None:
    with pytest.raises(error) as raised:
        call(freeze_entries(_model(), "0.weight[0]"))
    assert says in str(raised.value)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("quantized", r"a value must be a dense tensor with numbers, found a quantized tensor \(torch\.qint8\)"),
        ("nested", "a value must be a dense tensor with numbers, found a nested tensor"),
        ("sparse", "a value must be a dense tensor with numbers, found torch.sparse_coo on cpu"),
        ("lazy", "a value must be a dense tensor with numbers, found a lazy parameter without a shape"),
        ("subclass", "a value must be a dense tensor with numbers, found a TwoTensor"),
        ("bool tensor", "a value must hold numbers, found a bool tensor.*; give a mask as the region"),
    ],
)
def test_a_tensor_that_is_no_plain_one_is_no_value(value: str, says: str) -> None:
    with pytest.raises(FrozenValueError, match=says):
        freeze_entries(_model(), {"0.weight": (..., RUBBISH[value])})


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int64, torch.float64])
def test_a_value_of_any_number_s_dtype_is_held(dtype: torch.dtype) -> None:
    model = _model()
    freeze_entries(model, {"0.weight": (entries[0], torch.arange(4).to(dtype))}).assert_frozen(guarded=False)
    assert model[0].weight[0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("step", [5, 2**31, 2**63 - 1, 2**64, 10**30], ids=str)
def test_a_step_of_any_size_takes_the_first_position(step: int) -> None:
    for region, frozen in ((f"::{step}", [True, False, False]), (f"::-{step}", [False, False, True])):
        model = _model()
        assert freeze_entries(model, f"0.bias[{region}] = 3")["0.bias"].frozen.tolist() == frozen
        tensor = freeze_entries(_model(), {"0.bias": (parse_region(region), torch.tensor([4.0]))})
        assert tensor["0.bias"].values.tolist() == [4]


def test_a_long_mask_as_an_index_is_not_printed_in_full() -> None:
    mask = torch.rand(100, 100) < 0.5
    for call in (
        lambda: entries[mask],
        lambda: entries[mask.tolist()],
        lambda: freeze_entries(nn.Linear(100, 100), f"weight[{mask.tolist()}] = 0"),
        lambda: freeze_entries(nn.Linear(100, 100), Rule("weight", entries[list(range(50)) * 99, 3, 3], 0)),
    ):
        with pytest.raises((RegionError, RuleSyntaxError)) as raised:
            call()
        assert len(str(raised.value)) < 600


def test_a_rule_of_many_indices_is_printed_in_part_and_saved_in_full() -> None:
    rule = Rule("0.weight", entries[[0, 1] * 2000, 0], 0)
    frozen = freeze_entries(_model(), rule)
    assert max(map(len, repr(frozen).splitlines())) < 300
    assert max(map(len, str(frozen.report()).splitlines())) < 400
    assert frozen.rules == (rule,) == (parse_rule(str(rule)),)
    freeze_entries(_model(), rule, state=frozen.state_dict())


def test_a_spec_that_holds_itself_is_refused() -> None:
    spec: list[Any] = ["0.weight[0]"]
    spec.append(spec)
    with pytest.raises(SpecError, match="`spec` is nested too deeply, or contains itself; give a flat list"):
        freeze_entries(_model(), spec)


def test_a_picture_s_path_is_text_or_a_path() -> None:
    pytest.importorskip("matplotlib")
    frozen = freeze_entries(_model(), "0.weight[0]")
    for name in ("number", "bytes", "list", "module"):
        with pytest.raises(SpecError, match="`path` must be text or a Path, found"):
            frozen.plot("0.weight", RUBBISH[name])


# --------------------------------------------------------------------------------------------------------------------
# A handle reads like a dict, and is no `Mapping`


def test_a_handle_reads_like_a_dict() -> None:
    frozen = freeze_entries(_model(), "0.weight[0]\n1.bias = 1")
    assert dict(frozen) == {**frozen} == dict(frozen.items()) == {name: frozen[name] for name in frozen}
    assert list(frozen.keys()) == list(frozen) == ["0.weight", "1.bias"]
    assert frozen.keys() & {"1.bias", "0.bias"} == {"1.bias"}
    assert [part.name for part in frozen.values()] == ["0.weight", "1.bias"]
    assert (len(frozen.items()), len(frozen.values())) == (2, 2)
    assert "0.weight" in frozen
    assert "0.bias" not in frozen
    assert frozen.get("0.bias", 3) == 3
    assert frozen == frozen
    assert frozen != copy.deepcopy(frozen)
    assert len({frozen, frozen}) == 1


def test_a_handle_is_no_mapping_and_no_sequence() -> None:
    frozen = freeze_entries(_model(), "0.weight[0]")
    assert not isinstance(frozen, Mapping | collections.abc.MutableMapping | collections.abc.Sequence | dict)
    assert isinstance(frozen, collections.abc.Collection)


def test_a_handle_is_a_leaf_of_torch_s_trees() -> None:
    frozen = freeze_entries(_model(), "0.weight[0]")
    leaves, _ = torch.utils._pytree.tree_flatten({"frozen": frozen, "n": 1})
    assert leaves == [frozen, 1]
    pickle.loads(pickle.dumps({"frozen": frozen}))["frozen"].assert_frozen(guarded=False)


def _data(frozen: FrozenEntries) -> dict[str, Any]:
    return {"frozen": frozen, "several": [frozen], "x": torch.ones(2)}


def test_lightning_s_walk_leaves_a_handle_alone() -> None:
    utilities = pytest.importorskip("lightning.fabric.utilities")
    frozen = freeze_entries(_model(), "0.weight[0]")
    walked = utilities.apply_to_collection if hasattr(utilities, "apply_to_collection") else None
    walk = walked or pytest.importorskip("lightning_utilities.core.apply_func").apply_to_collection
    moved = walk(_data(frozen), Tensor, lambda tensor: tensor + 1)
    assert moved["frozen"] is moved["several"][0] is frozen
    assert utilities.move_data_to_device(_data(frozen), torch.device("cpu"))["frozen"] is frozen


def test_accelerate_s_walk_leaves_a_handle_alone() -> None:
    operations = pytest.importorskip("accelerate.utils.operations")
    frozen = freeze_entries(_model(), "0.weight[0]")
    moved = operations.send_to_device(_data(frozen), torch.device("cpu"))
    assert moved["frozen"] is moved["several"][0] is frozen
    assert operations.recursively_apply(lambda tensor: tensor + 1, _data(frozen))["frozen"] is frozen


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated")  # Lightning's own
def test_fabric_saves_and_loads_a_handle(tmp_path: Any) -> None:
    fabric_module = pytest.importorskip("lightning.fabric")
    fabric = fabric_module.Fabric(accelerator="cpu", devices=1)
    model = _model()
    frozen = freeze_entries(model, "0.weight[0]")
    kept = frozen["0.weight"].values
    fabric.save(tmp_path / "state.ckpt", {"model": model, "frozen": frozen})
    fresh = _model()
    other = freeze_entries(fresh, "0.weight[0]")
    fabric.load(tmp_path / "state.ckpt", {"model": fresh, "frozen": other})
    assert same_bits(other["0.weight"].values, kept)
    other.assert_frozen(guarded=False)


def test_accelerate_saves_and_loads_a_handle(tmp_path: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = _model()
    frozen = freeze_entries(model, "0.weight[0]")
    kept = frozen["0.weight"].values.clone()
    accelerator.register_for_checkpointing(frozen)
    accelerator.save_state(str(tmp_path))
    with torch.no_grad():
        model[0].weight.fill_(5)
    frozen.load_state_dict(freeze_entries(_model(), "0.weight[0]").state_dict())
    accelerator.load_state(str(tmp_path))
    assert same_bits(frozen["0.weight"].values, kept)


def test_those_who_look_for_a_state_dict_find_one() -> None:
    from torch.distributed.checkpoint.stateful import Stateful

    frozen = freeze_entries(_model(), "0.weight[0]")
    assert isinstance(frozen, Stateful)
    to_save = {"frozen": frozen, "model": _model()}
    states = {
        name: each.state_dict() for name, each in to_save.items() if hasattr(each, "state_dict")
    }  # as Ignite does
    assert set(states["frozen"]) == {"format", "parameters"}
