"""Thawing a region of a parameter, while its other entries stay frozen."""

from __future__ import annotations

import copy
import pickle
from typing import Any, Final

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from freezehooks import (
    FreezeError,
    FrozenEntries,
    MaskedOptimizer,
    RegionError,
    Rule,
    RuleConflictError,
    RuleSyntaxError,
    SpecError,
    StateMismatchError,
    TargetError,
    center,
    entries,
    freeze_entries,
    tied,
    train_only,
)

from .claims import held_twice, same_bits

either_mode = pytest.mark.parametrize("compact", [False, True], ids=["masked", "compact"])
MAKERS: Final[dict[str, Any]] = {
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: AdamW(p, lr=0.1, weight_decay=0.1),
}
makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def _table() -> nn.Embedding:
    return nn.Embedding(8, 4)


def _step(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.tensor([0, 1, 3, 5, 7])).square().sum().backward()
    optimizer.step()


def _rows(*rows: int) -> Tensor:
    mask = torch.zeros(8, 4, dtype=torch.bool)
    mask[list(rows)] = True
    return mask


def _even(weight: Tensor) -> Tensor:
    return _rows(0, 2, 4, 6)


@makers
@either_mode
def test_a_region_trains_on_and_the_rest_holds(make: Any, compact: bool) -> None:
    model = _table()
    before = model.weight.detach().clone()
    frozen = freeze_entries(model, "weight[~6:]")
    optimizer = MaskedOptimizer(make(model.parameters()), frozen, compact=compact)
    _step(model, optimizer)
    frozen.thaw("weight[:2]")
    assert str(frozen["weight"].rules[0]) == "weight[~6: & ~:2] = keep"
    assert frozen["weight"].frozen.equal(_rows(2, 3, 4, 5))
    assert (frozen.frozen_count, frozen["weight"].free_count) == (16, 16)
    for _ in range(3):
        _step(model, optimizer)
        assert model.weight.grad is not None
        assert not model.weight.grad[2:6].any()
        assert bool(model.weight.grad[[0, 1, 7]].all())
    frozen.assert_frozen()
    assert same_bits(model.weight[2:6], before[2:6])
    assert bool((model.weight[:2] != before[:2]).all())


@makers
def test_compact_and_masked_runs_let_a_region_go_alike(make: Any) -> None:
    models = [_table(), _table()]
    models[1].load_state_dict(models[0].state_dict())
    for model, compact in zip(models, (False, True), strict=True):
        frozen = freeze_entries(model, "weight[~6:]")
        optimizer = MaskedOptimizer(make(model.parameters()), frozen, compact=compact)
        for n in range(20):
            if n in (5, 10):
                frozen.thaw("weight[:2]" if n == 5 else "weight[:, 0]")
            _step(model, optimizer)
    assert same_bits(models[0].weight, models[1].weight)


@either_mode
@makers
def test_it_starts_as_it_does_when_all_other_entries_are_frozen_anew(make: Any, compact: bool) -> None:
    """The same as thawing everything and freezing what stays: nothing else differs under any optimizer."""
    models = [_table(), _table()]
    models[1].load_state_dict(models[0].state_dict())
    handles = [freeze_entries(model, "weight[~6:]") for model in models]
    pairs = zip(models, handles, strict=True)
    optimizers = [MaskedOptimizer(make(model.parameters()), frozen, compact=compact) for model, frozen in pairs]
    for n in range(40):
        if n == 20:
            handles[0].thaw("weight[:2]")
            handles[1].thaw("weight")
            freeze_entries(models[1], "weight[2:6]").guard(optimizers[1].inner, compact=compact)
        for model, optimizer in zip(models, optimizers, strict=True):
            _step(model, optimizer)
    assert same_bits(models[0].weight, models[1].weight)


@pytest.mark.parametrize(
    ("spec", "target", "rule", "held"),
    [
        ("weight = 0", "weight[2:]", "weight[~2:] = 0", _rows(0, 1)),
        ("weight = 0", "weight[~2:]", "weight[2:] = 0", _rows(2, 3, 4, 5, 6, 7)),
        ("weight[:4] = 1", "wei*[1 | 6]", "weight[:4 & ~(1 | 6)] = 1", _rows(0, 2, 3)),
        ("weight[:2 | 6:]", "weight[0]", "weight[(:2 | 6:) & ~0] = keep", _rows(1, 6, 7)),
        ({"weight": (entries[:2], torch.arange(8.0).view(2, 4))}, "weight[1]", None, _rows(0)),
        ({"weight": (entries[:2], torch.arange(4.0))}, "weight[0]", None, _rows(1)),
        ({"weight": _rows(0, 3)}, "weight[:2]", None, _rows(3)),
        ({"weight": _even}, "weight[:2]", "weight[<_even & ~(:2)>] = keep", _rows(2, 4, 6)),
        ("weight[:4]", Rule("weight", _rows(1, 7)), None, _rows(0, 2, 3)),
        ({"weight": _rows(0, 3)}, Rule("weight", _rows(0)), None, _rows(3)),
        ("weight[:4]", Rule("weight", _even), "weight[<:4 & ~(_even)>] = keep", _rows(1, 3)),
    ],
)
def test_rules_say_what_is_still_held_and_values_stay(spec: Any, target: Any, rule: str | None, held: Tensor) -> None:
    model = _table()
    frozen = freeze_entries(model, spec)
    before = model.weight.detach().clone()
    frozen.thaw(target)
    if rule is not None:
        assert list(map(str, frozen.rules)) == [rule]
    assert frozen["weight"].frozen.equal(held)
    model.weight.data.fill_(7)
    frozen.impose()
    assert same_bits(model.weight[held], before[held].view_as(model.weight[held]))
    assert bool((model.weight[~held] == 7).all())
    again = freeze_entries(_table(), spec)
    again.thaw(target)
    again.load_state_dict(frozen.state_dict())
    assert same_bits(again["weight"].values, frozen["weight"].values)
    third = freeze_entries(_table(), frozen.rules, state=frozen.state_dict())
    assert same_bits(third["weight"].values, frozen["weight"].values)


def test_a_rule_of_which_nothing_is_left_goes_and_with_the_last_the_parameter() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    frozen = freeze_entries(model, "0.weight[0] = 1\n0.weight[2] = 3\n1.bias")
    frozen.thaw("0.weight[:2]")
    assert list(map(str, frozen.rules)) == ["0.weight[2] = 3", "1.bias = keep"]
    frozen.thaw("*.weight[2]")
    assert list(frozen) == ["1.bias"]
    assert not model[0]._forward_pre_hooks
    frozen.thaw("1.bias[:]")
    assert not frozen.attached
    assert FrozenEntries.of(model) == ()


def test_a_wildcard_lets_go_where_anything_is_frozen() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3))
    frozen = freeze_entries(model, "0.weight[center] = 0\n1.weight\n2.weight[0, 0, 0, 0]")
    frozen.thaw("*.weight[center]")
    assert list(map(str, frozen.rules)) == ["1.weight[~center] = keep", "2.weight[0, 0, 0, 0] = keep"]


def test_a_state_from_before_is_refused_after() -> None:
    frozen = freeze_entries(_table(), "weight[:4]")
    state = frozen.state_dict()
    frozen.thaw("weight[0]")
    with pytest.raises(StateMismatchError, match="saved under other rules"):
        frozen.load_state_dict(state)


def test_a_removed_handle_lets_go_and_attaches_with_what_is_left() -> None:
    model = _table()
    frozen = freeze_entries(model, "weight[:4] = 0")
    frozen.remove()
    frozen.thaw("weight[0]")
    assert not frozen.attached
    frozen.attach()
    assert frozen["weight"].frozen.equal(_rows(1, 2, 3))
    frozen.assert_frozen(guarded=False)


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_holds_what_is_left_and_lets_go_by_itself(way: Any) -> None:
    model = _table()
    frozen = freeze_entries(model, "weight[:4] = 0")
    frozen.thaw("weight[0]")
    other = way(model)
    (found,) = FrozenEntries.of(other)
    found.thaw("weight[1]")
    assert found["weight"].frozen.equal(_rows(2, 3))
    assert frozen["weight"].frozen.equal(_rows(1, 2, 3))


def test_a_tied_parameter_is_named_by_either_name() -> None:
    model = nn.Sequential(_table(), nn.Linear(4, 8, bias=False))
    model[1].weight = model[0].weight
    frozen = freeze_entries(model, "0[:4]")
    frozen.thaw("1[:2]")
    assert frozen["0.weight"].frozen.equal(_rows(2, 3))


@held_twice
def test_another_handle_holds_on() -> None:
    model = _table()
    first, second = freeze_entries(model, "weight[:4]"), freeze_entries(model, "weight[2:6]")
    first.thaw("weight[1:3]")
    assert first["weight"].frozen.equal(_rows(0, 3))
    assert second["weight"].frozen.equal(_rows(2, 3, 4, 5))
    assert first["weight"].free_count == 3 * 4


def test_a_region_of_what_train_only_keeps() -> None:
    model = nn.Sequential(_table(), nn.Linear(4, 8))
    frozen = train_only(model, "0[6:]")
    frozen.thaw("0[:2]")
    assert list(map(str, frozen.rules)) == ["0.weight[~6: & ~:2] = keep"]
    frozen.thaw("0[2:]")
    assert len(frozen) == 0
    assert not model[1].weight.requires_grad


def test_tied_copies_let_a_region_go_in_every_slice_alone() -> None:
    model = nn.Conv2d(3, 3, 3, groups=3)
    frozen = freeze_entries(model, [Rule("weight", value=tied(0, start="first")), Rule("weight", center, 0)])
    with pytest.raises(RuleConflictError, match="freeze the same entries, at the same values, in all slices"):
        frozen.thaw("weight[0]")
    assert frozen.frozen_count == 3
    frozen.thaw("weight[center]")
    assert list(map(str, frozen.rules)) == ["weight = tied(0, start=first)"]
    with pytest.raises(TargetError, match=r"nothing in `weight\[0\]` is frozen"):
        frozen.thaw("weight[0]")


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ("weight[6:]", TargetError, r"nothing in `weight\[6:\]` is frozen; the rules in force are `weight\[:4\] = 1`"),
        ("weight[8]", RegionError, r"cannot thaw `weight\[8\]`: index 8 is out of range .* \(parameter `weight`"),
        ("weight[center]", RegionError, r"cannot thaw `weight\[center\]`"),
        ("weight[0] = 1", SpecError, r"`weight\[0\] = 1` gives a value, but thawed entries have none; leave"),
        ("wheight[0]", TargetError, "nothing of `wheight` is frozen; frozen are weight"),
        ("weight[0", RuleSyntaxError, r"`\]` to close the region"),
        (3, SpecError, "a target is a parameter's name, found 3"),
        (None, SpecError, "found None"),
    ],
)
def test_bad_targets_are_refused_and_change_nothing(target: Any, error: type[FreezeError], message: str) -> None:
    model = _table()
    frozen = freeze_entries(model, "weight[:4] = 1")
    with pytest.raises(error, match=message):
        frozen.thaw(target)
    assert frozen["weight"].frozen.equal(_rows(0, 1, 2, 3))
    assert frozen.attached
