"""Freezing everything that trained warns once, with the counts; so does a union that covers a whole tensor."""

from __future__ import annotations

import warnings

import pytest
from torch import nn

from freezehooks import freeze_entries, train_only

from .claims import held_twice


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


@pytest.mark.parametrize("spec", ["*", "0.weight[0]\n0.weight[1:]\n0.bias\n1.*"])
def test_freezing_all_of_a_model_warns_with_the_counts(spec: str) -> None:
    says = "nothing in the model trains: 13 entries of 13 in 4 parameters are frozen; leave out what trains"
    with pytest.warns(UserWarning, match=says) as caught:
        frozen = freeze_entries(_model(), spec)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert frozen.attached


def test_what_requires_no_gradient_does_not_count() -> None:
    model = _model()
    model[0].requires_grad_(False)
    with pytest.warns(UserWarning, match="4 entries of 4 in 2 parameters"):
        freeze_entries(model, "1.*")


@held_twice
def test_all_handles_count() -> None:
    model = _model()
    freeze_entries(model, "0.*\n1.bias")
    with pytest.warns(UserWarning, match="nothing in the model trains: 13 entries"):
        freeze_entries(model, "1.weight")


@pytest.mark.parametrize("spec", ["", "*.weight", "*.weight\n*.bias[0]", "0.weight = tied(0, start=first)"])
def test_one_free_entry_is_enough(spec: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        freeze_entries(_model(), spec)
        train_only(_model(), "0.bias[0]")
        model = _model().requires_grad_(False)
        freeze_entries(model, "*")


def test_a_union_of_all_entries_warns() -> None:
    says = (
        r"rule `0\.weight\[0 \| 1:\] = keep` freezes all 6 entries of `0\.weight`: if that is meant, name `0\.weight`"
    )
    with pytest.warns(UserWarning, match=says):
        freeze_entries(_model(), "0.weight[0 | 1:]")
    with pytest.warns(UserWarning, match="freezes all 6 entries"):
        freeze_entries(_model(), "0.weight[:, 0 | 1:]")
