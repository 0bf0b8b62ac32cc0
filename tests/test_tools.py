"""The project's own tools find what they should."""

from __future__ import annotations

import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest

from tools.check_dist import wrong_for_release, wrong_in_archive, wrong_in_wheel
from tools.check_pins import disagreements
from tools.run_on_torch import constraints, counts, pytest_arguments, releases
from tools.run_on_wheel import user_extras
from tools.run_with_frameworks import PINS, outcomes, packages, table

ROOT = Path(__file__).parents[1]

# Pins


def _checkout(folder: Path) -> Path:
    for name in ("constraints.txt", "constraints-lowest.txt", ".pre-commit-config.yaml", "setup.cfg"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def test_hooks_and_lowest_versions_agree_with_what_the_project_states() -> None:
    assert disagreements(ROOT) == []


def test_a_hook_of_another_version_is_found(tmp_path: Path) -> None:
    hooks = _checkout(tmp_path) / ".pre-commit-config.yaml"
    text, count = re.subn(r"ruff==[\d.]+", "ruff==0.1.2", hooks.read_text(), count=1)
    hooks.write_text(text)
    assert count == 1
    assert [line.split(", in")[0] for line in disagreements(tmp_path)] == [".pre-commit-config.yaml: ruff is 0.1.2"]


def test_a_lowest_version_that_is_not_the_promised_one_is_found(tmp_path: Path) -> None:
    lowest = _checkout(tmp_path) / "constraints-lowest.txt"
    lowest.write_text("torch==2.9.0\nunheard-of==1.0\n")
    assert disagreements(tmp_path) == [
        "constraints-lowest.txt: torch is 2.9.0, in setup.cfg it is 2.6",
        "constraints-lowest.txt: unheard-of is 1.0, in setup.cfg it is not named",
    ]


# What is published

TRACKED = {
    "freezehooks/__init__.py",
    "freezehooks/py.typed",
    "tests/test_errors.py",
    ".ci/run",
    ".gitignore",
    "LICENSE",
}


def test_a_whole_wheel_and_a_whole_archive_pass() -> None:
    info = "freezehooks-1.0.0.dist-info"
    wheel = ["freezehooks/__init__.py", "freezehooks/py.typed", f"{info}/METADATA", f"{info}/licenses/LICENSE"]
    archive = ["freezehooks/__init__.py", "freezehooks/py.typed", "tests/test_errors.py", "LICENSE", "PKG-INFO"]
    assert wrong_in_wheel(wheel, TRACKED) == []
    assert wrong_in_archive([*archive, "freezehooks.egg-info/SOURCES.txt"], TRACKED) == []


def test_what_a_wheel_lacks_and_should_not_hold_is_found() -> None:
    assert wrong_in_wheel(["freezehooks/__init__.py", "tests/test_errors.py"], TRACKED) == [
        "the wheel lacks freezehooks/py.typed",
        "the wheel holds tests/test_errors.py, which it should not",
        "the wheel lacks LICENSE",
    ]


def test_what_a_source_archive_lacks_and_should_not_hold_is_found() -> None:
    names = [*(TRACKED - {"tests/test_errors.py"}), "outputs/model.pt"]
    assert wrong_in_archive(names, TRACKED) == [
        "the source archive lacks tests/test_errors.py",
        "the source archive holds .ci/run, which it should not",
        "the source archive holds .gitignore, which it should not",
        "the source archive holds outputs/model.pt, which it should not",
    ]


def test_a_release_needs_a_plain_version_and_its_part_of_the_changelog() -> None:
    assert wrong_for_release("1.2.0", "# Changelog\n\n## [1.2.0] - 2026-01-31\n") == []
    assert wrong_for_release("1.2.0.dev0", "## [Unreleased]\n") == [
        "1.2.0.dev0 is no version to publish",
        "CHANGELOG.md has no heading `## [1.2.0.dev0] - year-month-day`",
    ]


def test_the_description_for_the_index_links_to_nothing_in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("setuptools")
    given: dict[str, Any] = {}
    monkeypatch.setattr("setuptools.setup", lambda **metadata: given.update(metadata))
    runpy.run_path(str(ROOT / "setup.py"))
    readme = (ROOT / "README.md").read_text()
    assert re.search(r"\]\((?!https?://|#)", readme)  # there is something to take out
    assert not re.search(r"\]\((?!https?://|#)", given["long_description"])
    for linked in re.findall(r"\[([^\[\]]*)\]\(", readme):
        assert linked in given["long_description"]


def test_a_user_is_asked_for_no_development_extra() -> None:
    assert {"cli", "lightning", "plot", "transformers"} <= set(user_extras())
    assert {"test", "docs", "bench"}.isdisjoint(user_extras())


# Several releases of torch


def test_the_tests_run_on_the_oldest_the_pinned_and_the_newest_torch() -> None:
    found = releases()
    assert found[0] == "2.6.0"
    assert f"torch=={found[-2]}" in (ROOT / "constraints.txt").read_text().splitlines()
    assert found[-1] == "newest"


def test_each_release_of_torch_gets_tools_of_its_time_and_no_other_torch() -> None:
    assert "numpy==1.26.0" in constraints("2.6.0")
    assert "numpy==1.26.0" not in constraints("newest")
    assert not [release for release in releases() if re.search("^torch=", constraints(release), re.MULTILINE)]


def test_every_file_of_tests_that_is_left_out_exists() -> None:
    left_out = [argument.split("=")[1] for argument in pytest_arguments() if argument.startswith("--ignore-glob=")]
    assert [pattern for pattern in left_out if not list(ROOT.glob(pattern))] == []


def test_what_pytest_counted_is_said(tmp_path: Path) -> None:
    results = tmp_path / "results.xml"
    assert counts(results) == "pytest did not finish"
    results.write_text('<testsuites><testsuite tests="9" failures="2" errors="1" skipped="1"/></testsuites>')
    assert counts(results) == "5 passed, 3 failed, 1 skipped"


# Frameworks


def test_every_framework_of_the_file_of_pins_is_installed_and_none_is_pinned_twice() -> None:
    assert {"trl", "keras", "opacus", "pytorch-ignite"} <= set(packages())
    pinned = re.findall(r"^([\w-]+)==", "".join((ROOT / name).read_text() for name in PINS), re.MULTILINE)
    assert len(pinned) == len(set(pinned))


def test_the_outcome_of_each_framework_is_counted(tmp_path: Path) -> None:
    results = tmp_path / "results.xml"
    assert outcomes(results) == {}
    case = '<testcase classname="tests.test_{}" name="{}">{}</testcase>'
    cases = [
        ("frameworks", "test_a[keras]", ""),
        ("frameworks", "test_b[keras]", "<failure/>"),
        ("frameworks", "test_b[trl]", "<skipped/>"),
        ("peft", "test_c[False]", ""),
    ]
    results.write_text(f"<testsuites>{''.join(case.format(*each) for each in cases)}</testsuites>")
    went = outcomes(results)
    assert went == {"keras": {"passed": 1, "failed": 1}, "trl": {"skipped": 1}, "peft": {"passed": 1}}
    assert table(went, {"keras": "3.0"}) == [
        "keras  1 passed, 1 failed",
        "trl    1 skipped",
        "peft   1 passed",
        "keras 3.0",
    ]
