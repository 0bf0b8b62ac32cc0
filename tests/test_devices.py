"""The suite runs on the device that is named from outside, but for what is about the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from fnmatch import filter as matching
from pathlib import Path

import pytest
import torch

from .devices import ON_CPU, VARIABLE, default, device_of, on_cpu, why_not
from .draws import rand, randint, randn

TESTS = Path(__file__).parent
NAMES = [file.stem.removeprefix("test_") for file in TESTS.glob("test_*.py")]

_MADE_AT_IMPORT = torch.zeros(2)


def test_tensors_are_on_the_device_of_the_test(device: torch.device) -> None:
    assert torch.zeros(2).device.type == _MADE_AT_IMPORT.device.type == device.type


@on_cpu("to see that the mark is heeded")
def test_what_is_marked_runs_on_the_cpu(device: torch.device) -> None:
    assert torch.zeros(2).device.type == device.type == "cpu"


@pytest.mark.parametrize("pattern", ON_CPU)
def test_what_is_listed_as_about_the_cpu_is_there_and_says_why(pattern: str) -> None:
    assert matching(NAMES, pattern)
    assert ON_CPU[pattern]


def test_a_file_runs_on_the_device_named_unless_it_is_listed(request: pytest.FixtureRequest) -> None:
    assert device_of(request.node, "meta").type == "meta"
    for item in request.session.items:
        name = item.path.stem.removeprefix("test_")
        expected = "meta" if item.path.parent == TESTS and not _is_listed(name) else "cpu"
        assert device_of(item, "meta").type == expected or item.get_closest_marker("on_cpu")


def _is_listed(name: str) -> bool:
    return any(matching([name], pattern) for pattern in ON_CPU)


def _pytest(*options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "--quiet", __file__, *options]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=TESTS.parent, env={**os.environ, **variables}
    )


@pytest.mark.parametrize(
    ("options", "variable"), [(["--device", "nowhere"], ""), ([], "nowhere")], ids=["option", "variable"]
)
def test_a_device_that_is_not_there_ends_the_run_with_one_line(options: list[str], variable: str) -> None:
    done = _pytest(*options, **{VARIABLE: variable})
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    (line,) = done.stderr.split("\n")[:-2]
    assert line.startswith("ERROR: the tests cannot run on `nowhere`: ")
    assert line.endswith(" Leave out --device and FREEZEHOOKS_TEST_DEVICE to run them on the CPU")


def test_a_device_that_holds_no_numbers_will_not_do() -> None:
    assert why_not("cpu") is None
    assert (why_not("meta") or "").startswith("the tests cannot run on `meta`: ")


def test_numbers_drawn_by_a_seed_are_the_same_on_every_device() -> None:
    generator = torch.Generator().manual_seed(3)
    first, second = (torch.randn(2, 3, generator=generator, device="cpu") for _ in range(2))
    assert randn(2, 3, seed=3).cpu().equal(first)
    generator.manual_seed(3)
    assert [randn(2, 3, seed=generator).cpu().equal(wanted) for wanted in (first, second)] == [True, True]


def test_numbers_are_drawn_on_the_cpu_and_moved() -> None:
    with default(torch.device("meta")):
        made = [rand(2, seed=0), randn(2, seed=0, dtype=torch.float64), randint(0, 9, 2, 3, seed=0)]
    assert [(each.device.type, each.dtype, len(each)) for each in made] == [
        ("meta", torch.float32, 2), ("meta", torch.float64, 2), ("meta", torch.int64, 2)]  # fmt: skip
