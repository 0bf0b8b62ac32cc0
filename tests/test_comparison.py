"""The comparison page: every cell about this library and its alternatives is measured here."""

from __future__ import annotations

import ast
import copy
import importlib.metadata
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, parametrizations, prune
from torch.optim import SGD, AdamW, Optimizer

from freezehooks import MaskedOptimizer, RegionError, freeze_entries

from .alternatives import (
    ROWS,
    WAYS,
    FreezeHooks,
    PeftTokens,
    Prune,
    RequiresGrad,
    Sparsifier,
    Way,
    adopt,
    backward,
    embedding,
    train,
    warm,
)
from .claims import held_twice

TESTS: Final = Path(__file__).parent
PAGE: Final = (TESTS.parent / "docs" / "comparison.md").read_text()
TABLE: Final = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line[:1] == "|"]
VERDICTS: Final = [row for row in TABLE if len(row) == len(WAYS) + 1]
EVIDENCE: Final = [row for row in TABLE if len(row) == 3 and row[0] in [verdict[0] for verdict in VERDICTS[2:]]]
OTHERS: Final = [
    row for row in TABLE if len(row) == 3 and set(row[0]) != {"-"} and row not in EVIDENCE and row[2] != "shown by"
]

SAME: Final = "✓"
ZERO: Final = "±0"
NO: Final = "✗"
NONE: Final = "\N{EN DASH}"

ways = pytest.mark.parametrize("way", WAYS, ids=[way.title.strip("`") for way in WAYS])

adamw: Final[Callable[..., Optimizer]] = partial(AdamW, lr=0.1, weight_decay=0.1)
sgd: Final[Callable[..., Optimizer]] = partial(SGD, lr=0.1, weight_decay=0.1)


@pytest.fixture
def peft() -> Any:
    return pytest.importorskip("peft")


@pytest.fixture
def said(request: pytest.FixtureRequest, way: type[Way]) -> str:
    """What the page says in the row whose evidence is this test, in the column of this way."""
    name = request.node.originalname
    (claim,) = [row[0] for row in EVIDENCE if f"`test_comparison.py::{name}`" in row[-1]]
    (row,) = [row for row in VERDICTS if row[0] == claim]
    return row[VERDICTS[0].index(way.title)]


def _verdict(found: Tensor | None, expected: float | Tensor = 0.0) -> str:
    """Whether numbers are the expected ones: to the last bit, except for the sign of zeros, or not."""
    if found is None:
        return SAME
    expected = torch.as_tensor(expected).expand(found.shape)
    if not bool((found == expected).all()):
        return NO
    return SAME if bool((found.signbit() == expected.signbit()).all()) else ZERO


def _yes(found: bool) -> str:
    return SAME if found else NO


def _frozen_in_mid_training(way: type[Way], guarded: bool = True) -> Way:
    """Four rows of an embedding, set to 0 after three steps of AdamW and frozen, then trained for three more."""
    model = embedding()
    optimizer = warm(model, adamw)
    model[0].weight.data[ROWS] = 0
    held = way(model, ROWS)
    adopt(optimizer, held)
    before = held.trained().detach().clone()
    if guarded:
        train(held, held.protect(optimizer))
        assert (held.trained() != before).any() != isinstance(held, RequiresGrad)
        return held
    for _ in range(3):
        backward(held.model)
        optimizer.step()
    return held


# --------------------------------------------------------------------------------------------------------------------
# Held


@ways
def test_the_forward_holds(way: type[Way], said: str) -> None:
    assert _verdict(_frozen_in_mid_training(way).computed()[:4]) == said


@ways
def test_what_is_stored_holds(way: type[Way], said: str) -> None:
    assert _verdict(_frozen_in_mid_training(way).stored()[:4]) == said


@ways
def test_the_forward_holds_under_an_unguarded_optimizer(way: type[Way], said: str) -> None:
    assert _verdict(_frozen_in_mid_training(way, guarded=False).computed()[:4]) == said


@ways
def test_what_is_stored_holds_under_an_unguarded_optimizer(way: type[Way], said: str) -> None:
    assert _verdict(_frozen_in_mid_training(way, guarded=False).stored()[:4]) == said


@ways
def test_values_other_than_0_hold(way: type[Way], said: str) -> None:
    held = way(embedding(0.5), ROWS)
    train(held, held.protect(sgd(held.trainable())))
    assert _verdict(held.computed()[:4], 0.5) == said


@ways
def test_a_single_weight_of_a_convolution_can_be_held(way: type[Way], said: str) -> None:
    model: Any = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten())
    model[0].weight.data[0, 0, 1, 1] = 0
    only = torch.zeros(2, 1, 3, 3, dtype=torch.bool)
    only[0, 0, 1, 1] = True
    if way is PeftTokens:
        with pytest.raises(AttributeError, match="in_features"):
            way(model, only)
        assert said == NO
        return
    held = way(model, only)
    before = held.computed().detach().clone()
    optimizer = held.protect(sgd(held.trainable()))
    held.model(torch.ones(1, 1, 5, 5)).square().sum().backward()
    held.step(optimizer)
    moved = held.computed() != before
    assert _yes(bool(moved.any()) and not bool(moved[only].any())) == said


# --------------------------------------------------------------------------------------------------------------------
# Undisturbed


@ways
def test_gradients_are_zero_as_backward_returns(way: type[Way], said: str) -> None:
    held = way(embedding(), ROWS)
    backward(held.model)
    gradient = held.stored().grad
    assert _verdict(None if gradient is None else gradient[:4]) == said


@ways
def test_gradients_are_zero_where_inf_comes_in(way: type[Way], said: str) -> None:
    held = way(embedding(), ROWS)
    if way is RequiresGrad:
        assert not held.stored().requires_grad
        assert said == SAME
        return
    scale = torch.where(ROWS, torch.inf, 1.0)
    (held.model[0](torch.arange(6)) * scale).sum().backward()
    gradient = held.stored().grad
    assert _verdict(None if gradient is None else gradient[:4]) == said


@ways
def test_clipping_sees_the_free_entries_alone(way: type[Way], said: str) -> None:
    held = way(embedding(), ROWS)
    backward(held.model)
    free = held.trained().grad
    others = [parameter.grad for parameter in held.model[1].parameters()]
    rows = [] if free is None else [free[-2:]]
    expected = torch.cat([gradient.flatten() for gradient in [*rows, *others]]).norm()
    assert _yes(bool(clip_grad_norm_(held.trainable(), 1.0).isclose(expected, rtol=1e-5))) == said


class _Constant(nn.Embedding):
    """Computes with constants at the frozen rows: the reference for the free ones."""

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.embedding(tokens, torch.where(ROWS, 0.0, self.weight))


def _trained_with_constants(model: Any, optimizer: Optimizer) -> Any:
    copied, again = copy.deepcopy((model, optimizer))
    copied[0].__class__ = _Constant
    for _ in range(3):
        backward(copied)
        again.step()
    return copied


def _follows(way: type[Way], before: Callable[[nn.Module], Optimizer]) -> str:
    model = embedding()
    optimizer = before(model)
    model[0].weight.data[ROWS] = 0
    expected = _trained_with_constants(model, optimizer)
    held = way(model, ROWS)
    if way is RequiresGrad:
        return NONE
    adopt(optimizer, held)
    train(held, held.protect(optimizer))
    same = held.computed()[4:].allclose(expected[0].weight[4:]) and held.model[1].weight.allclose(expected[1].weight)
    return _yes(same)


@ways
def test_free_entries_train_beside_constants_from_the_start(way: type[Way], said: str) -> None:
    assert _follows(way, lambda model: adamw(model.parameters())) == said


@ways
def test_free_entries_train_beside_constants_from_mid_training(way: type[Way], said: str) -> None:
    assert _follows(way, lambda model: warm(model, adamw)) == said


# --------------------------------------------------------------------------------------------------------------------
# Unobtrusive


@ways
def test_keys_are_those_of_the_plain_model(way: type[Way], said: str) -> None:
    held = way(embedding(), ROWS)
    assert _yes(list(held.model.state_dict()) == list(embedding().state_dict())) == said


def _loads(model: nn.Module, state: dict[str, Any]) -> str:
    if model.state_dict().keys() == state.keys():
        model.load_state_dict(state)
        return SAME
    with pytest.raises(RuntimeError, match=r"(Missing|Unexpected) key\(s\)"):
        model.load_state_dict(state)
    return NO


@ways
def test_a_plain_checkpoint_loads(way: type[Way], said: str) -> None:
    assert _loads(way(embedding(), ROWS).model, embedding().state_dict()) == said


@ways
def test_its_checkpoint_loads_into_a_plain_model(way: type[Way], said: str) -> None:
    assert _loads(embedding(), way(embedding(), ROWS).model.state_dict()) == said


@ways
def test_a_deep_copy_is_held_in_its_forward(way: type[Way], said: str) -> None:
    held = way(embedding(), ROWS)
    if way is Prune:
        with pytest.raises(RuntimeError, match="deepcopy protocol"):
            copy.deepcopy(held.model)
        assert said == NO
        return
    held.model = copy.deepcopy(held.model)
    optimizer = sgd(held.trainable())
    for _ in range(3):
        backward(held.model)
        optimizer.step()
    assert _verdict(held.computed()[:4]) == said


@ways
def test_the_model_compiles_in_one_graph_and_holds(way: type[Way], said: str) -> None:
    held = way(embedding(), ROWS)
    torch.compiler.reset()
    compiled = torch.compile(held.model, backend="eager", fullgraph=True)
    optimizer = held.protect(sgd(held.trainable()))
    if way is Sparsifier:
        with pytest.raises(torch._dynamo.exc.Unsupported):
            train(held, optimizer, forward=compiled)
        assert said == NO
        return
    train(held, optimizer, forward=compiled)
    assert _verdict(held.computed()[:4]) == said


@ways
def test_it_can_be_taken_away_again(way: type[Way], said: str) -> None:
    held = way(embedding(), ROWS)
    train(held, held.protect(sgd(held.trainable())))
    held.remove()
    assert list(held.model.state_dict()) == list(embedding().state_dict())
    optimizer = sgd(held.model.parameters())
    backward(held.model)
    optimizer.step()
    assert _yes(bool((held.model[0].weight[:4] != 0).all())) == said


# --------------------------------------------------------------------------------------------------------------------
# Costs


def _remembered(held: Way) -> int:
    """How many entries AdamW remembers of the weight, in each of its two moments."""
    optimizer = adamw(held.trainable())
    if isinstance(held, FreezeHooks):
        compact = MaskedOptimizer(optimizer, held.handle, compact=True)
        train(held, compact)
        state: dict[str, Any] = compact.state_dict(compact=True)["state"][0]
    else:
        train(held, optimizer)
        state = optimizer.state.get(held.trained(), {})
    return max((value.numel() for value in state.values() if isinstance(value, Tensor)), default=0)


@ways
def test_optimizer_state_is_of_the_free_entries_alone(way: type[Way], said: str) -> None:
    assert _yes(_remembered(way(embedding(), ROWS)) <= 6) == said


@ways
def test_no_gradient_is_computed_for_frozen_entries(way: type[Way], said: str) -> None:
    held = way(embedding(), ROWS)
    backward(held.model)
    assert _yes(held.stored().grad is None) == said


@ways
def test_the_forward_gets_smaller(way: type[Way], said: str) -> None:
    assert _yes(way(embedding(), ROWS).computed().shape != (6, 3)) == said


def _measured(scenario: str) -> list[str]:
    """The figures in a row of the performance page: default, compact, prune, parametrize, mask around the step."""
    page = (TESTS.parent / "docs" / "performance.md").read_text()
    (row,) = re.findall(rf"^\| {re.escape(scenario)} \|(.*)\|", page, re.MULTILINE)
    return [cell.strip() for cell in row.split("|")][:5]


def test_the_figures_are_those_of_the_page_on_performance() -> None:
    (section,) = re.findall(r"## What it costs\n(.*?)\n## ", PAGE, re.DOTALL)
    center = _measured("center of every 3x3 kernel, residual net, AdamW")
    half = _measured("half at 0, six 1024x1024, AdamW")
    rows = _measured("all but 16 rows of a 50,273x768 embedding, AdamW")
    (of_peft,) = re.findall(r"trainable tokens take (\d\.\d+)", (TESTS.parent / "docs" / "performance.md").read_text())
    assert re.findall(r"\d+\.\d+", section) == [center[0], *center[2:], *half, *rows[:2], of_peft]


# --------------------------------------------------------------------------------------------------------------------
# What a column of yes and no does not show


def _peft_tokens() -> PeftTokens:
    held = PeftTokens(embedding(), ROWS)
    train(held, sgd(held.trainable()))
    return held


def test_peft_saves_the_learned_rows_alone(peft: Any) -> None:
    saved = peft.get_peft_model_state_dict(_peft_tokens().wrapped)
    assert {name: tensor.shape for name, tensor in saved.items() if "tokens" in name} == {
        "base_model.model.0.trainable_tokens_delta": (2, 3)
    }


def test_peft_switches_its_rows_off_and_on() -> None:
    held = _peft_tokens()
    learned = held.wrapped(torch.arange(6)).detach()
    with held.wrapped.disable_adapter():
        assert held.wrapped(torch.tensor([4])).equal(held.model[1](held.stored()[[4]]))
        assert not held.wrapped(torch.arange(6)).equal(learned)
    assert held.wrapped(torch.arange(6)).equal(learned)


def test_peft_trains_tokens_beside_low_rank_updates(peft: Any) -> None:
    model = embedding()
    before = copy.deepcopy(model.state_dict())
    config = peft.LoraConfig(r=2, target_modules=["1"], trainable_token_indices={"0": [4, 5]})
    wrapped = peft.get_peft_model(model, config)
    optimizer = sgd([parameter for parameter in wrapped.parameters() if parameter.requires_grad])
    backward(wrapped)
    optimizer.step()
    merged = wrapped.merge_and_unload().state_dict()
    assert merged["0.weight"][:4].equal(before["0.weight"][:4])
    assert not merged["0.weight"][4:].equal(before["0.weight"][4:])
    assert not merged["1.weight"].equal(before["1.weight"])


def test_peft_asks_for_transformers_and_this_library_for_torch_alone(peft: Any) -> None:
    def needs(package: str) -> set[str]:
        asked = [line for line in importlib.metadata.requires(package) or [] if "extra ==" not in line]
        return {re.split(r"[^\w-]", line)[0] for line in asked}

    assert {"torch", "transformers", "accelerate"} <= needs(peft.__name__)
    assert needs("freezehooks") == {"torch"}


def test_prune_chooses_over_several_layers_at_once_and_by_channels() -> None:
    large, small = nn.Linear(4, 4), nn.Linear(4, 4)
    large.weight.data.fill_(2)
    small.weight.data.fill_(1)
    prune.global_unstructured([(large, "weight"), (small, "weight")], prune.L1Unstructured, amount=0.5)
    assert (int(large.weight.count_nonzero()), int(small.weight.count_nonzero())) == (16, 0)
    layer = nn.Linear(4, 4)
    prune.ln_structured(layer, "weight", amount=1, n=2, dim=0)
    assert sorted(layer.weight.count_nonzero(dim=1).tolist()) == [0, 4, 4, 4]


def test_smallest_chooses_in_each_parameter_by_itself() -> None:
    model: Any = nn.ModuleDict({"large": nn.Linear(4, 4), "small": nn.Linear(4, 4)})
    model["large"].weight.data.fill_(2)
    frozen = freeze_entries(model, "*.weight[smallest(0.5)] = 0")
    assert {name: int(part.frozen.sum()) for name, part in frozen.items()} == {"large.weight": 8, "small.weight": 8}


@held_twice
def test_prune_adds_masks_up_and_so_do_handles() -> None:
    pruned, frozen = nn.Linear(4, 4), nn.Linear(4, 4)
    for _ in range(2):
        prune.l1_unstructured(pruned, "weight", amount=0.5)
    for fraction in (0.5, 0.75):
        freeze_entries(frozen, f"weight[smallest({fraction})] = 0")
    assert int(pruned.weight.count_nonzero()) == int(frozen.weight.count_nonzero()) == 4


def test_prune_takes_a_mask_that_removes_nothing_and_freezing_refuses_it() -> None:
    layer = nn.Linear(4, 4)
    prune.custom_from_mask(layer, "weight", torch.ones(4, 4))
    with pytest.raises(RegionError, match="the region selects no entry"):
        freeze_entries(nn.Linear(4, 4), {"weight": torch.zeros(4, 4, dtype=torch.bool)})


def test_parametrize_holds_what_is_no_constant() -> None:
    layer: Any = parametrizations.orthogonal(nn.Linear(3, 3))
    optimizer = sgd(layer.parameters())
    layer(torch.ones(3)).sum().backward()
    optimizer.step()
    assert (layer.weight.T @ layer.weight).allclose(torch.eye(3), atol=1e-5)


def test_the_sparsifier_keeps_its_mask_out_of_the_model_s_checkpoint() -> None:
    held = Sparsifier(embedding(), ROWS)
    assert not any("mask" in name for name in held.model.state_dict())
    saved = held.sparsifier.state_dict()["state"]
    assert saved["0.weight"]["mask"].equal(held.free)


def test_lightning_s_pruning_is_that_of_torch_and_is_made_permanent() -> None:
    pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import ModelPruning

    model = embedding()
    pruning = ModelPruning(
        "l1_unstructured", parameters_to_prune=[(model[1], "weight")], amount=0.5, use_global_unstructured=False
    )
    pruning.apply_pruning(0.5)
    assert "1.weight_orig" in model.state_dict()
    pruning.make_pruning_permanent(model)
    assert list(model.state_dict()) == ["0.weight", "1.bias", "1.weight"]
    assert int(model[1].weight.count_nonzero()) == 3


def test_lightning_s_finetuning_freezes_whole_modules() -> None:
    pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import BaseFinetuning

    model = embedding()
    optimizer = sgd(model[1].parameters())
    BaseFinetuning.freeze(model[0])
    assert not model[0].weight.requires_grad
    BaseFinetuning.unfreeze_and_add_param_group(model[0], optimizer, train_bn=False)
    assert model[0].weight.requires_grad
    assert any(model[0].weight is parameter for group in optimizer.param_groups for parameter in group["params"])


# --------------------------------------------------------------------------------------------------------------------
# The page


@cache
def _tests_in(name: str) -> set[str]:
    return {node.name for node in ast.parse((TESTS / name).read_text()).body if isinstance(node, ast.FunctionDef)}


def test_the_tables_are_found() -> None:
    assert VERDICTS[0] == ["claim", *(way.title for way in WAYS)]
    assert len(VERDICTS) > 20
    assert [row[0] for row in EVIDENCE] == [row[0] for row in VERDICTS[2:]]
    assert len(OTHERS) > 12


@pytest.mark.parametrize("row", [*EVIDENCE, *OTHERS], ids=lambda row: row[0][:60])
def test_every_row_names_tests_that_exist_or_a_source(row: list[str]) -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row[-1])
    assert named or re.search(r"https://\S+|\[.+\]\(\w+\.md\)", row[-1])
    assert [(file, test) for file, test in named if test not in _tests_in(file)] == []
    assert all(row)


@pytest.mark.parametrize("row", VERDICTS[2:], ids=lambda row: row[0][:60])
def test_every_cell_says_yes_or_no(row: list[str]) -> None:
    assert set(row[1:]) <= {SAME, ZERO, NO, NONE}


def test_every_test_of_all_ways_has_its_row() -> None:
    tree = ast.parse(Path(__file__).read_text()).body
    of_ways = {
        node.name
        for node in tree
        if isinstance(node, ast.FunctionDef)
        and any(isinstance(mark, ast.Name) and mark.id == "ways" for mark in node.decorator_list)
    }
    assert of_ways == set(re.findall(r"::(test_\w+)`", "\n".join(row[-1] for row in EVIDENCE)))
