"""`freezehooks demo` measures what it prints: a gradient hook alone lets weights drift, and freezehooks does not."""

from __future__ import annotations

import json
import re

import pytest
import torch

from freezehooks.cli import demo, main


def test_weights_drift_under_the_hook_alone_and_hold_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo"]) == 0
    rows = re.findall(r"^(SGD|AdamW)\b.* (\d\.\d{3}) +(\d\.\d{3})$", capsys.readouterr().out, re.MULTILINE)
    assert [name for name, _, _ in rows] == ["SGD", "AdamW"]
    for _, hook_alone, held in rows:
        assert float(hook_alone) > 0.05
        assert held == "0.000"


def test_the_numbers_for_a_program_are_exact(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--steps", "5", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["steps"] == 5
    assert [row["freezehooks"] for row in told["drift"]] == [0, 0]


def test_drift_here_would_be_a_no(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_drift", lambda make, masked, steps: 0.5)
    assert main(["demo", "--quiet"]) == 1


def test_it_leaves_the_random_numbers_of_its_caller_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    main(["demo", "--steps", "1", "--quiet"])
    assert torch.rand(2).equal(expected)
