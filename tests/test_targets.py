"""A target finds the parameters that people mean: by class, by wildcards, by the object itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from freezehooks import (
    FreezeError,
    RegionError,
    Rule,
    StateMismatchError,
    TargetError,
    center,
    entries,
    freeze_entries,
    parse_rule,
    zeros,
)


class _Half(nn.Conv2d):
    """A user-defined convolution."""


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3)
        self.features = nn.Sequential(_Half(4, 4, 3), nn.BatchNorm2d(4), nn.Conv1d(4, 4, 3))
        self.head = nn.Linear(4, 3)


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("*(Conv2d).weight", ["stem.weight", "features.0.weight"]),
        ("*(Conv2d)", ["stem.weight", "features.0.weight"]),
        ("*(_Half)", ["features.0.weight"]),
        ("*(Conv2d,Linear).bias", ["stem.bias", "features.0.bias", "head.bias"]),
        ("*( Conv2d , Linear ).bias", ["stem.bias", "features.0.bias", "head.bias"]),
        ("features.*(_ConvNd)", ["features.0.weight", "features.2.weight"]),
        ("features.?(_ConvNd, _NormBase).*as", ["features.0.bias", "features.1.bias", "features.2.bias"]),
        ("features(Sequential).0.weight", ["features.0.weight"]),
        ("*(_Net).head.weight", ["head.weight"]),
        ("(_Net).stem.*", ["stem.weight", "stem.bias"]),
    ],
)
def test_a_target_may_name_classes_of_modules_and_subclasses_count(target: str, names: list[str]) -> None:
    with freeze_entries(_Net(), target) as frozen:
        assert list(frozen) == names
    rule = parse_rule(f"{target}[0] = 1")
    assert parse_rule(str(rule)) == rule


def test_a_model_that_is_such_a_module_itself_has_its_parameters_found() -> None:
    assert list(freeze_entries(nn.Conv2d(1, 1, 3), "*(Conv2d).weight[center] = 0")) == ["weight"]


def test_classes_are_found_behind_the_names_of_wrappers() -> None:
    wrapped = nn.Module()
    wrapped.module = _Net()
    assert list(freeze_entries(wrapped, "features.*(Conv1d)")) == ["module.features.2.weight"]


def test_classes_that_match_nothing_are_refused_with_those_that_are_there() -> None:
    message = (
        r"names classes that no module of the model has; its modules are BatchNorm2d, Conv1d, Conv2d, Linear, _Half"
    )
    with pytest.raises(TargetError, match=message):
        freeze_entries(_Net(), "*(Conv3d)[center] = 0")
    with pytest.raises(TargetError, match="matches no parameter"):
        freeze_entries(_Net(), "head*(Conv2d)[center] = 0")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("head*(Conv2d)", r"`head\*\(Conv2d\)` matches no parameter; modules of its classes are `stem`, `features\.0`"),
        ("*(nn.Conv2d).weight", r"names no classes; write them by their names, as in `\*\(Conv2d\)\.weight`"),
        ("*(Conv*).weight", "names no classes; write"),
        ("*(Conv2d.weight", "names no classes; write"),
        ("*().weight", "names no classes; write"),
    ],
)
def test_parentheses_that_find_nothing_say_why(target: str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        freeze_entries(_Net(), f"{target} = 0")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("*.weight[zeros]", r"selects no entry \(parameter .*\); correct it, or leave the rule out"),
        ("*.weight[3]", r"index 3 is out of range .*; use 0 to 2"),
    ],
)
def test_classes_are_not_proposed_where_the_class_is_not_what_is_wrong(rule: str, message: str) -> None:
    with pytest.raises(RegionError, match=message):
        freeze_entries(_Net(), rule)


@pytest.mark.parametrize(
    ("rule", "proposed"),
    [
        ("*.weight[center] = 0", r"`\*\(Conv1d, Conv2d, _Half\)\.weight\[center\] = 0`"),
        ("features.*[cross(1)]", r"`features\.\*\(Conv1d, _Half\)\[cross\(1\)\] = keep`"),
        ("*[~center] = 0", r"`\*\(Conv1d, Conv2d, _Half\)\[~center\] = 0`"),
    ],
)
def test_a_wildcard_that_meets_a_batch_norm_says_so_and_proposes_classes(rule: str, proposed: str) -> None:
    with pytest.raises(RegionError, match=f"needs a convolution weight .* name classes of modules: {proposed}"):
        freeze_entries(_Net(), rule)


def test_the_rule_that_an_error_proposes_works() -> None:
    with pytest.raises(RegionError) as caught:
        freeze_entries(_Net(), "*.weight[center] = 0")
    proposed = str(caught.value).split("`")[-2]
    assert list(freeze_entries(_Net(), proposed)) == ["stem.weight", "features.0.weight", "features.2.weight"]


def test_a_wildcard_skips_parameters_without_an_entry_of_a_region_chosen_by_numbers() -> None:
    model = _Net()
    model.head.weight.data[0] = 0
    frozen = freeze_entries(model, "*.weight[zeros]\nstem.bias = 0")
    assert list(frozen) == ["head.weight", "stem.bias"]
    assert "`*.weight[zeros] = keep` skipped 4 parameters that have no such entry" in repr(frozen)
    assert "skipped 4 parameters" in str(frozen.report())
    assert "skipped 4 parameters" in frozen.report()._repr_html_()


def test_a_wildcard_fails_where_no_parameter_has_such_an_entry() -> None:
    with pytest.raises(RegionError, match=r"rule `\*\.weight\[zeros\] = keep`: the region selects no entry"):
        freeze_entries(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "*.weight[zeros]")


@pytest.mark.parametrize("rule", ["*.weight[3:3]", "stem.weight[zeros]"])
def test_what_is_named_alone_or_selected_by_shape_is_never_skipped(rule: str) -> None:
    model = _Net()
    model.head.weight.data[0] = 0
    with pytest.raises(RegionError, match="the region selects no entry"):
        freeze_entries(model, rule)


def test_a_resumed_run_skips_what_the_saved_one_skipped() -> None:
    model = _Net()
    model.head.weight.data[0] = 0
    state = freeze_entries(model, "*.weight[zeros]").state_dict()
    fresh = _Net()
    fresh.stem.weight.data[0] = 0  # found now, and not then
    frozen = freeze_entries(fresh, "*.weight[zeros]", state=state)
    assert list(frozen) == ["head.weight"]
    with pytest.raises(StateMismatchError, match=r"the state cannot be read|has format"):
        freeze_entries(_Net(), "*.weight[zeros]", state={})


def test_a_target_may_be_a_parameter_or_a_module_of_the_model() -> None:
    model = _Net()
    spec: Any = [{model.stem: center, model.head.bias: (..., [1, 2, 3])}, Rule(model.features[0], entries[0], 1)]
    frozen = freeze_entries(model, spec)
    assert [str(rule) for rule in frozen.rules] == [
        "stem.weight[center] = keep",
        "head.bias = [1, 2, 3]",
        "features.0.weight[0] = 1",
    ]
    assert model.head.bias.tolist() == [1, 2, 3]


def test_a_target_of_another_model_is_refused() -> None:
    with pytest.raises(
        TargetError, match="the Linear that a rule names is not in the model; give a parameter or a modu"
    ):
        freeze_entries(_Net(), {nn.Linear(2, 2): entries[0]})
    with pytest.raises(FreezeError, match="the Parameter that a rule names is not in the model"):
        freeze_entries(_Net(), Rule(nn.Parameter(torch.zeros(2)), zeros))


@pytest.mark.parametrize(
    ("region", "rows"),
    [([1, 2], [1, 2]), (range(2), [0, 1]), (torch.tensor([True, False, True]), [0, 2]), ([-1], [2])],
)
def test_a_list_of_integers_is_an_index_and_a_mask_may_be_of_rows(region: Any, rows: list[int]) -> None:
    frozen = freeze_entries(nn.Linear(4, 3), {"weight": region})
    assert frozen["weight"].frozen.nonzero()[::4, 0].tolist() == rows
    assert frozen["weight"].frozen_count == 4 * len(rows)


def test_a_pair_in_a_mapping_may_be_a_list_where_a_file_has_no_tuples() -> None:
    layer = nn.Linear(3, 3)
    freeze_entries(layer, {"weight": ["diagonal", 0], "bias": [[0, 2], 1]})
    assert layer.weight.diagonal().tolist() == [0, 0, 0]
    assert layer.bias[[0, 2]].tolist() == [1, 1]
