"""The table in docs/frameworks.md, claim by claim for each framework."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from freezehooks import UnsupportedOptimizerError, freeze_entries

from .claims import assert_entries_hold, same_bits
from .trainers import FRAMEWORKS, BitsAndBytes, Framework, TorchAO

os.environ.setdefault("KERAS_BACKEND", "torch")

pytestmark = pytest.mark.filterwarnings("ignore")  # of the frameworks, about themselves and about one another

ROOT = Path(__file__).parents[1]

every_framework = pytest.mark.parametrize("kind", FRAMEWORKS.values(), ids=FRAMEWORKS)

_COMPACT = {name: kind for name, kind in FRAMEWORKS.items() if kind.has_compact}
every_framework_of_torch = pytest.mark.parametrize("kind", _COMPACT.values(), ids=_COMPACT)


def _watch(training: Framework) -> tuple[Callable[[], None], list[int]]:
    """Return a function that checks the promise after a step, and the list that it appends to."""
    steps: list[int] = []

    def look() -> None:
        assert_entries_hold(training.weights(), training.held, "after a step")
        steps.append(len(steps))

    return look, steps


def _by_hand(training: Framework) -> Callable[[], None]:
    """Zero gradients in hooks, and return a function that writes the values after a step, as users do without us."""

    def rewrite() -> None:
        for name, part in training.held.items():
            training.weights()[name].data[part.frozen] = part.values[part.frozen]

    for name, part in training.held.items():
        training.weights()[name].register_hook(lambda gradient, frozen=part.frozen: gradient.masked_fill(frozen, 0))
    rewrite()
    return rewrite


def _assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        assert same_bits(found[name].detach(), tensor.detach()), name


@every_framework
def test_entries_hold_after_every_step(kind: type[Framework], tmp_path: Path) -> None:
    training = kind(tmp_path)
    before = {name: tensor.detach().clone() for name, tensor in training.weights().items()}
    look, steps = _watch(training)
    training.fit(2, look)
    assert len(steps) == 6
    training.check()
    for name, part in training.held.items():
        assert bool((training.weights()[name] != before[name])[~part.frozen].any())


def test_the_watch_can_fail(tmp_path: Path) -> None:
    training = FRAMEWORKS["ignite"](tmp_path, frozen=False)
    with pytest.raises(AssertionError, match="drifted after a step"):
        training.fit(1, _watch(training)[0])


@every_framework
def test_free_entries_train_as_where_values_are_rewritten_by_hand(kind: type[Framework], tmp_path: Path) -> None:
    training, plain = kind(tmp_path / "frozen"), kind(tmp_path / "plain", frozen=False)
    training.fit(2, lambda: None)
    plain.fit(2, _by_hand(plain))
    _assert_same(training.weights(), plain.weights())


@every_framework
def test_a_resumed_training_equals_one_that_was_never_interrupted(kind: type[Framework], tmp_path: Path) -> None:
    whole, first, second = (kind(tmp_path / name) for name in ("whole", "first", "second"))
    checkpoint = tmp_path / "saved"
    checkpoint.mkdir()
    whole.fit(2, lambda: None)
    first.fit(1, lambda: None)
    first.save(checkpoint)
    with torch.no_grad():
        for parameter in second.model.parameters():
            parameter.add_(0.125)  # what is resumed from says all
    second.load(checkpoint)
    second.fit(1, _watch(second)[0])
    _assert_same(second.weights(), whole.weights())


@every_framework_of_torch
def test_an_optimizer_that_holds_the_free_entries_alone_takes_the_same_steps(
    kind: type[Framework], tmp_path: Path
) -> None:
    whole, compact = kind(tmp_path / "whole"), kind(tmp_path / "compact", compact=True)
    whole.fit(2, lambda: None)
    compact.fit(2, _watch(compact)[0])
    for name, tensor in whole.weights().items():
        torch.testing.assert_close(compact.weights()[name], tensor)


@pytest.mark.parametrize("kind", [BitsAndBytes, TorchAO], ids=["bitsandbytes", "torchao_8bit"])
def test_an_optimizer_in_few_bits_is_refused_in_compact_mode(kind: type[Framework], tmp_path: Path) -> None:
    training = kind(tmp_path, compact=True)
    with pytest.raises(UnsupportedOptimizerError, match="entry by entry"):
        training.fit(1, lambda: None)


def _in_few_bits(kind: str, parameters: Any) -> Optimizer:
    if kind == "bitsandbytes":
        optim = pytest.importorskip(kind).optim
        optim.GlobalOptimManager.get_instance().initialize()  # it knows embeddings of other tests by their ids
        optimizer: Optimizer = optim.AdamW8bit(parameters, min_8bit_size=16)
    else:
        optimizer = getattr(pytest.importorskip("torchao.optim"), kind)(parameters)
    return optimizer


def _bits(optimizer: Optimizer) -> bytes:
    stream = io.BytesIO()
    torch.save(optimizer.state_dict(), stream)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["bitsandbytes", "AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_state_in_few_bits_is_never_written_to(kind: str) -> None:
    layer = nn.Linear(64, 64, bias=False)
    optimizer = _in_few_bits(kind, layer.parameters())
    with torch.compiler.set_stance("force_eager"):
        for _ in range(2):
            layer(torch.randn(5, 64)).square().sum().backward()
            optimizer.step()
    before = _bits(optimizer)
    assert len(before) < 2 * layer.weight.nbytes  # whole moments would be as much
    frozen = freeze_entries(layer, "weight[:3] = 0.5")
    frozen.guard(optimizer)
    assert _bits(optimizer) == before
    frozen.thaw("weight[0]")
    frozen.remove()
    assert _bits(optimizer) == before
    optimizer.load_state_dict(torch.load(io.BytesIO(before), weights_only=False))
    assert _bits(optimizer) == before


def test_the_versions_in_the_table_are_those_that_are_tested() -> None:
    pins = "".join((ROOT / name).read_text() for name in ("constraints.txt", "constraints-frameworks.txt"))
    rows = [
        line for line in (ROOT / "docs" / "frameworks.md").read_text().splitlines() if re.match(r"\| .*\d \|$", line)
    ]
    assert len(rows) > 10
    for row in rows:
        name, version = row.split("|")[-2].split()
        assert f"\n{name}=={version}" in pins


def test_the_page_names_tests_that_exist() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "docs" / "frameworks.md").read_text())
    assert len(named) >= 7
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), test
