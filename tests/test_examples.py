"""Every example runs, with few steps, and prints what it should."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from freezehooks import MaskedOptimizer
from freezehooks.cli import main

from .parallel import computes_in_shards

needs_compact = pytest.mark.skipif(
    "compact" not in inspect.signature(MaskedOptimizer).parameters, reason="MaskedOptimizer keeps no compact state yet"
)

EXAMPLES = Path(__file__).parents[1] / "examples"


def _lacking(name: str) -> list[str]:
    """Return the missing packages that an example imports, even inside a function."""
    source = (EXAMPLES / name).read_text()
    nodes = list(ast.walk(ast.parse(source)))
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    needed = {module.split(".")[0] for module in modules} | ({"matplotlib"} if ".plot(" in source else set())
    return sorted(package for package in needed if importlib.util.find_spec(package) is None)


def _run(name: str, *options: str, ranks: int = 0) -> str:
    if lacking := _lacking(name):
        pytest.skip(f"the example needs {', '.join(lacking)}")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    command = [sys.executable, *launcher, str(EXAMPLES / name), *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            output, errors = process.communicate(timeout=300)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the ranks too, where they hang
    assert process.returncode == 0, errors
    return output


def _names() -> list[str]:
    return [path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.py")]


def test_every_example_is_run_here() -> None:
    source = Path(__file__).read_text()
    assert [path for path in _names() if f'_run("{path}"' not in source] == []


def test_digits_holds_the_center_beside_plain_training_and_draws_it(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "outputs"
    output = _run("digits_lightning.py", "--epochs", "1", "--outputs", str(folder))
    assert output.count("cnn4_dilation.weight[center] = 0     128  1,024") == 1
    plain, frozen = re.findall(r"farthest a center of cnn4_dilation was from 0 +(\S+) +(\S+)$", output, re.MULTILINE)[0]
    assert float(plain) > 0.05
    assert frozen == "0.000"
    assert re.search(r"accuracy on 359 held-out digits +\d+\.\d% +\d+\.\d%", output)
    for name in ("kernel_over_epochs.png", "cnn4_dilation.weight.png"):
        assert str(folder / name) in output
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_digits_leaves_out_what_lightning_says_of_itself(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "digits_lightning.py"), "--epochs", "1", "--outputs", str(tmp_path)]
    if lacking := _lacking("digits_lightning.py"):
        pytest.skip(f"the example needs {', '.join(lacking)}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert not re.search(r"GPU available|Tip:|Warning|Seed set|stopped|Modules in", done.stdout + done.stderr)


def test_digits_leaves_what_the_command_line_looks_into(tmp_path: Path) -> None:
    output = _run("digits_lightning.py", "--epochs", "1", "--outputs", str(tmp_path))
    start = torch.load(tmp_path / "digits_start.pt", weights_only=True)
    trained = torch.load(tmp_path / "digits.ckpt", weights_only=True)["state_dict"]
    assert start.keys() == trained.keys()
    assert not bool(start["cnn4_dilation.weight"][..., 1, 1].any())
    assert not bool(trained["cnn4_dilation.weight"][..., 1, 1].any())
    assert (tmp_path / "rules.yaml").read_text() == '- "cnn4_dilation.weight[center] = 0"\n'
    assert f"freezehooks verify {tmp_path}/digits.ckpt --rules {tmp_path}/rules.yaml" in output


def test_digits_s_rule_is_what_a_diff_finds_unchanged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = _run("digits_lightning.py", "--epochs", "1", "--outputs", str(tmp_path))
    command = ["diff", f"{tmp_path}/digits_start.pt", f"{tmp_path}/digits.ckpt", "--limit", "0"]
    assert f"freezehooks {' '.join(command)}" in output
    assert main(command) == 1
    assert capsys.readouterr().out.endswith("--against A`:\ncnn4_dilation.weight[:, :, 1, 1] = 0\n")


def test_digits_takes_another_rule(tmp_path: Path) -> None:
    output = _run("digits_lightning.py", "--epochs", "1", "--outputs", str(tmp_path), "--rule", "cnn1[border]")
    assert not re.search(r"farthest a center of cnn4_dilation was from 0 .* 0\.000$", output, re.MULTILINE)
    assert (tmp_path / "cnn1.weight.png").exists()
    command = ["verify", f"{tmp_path}/digits.ckpt", "--rules", f"{tmp_path}/rules.yaml"]
    command += ["--against", f"{tmp_path}/digits_start.pt"]  # which says what the border held
    assert f"freezehooks {' '.join(command)}\n" in output
    assert main(command) == 0


def test_pinned_weight_moves_only_while_it_is_free() -> None:
    output = _run("pin_one_weight.py", "--steps", "20")
    found = dict(re.findall(r"^(\w[\w ]+?)  +weight\[0, 1, 2, 1\] = (\d\.\d+)", output, re.MULTILINE))
    assert found["frozen"] == found["attached"] == found["and trained"] == "1.000000"
    assert found["never frozen"] != "1.000000"
    assert found["detached"] != "1.000000"


def test_pruned_weights_stay_pruned() -> None:
    output = _run("keep_pruned.py", "--steps", "20")
    sparsity = dict(re.findall(r"^(\w[\w, -]+?)  +sparsity +(\d+\.\d)%", output, re.MULTILINE))
    assert sparsity["pruned"] == sparsity["fine-tuned, zeros frozen"] == "80.0"
    assert float(sparsity["fine-tuned, nothing frozen"]) < 80


def test_masked_taps_stay_absent_and_the_bias_is_where_it_was_put() -> None:
    output = _run("masked_conv3d.py", "--steps", "10")
    found = re.findall(
        r"^(\w[\w, -]+?) +(\d+) of 27 +\S+ +(the bias|exactly 0) +(the bias|exactly 0) .* (\S+)$", output, re.MULTILINE
    )
    rows = {name: (int(taps), first, last, float(drift)) for name, taps, first, last, drift in found}
    assert rows["everywhere"] == (7, "the bias", "the bias", 0)
    assert rows["response"] == (7, "exactly 0", "exactly 0", 0)
    assert rows["tensor, slices 0-3"] == (7, "the bias", "exactly 0", 0)
    assert rows["plain, zeroed once"][3] > 0.01
    assert "from cross(3) and from a tensor: True" in output


def test_the_gradient_reaches_the_generator() -> None:
    output = _run("hypernetwork_conv.py", "--steps", "100")
    norm, codes = re.findall(r"first step: (\d+\.\d+), from (\d+) codes for 64 digits", output)[0]
    assert float(norm) > 0
    assert codes == "64"
    before, after, fixed = (float(loss) for loss in re.findall(r"^  .+ (\d\.\d{6})$", output, re.MULTILINE))
    assert after < fixed < before


def test_the_layer_and_the_rule_learn_the_same_kernel(tmp_path: Path) -> None:
    picture = tmp_path / "kernel.png"
    output = _run("shared_kernel.py", "--steps", "100", "--picture", str(picture))
    assert "the three tied kernels are equal: True" in output
    assert "same to the last bit: True" in output
    assert float(re.findall(r"from the kernel that blurred: (\d\.\d+)", output)[0]) < 0.02
    assert picture.read_bytes().startswith(b"\x89PNG")


@needs_compact
def test_new_token_rows_learn_and_old_ones_stay() -> None:
    output = _run("new_token_rows.py", "--steps", "10")
    heads = dict(re.findall(r"^(tied|untied) head, 10 steps\n((?:  .*\n)+)", output, re.MULTILINE))
    for head, matrices in (("tied", 1), ("untied", 2)):
        entries = matrices * 3 * 64
        assert f"entries that train: {entries} of" in heads[head]
        taken = int(re.findall(r"bytes of optimizer state: ([\d,]+)", heads[head])[0].replace(",", ""))
        assert taken < 3 * 4 * entries
        before, after = re.findall(r"chance of a new token: (\S+) before, (\S+) after", heads[head])[0]
        assert float(after) > float(before)
        assert heads[head].count("320 old rows bit-equal: True; new rows that moved: 3 of 3") == 2


def _assert_as_one_process(output: str) -> None:
    assert "2 ranks against one process, 5 steps" in output
    assert "largest difference of a frozen entry: 0.0e+00" in output
    (free,) = re.findall(r"largest difference of a free entry:   (\S+)", output)
    assert float(free) < 1e-9


def test_two_ranks_train_as_one_process() -> None:
    _assert_as_one_process(_run("distributed/train_ddp.py", "--steps", "5", ranks=2))


@computes_in_shards
def test_two_ranks_with_shards_train_as_one_process() -> None:
    output = _run("distributed/train_fsdp2.py", "--steps", "5", ranks=2)
    _assert_as_one_process(output)
    taken = re.findall(r"take (\d+) bytes, in one process (\d+)", output)
    assert [2 * int(here) for here, _ in taken] == [int(alone) for _, alone in taken] != []


def test_costs_on_many_ranks_are_those_of_the_page() -> None:
    page = (EXAMPLES.parent / "docs" / "distributed.md").read_text()
    assert _run("distributed/costs.py", "--ranks", "64") in page
