"""A run resumes bit for bit from checkpoints as people write them, with a test for each row of docs/checkpoints.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from freezehooks import FrozenEntries, MaskedOptimizer, freeze_entries

from .claims import same_bits
from .draws import randn

PLAIN = "0.weight[:, ::2] = 0.1\n0.bias[1]"
SPEC = f"{PLAIN}\n2[smallest(0.5)] = -0.0"
Run = tuple[nn.Module, MaskedOptimizer, FrozenEntries]


def _net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)


def _run(spec: str = SPEC, *, seed: int = 3, state: Any = None, compact: bool = False) -> Run:
    model = _net(seed)
    frozen = freeze_entries(model, spec, state=state)
    return model, MaskedOptimizer(_optimizer(model), frozen, compact=compact), frozen


def _train(run: Run, steps: range) -> None:
    model, optimizer, _ = run
    for step in steps:
        batch = randn(5, 4, seed=step)
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


def _assert_goes_on(resumed: Run, run: Run) -> None:
    """Claim: a resumed run trains like the one that was not interrupted, bit for bit, and holds the same entries."""
    for each in (run, resumed):
        _train(each, range(3, 6))
        each[2].assert_frozen()
    for ours, theirs in zip(resumed[0].parameters(), run[0].parameters(), strict=True):
        assert same_bits(ours, theirs)
    for name, part in run[2].items():
        assert resumed[2][name].frozen.equal(part.frozen)
        assert same_bits(resumed[2][name].values, part.values)


compactness = pytest.mark.parametrize("compact", [False, True], ids=["masked", "compact"])


@pytest.fixture
def first(compact: bool) -> Run:
    run = _run(compact=compact)
    _train(run, range(3))
    return run


@compactness
@pytest.mark.parametrize("small", [False, True], ids=["plain_state", "small_state"])
def test_a_dict_of_torch_save_goes_on_at_weights_only(first: Run, compact: bool, small: bool, tmp_path: Path) -> None:
    model, optimizer, frozen = first
    state = optimizer.state_dict(compact=True) if small else optimizer.state_dict()
    parts = {"model": model.state_dict(), "optimizer": state, "frozen": frozen.state_dict()}
    torch.save(parts, tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    resumed = _run(seed=4, state=saved["frozen"], compact=compact)
    resumed[0].load_state_dict(saved["model"])
    resumed[1].load_state_dict(saved["optimizer"])
    _assert_goes_on(resumed, first)


@compactness
def test_the_same_dict_may_be_loaded_into_a_run_that_stands(first: Run, compact: bool, tmp_path: Path) -> None:
    model, optimizer, frozen = first
    parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "frozen": frozen.state_dict()}
    torch.save(parts, tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    resumed = _run(seed=4, compact=compact)
    resumed[2].load_state_dict(saved["frozen"])  # the first: it says which entries the others are about
    resumed[0].load_state_dict(saved["model"])
    resumed[1].load_state_dict(saved["optimizer"])
    _assert_goes_on(resumed, first)


@compactness
def test_a_handle_s_state_that_comes_last_and_lets_go_what_was_frozen_is_said(first: Run, compact: bool) -> None:
    model, optimizer, frozen = first
    late = _run(seed=4, compact=compact)
    late[0].load_state_dict(model.state_dict())
    late[1].load_state_dict(optimizer.state_dict())
    count = int((late[2]["2.weight"].frozen & ~frozen["2.weight"].frozen).sum())
    with pytest.warns(
        UserWarning, match=rf"frees {count} entries of `2\.weight` that were .*; load the handle's state"
    ):
        late[2].load_state_dict(frozen.state_dict())
    late[2].load_state_dict(frozen.state_dict())  # it frees nothing now
    other = _run(seed=5, compact=compact)[2].state_dict()
    _train(late, range(1))
    late[2].load_state_dict(other)  # in mid-training, as it is meant


@compactness
@pytest.mark.parametrize("is_plain", [True, False], ids=["plain_optimizer", "frozen_run"])
def test_model_and_optimizer_alone_go_on_where_rules_are_written(compact: bool, is_plain: bool, tmp_path: Path) -> None:
    """Without the handle's state: regions are chosen again, and `keep` follows the weights that are loaded."""
    run = _run(PLAIN, compact=compact)
    _train(run, range(3))
    torch.save({"model": run[0].state_dict(), "optimizer": run[1].state_dict()}, tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    if is_plain:  # as someone who knows nothing about freezing loads it
        plain = _net(4)
        plain.load_state_dict(saved["model"])
        _optimizer(plain).load_state_dict(saved["optimizer"])
    resumed = _run(PLAIN, seed=4, compact=compact)
    resumed[0].load_state_dict(saved["model"])
    resumed[1].load_state_dict(saved["optimizer"])
    _assert_goes_on(resumed, run)


def _states(run: Run) -> dict[str, Any]:
    model, optimizer = get_state_dict(run[0], run[1])
    return {"model": model, "optimizer": optimizer, "frozen": run[2]}


@compactness
@pytest.mark.parametrize("chosen", [False, True], ids=["written", "chosen_by_numbers"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:torch.distributed")
def test_distributed_checkpoints_of_one_process_go_on(compact: bool, chosen: bool, tmp_path: Path) -> None:
    spec = SPEC if chosen else PLAIN
    run = _run(spec, compact=compact)
    _train(run, range(3))
    save(_states(run), checkpoint_id=tmp_path)
    torch.save(run[2].state_dict(), tmp_path / "frozen.pt")  # beside it, for regions that numbers chose
    state = torch.load(tmp_path / "frozen.pt", weights_only=True) if chosen else None
    resumed = _run(spec, seed=4, state=state, compact=compact)
    states = _states(resumed)
    load(states, checkpoint_id=tmp_path)
    set_state_dict(resumed[0], resumed[1], model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    _assert_goes_on(resumed, run)


def test_safetensors_hold_the_weights_with_the_values_in_them(tmp_path: Path, device: torch.device) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    run = _run()
    _train(run, range(3))
    run[0].get_parameter("0.weight").data.fill_(7)  # a stray write
    safetensors.save_file(run[0].state_dict(), tmp_path / "model.safetensors")
    weights = safetensors.load_file(tmp_path / "model.safetensors", str(device))
    assert sorted(weights) == sorted(_net(4).state_dict())
    for name, part in run[2].items():
        assert same_bits(weights[name][part.frozen], part.values)
    resumed = _run(PLAIN, seed=4)
    resumed[0].load_state_dict(weights)
    assert same_bits(resumed[0].state_dict()["0.bias"], weights["0.bias"])  # `keep` follows


def _tied() -> nn.Module:
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    model[1].weight = model[0].weight
    return model


def test_safetensors_of_a_model_with_tied_weights_hold(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model, other = _tied(), _tied()
    freeze_entries(model, "0.weight[0] = 0.5")
    model.get_parameter("0.weight").data.fill_(7)
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    safetensors.load_model(other, str(tmp_path / "model.safetensors"))
    assert other.get_parameter("1.weight")[0].tolist() == [0.5] * 4


def test_a_handle_in_a_pickle_is_refused_at_weights_only(tmp_path: Path) -> None:
    """Saving `frozen` instead of `frozen.state_dict()` pickles the model a second time."""
    torch.save({"frozen": _run()[2]}, tmp_path / "run.pt")
    with pytest.raises(Exception, match="freezehooks"):
        torch.load(tmp_path / "run.pt", weights_only=True)


def test_every_row_of_the_page_names_tests_that_exist() -> None:
    root = Path(__file__).parents[1]
    rows = [line for line in (root / "docs" / "checkpoints.md").read_text().splitlines() if "::test_" in line]
    named = [re.findall(r"`(test_\w+\.py)::(test_\w+)`", row) for row in rows]
    assert len(rows) >= 7
    assert all(named)
    missing = [
        (file, test) for row in named for file, test in row if f"def {test}(" not in (root / "tests" / file).read_text()
    ]
    assert missing == []
