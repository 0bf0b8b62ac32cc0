"""The page on migration: its tables and functions about `prune`, hooks and PEFT are correct."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from freezehooks import FrozenEntries, freeze_entries

PAGE: Final = (Path(__file__).parents[1] / "docs" / "migration.md").read_text()
SECTIONS: Final = re.findall(r"\n## (From .*?)\n(.*?)(?=\n## |\Z)", PAGE, re.DOTALL)
BLOCKS: Final = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize(("title", "text"), SECTIONS, ids=[title for title, _ in SECTIONS])
def test_every_section_runs_what_was_before_and_what_comes_after(title: str, text: str) -> None:
    order = re.findall(r"^(Before|After): |^(```python)$", text, re.MULTILINE)
    assert [when or "code" for when, _ in order][:4] == ["Before", "code", "After", "code"]


def test_there_are_three_sections() -> None:
    assert len(SECTIONS) == 3


# --------------------------------------------------------------------------------------------------------------------
# prune


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """The names of the block that defines how to convert a checkpoint."""
    (block,) = [block for block in BLOCKS if "def plain_state" in block]
    names: dict[str, Any] = {}
    exec(block, names)
    return names


class _Named(nn.Module):
    """Has parameters and a buffer whose own names end like those of pruning."""

    def __init__(self) -> None:
        super().__init__()
        self.net: Any = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        self.scale_orig = nn.Parameter(torch.ones(2))
        self.register_buffer("attention_mask", torch.ones(2))


def _l1(module: nn.Module) -> None:
    prune.l1_unstructured(module, "weight", amount=0.5)


def _twice(module: nn.Module) -> None:
    _l1(module)
    prune.random_unstructured(module, "weight", amount=2)


def _channels(module: nn.Module) -> None:
    prune.ln_structured(module, "weight", amount=1, n=2, dim=0)
    prune.random_unstructured(module, "bias", amount=1)


@pytest.mark.parametrize("pruned_by", [_l1, _twice, _channels])
def test_a_pruned_checkpoint_becomes_the_plain_one_and_stays_pruned(pruned_by: Any, page: dict[str, Any]) -> None:
    old, new = _Named(), _Named()
    pruned_by(old.net[0])
    saved = old.state_dict()
    new.load_state_dict(page["plain_state"](saved))
    frozen = freeze_entries(new, page["pruned_entries"](saved))
    prune.remove(old.net[0], "weight")
    assert new.net[0].weight.equal(old.net[0].weight)
    assert int(sum(part.frozen.sum() for part in frozen.values())) == sum(
        int((mask == 0).sum()) for name, mask in saved.items() if name.endswith("_mask")
    )


def test_a_plain_checkpoint_stays_as_it_is(page: dict[str, Any]) -> None:
    saved = _Named().state_dict()
    assert page["plain_state"](saved).keys() == saved.keys()
    assert page["pruned_entries"](saved) == {}


@pytest.mark.parametrize("amount", [0.25, 0.5, 0.8])
def test_smallest_freezes_what_l1_unstructured_prunes(amount: float) -> None:
    plain, pruned = nn.Linear(10, 10), nn.Linear(10, 10)
    pruned.load_state_dict(plain.state_dict())
    prune.l1_unstructured(pruned, "weight", amount=amount)
    frozen = freeze_entries(plain, f"weight[smallest({amount})] = 0")
    mask: Tensor = pruned.weight_mask  # type: ignore[assignment]
    assert frozen["weight"].frozen.equal(mask == 0)


def test_handles_say_what_is_pruned_says() -> None:
    layer = nn.Linear(2, 2)
    assert (FrozenEntries.of(layer), prune.is_pruned(layer)) == ((), False)
    freeze_entries(layer, "weight[0] = 0")
    assert [list(handle) for handle in FrozenEntries.of(layer)] == [["weight"]]


def test_zeros_of_a_layer_that_pruning_left_whole_is_the_error_that_the_page_announces() -> None:
    assert "select nothing, which is an error" in PAGE
    with pytest.raises(ValueError, match="the region selects no entry"):
        freeze_entries(nn.Linear(2, 2), "weight[zeros]")


# --------------------------------------------------------------------------------------------------------------------
# PEFT


@pytest.fixture
def peft() -> Any:
    return pytest.importorskip("peft")


@pytest.mark.parametrize(("indices", "rule"), [([8, 9], "0[~8:]"), ([8, 9], "0[~[8, 9]]"), ([1, 7], "0[~[1, 7]]")])
def test_the_rule_leaves_free_what_peft_trains(peft: Any, indices: list[int], rule: str) -> None:
    model: Any = nn.Sequential(nn.Embedding(10, 4))
    free = ~freeze_entries(model, rule)["0.weight"].frozen[:, 0]
    wrapped = peft.get_peft_model(
        nn.Sequential(nn.Embedding(10, 4)), peft.TrainableTokensConfig(token_indices=indices, target_modules=["0"])
    )
    before = wrapped.base_model.model[0].base_layer.weight.detach().clone()
    wrapped.base_model.model[0].trainable_tokens_delta["default"].data += 1
    moved = (wrapped.merge_and_unload()[0].weight != before).all(dim=1)
    assert free.equal(moved)


def test_an_adapter_beside_lora_has_its_rows_where_the_page_says(peft: Any) -> None:
    assert "`token_adapter.trainable_tokens_delta`" in PAGE
    config = peft.LoraConfig(r=2, target_modules=["1"], trainable_token_indices={"0": [4]})
    wrapped = peft.get_peft_model(nn.Sequential(nn.Embedding(6, 3), nn.Linear(3, 2)), config)
    assert "base_model.model.0.token_adapter.trainable_tokens_delta" in peft.get_peft_model_state_dict(wrapped)
