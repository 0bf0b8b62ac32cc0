"""Every example runs, with few steps, and says what it is there to say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lightning")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).parents[1] / "examples"


def _run(name: str, *options: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run_here() -> None:
    source = Path(__file__).read_text()
    assert [path.name for path in EXAMPLES.glob("*.py") if f'_run("{path.name}"' not in source] == []


def test_digits_holds_the_centre_and_draws_it(tmp_path: Path) -> None:
    picture = tmp_path / "kernels.png"
    output = _run("digits_lightning.py", "--epochs", "1", "--picture", str(picture))
    assert "cnn4_dilation.weight[center] = 0     128  1,024" in output
    assert "largest drift of the centre after any step: 0.0" in output
    assert re.search(r"accuracy on 359 held-out digits: \d+\.\d%", output)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_digits_takes_another_rule(tmp_path: Path) -> None:
    output = _run(
        "digits_lightning.py", "--epochs", "1", "--picture", str(tmp_path / "k.png"), "--rule", "cnn1[border] = 0"
    )
    assert "largest drift of the centre after any step: 0.0" not in output


def test_pinned_weight_moves_only_while_it_is_free() -> None:
    output = _run("pin_one_weight.py", "--steps", "20")
    found = dict(re.findall(r"^(\w[\w ]+?)  +weight\[0, 1, 2, 1\] = (\d\.\d+)", output, re.MULTILINE))
    assert found["frozen"] == found["attached"] == found["and trained"] == "1.000000"
    assert found["never frozen"] != "1.000000"
    assert found["detached"] != "1.000000"


def test_wrapped_optimizers_do_not_drift() -> None:
    rows = re.findall(r"(\d\.\d{6}) +(\d\.\d{6})$", _run("wrap_optimizer.py", "--steps", "10"), re.MULTILINE)
    assert len(rows) == 2
    for hook_alone, masked in rows:
        assert float(hook_alone) > 0.001
        assert masked == "0.000000"


def test_pruned_weights_stay_pruned() -> None:
    output = _run("keep_pruned.py", "--steps", "20")
    sparsity = dict(re.findall(r"^(\w[\w, -]+?)  +sparsity +(\d+\.\d)%", output, re.MULTILINE))
    assert sparsity["pruned"] == sparsity["fine-tuned, zeros frozen"] == "80.0"
    assert float(sparsity["fine-tuned, nothing frozen"]) < 80
