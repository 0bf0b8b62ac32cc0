"""`freezehooks explain` says what a rule means: the right words, exact counts, and drawings of them."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from freezehooks import Region, RegionError, Rule, center, entries, nm, parse_rule, smallest
from freezehooks._entries.select import select
from freezehooks._rules.ties import Tie
from freezehooks.cli import main
from freezehooks.cli.drawing import draw
from freezehooks.cli.explain import in_words

from .strategies import combinations, near_indices, patterns, rules, shapes, weights

many = settings(max_examples=100, deadline=None)


def _explained(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["explain", *arguments]) == 0
    return capsys.readouterr().out


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["explain", *arguments]) == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert len(written.err.splitlines()) == 1
    return written.err


# --------------------------------------------------------------------------------------------------------------------
# Words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "conv.weight[~cross] = 0",
            "Every entry of `conv.weight` outside the cross through the middle of the kernel's last two dimensions "
            "is held at 0.",
        ),
        ("c.weight[:, :, 1, 1] = 0.5", "Every entry of `c.weight[:, :, 1, 1]` is held at 0.5."),
        (
            "wte.weight[~50257:]",
            "Every entry of `wte.weight[~50257:]` is held at what it holds when the",
        ),
        (
            "features.*.weight[center] = 0",
            "Every entry of `features.*.weight` in the middle of the kernel is held at",
        ),
        ("bn.weight = 1", "Every entry of `bn.weight` is held at 1."),
        ("b.bias = -0.0", "is held at -0."),
        ("c[center]", "`c` in the middle of the kernel is"),
        ("c[~center]", "`c` outside the middle of the kernel is"),
        ("c[~~center]", "`c` in the middle of the kernel is"),
        ("c[cross(3)]", "`c` on the cross through the middle of the kernel's last three dimensions is"),
        ("c[cross(4)]", "the kernel's last 4 dimensions is"),
        ("c[cross(1)]", "the kernel's last dimension (which is all of it) is"),
        ("c[border]", "`c` on the border of the kernel is"),
        ("c[~border]", "`c` inside the border of the kernel is"),
        ("c[diagonal]", "`c` on the main diagonal of the last two dimensions is"),
        ("c[~diagonal(2)]", "`c` off the 2nd diagonal above the main one of the last two dimensions is"),
        ("c[triu]", "`c` on or above the main diagonal of"),
        ("c[~triu]", "`c` below the main diagonal of"),
        ("c[triu(1)]", "`c` above the main diagonal of"),
        ("c[~triu(1)]", "`c` on or below the main diagonal of"),
        ("c[triu(-3)]", "`c` on or above the 3rd diagonal below the main one of"),
        ("c[tril(-1)]", "`c` below the main diagonal of"),
        ("c[~tril(-1)]", "`c` on or above the main diagonal of"),
        ("c[tril(11)]", "`c` on or below the 11th diagonal above the main one of"),
        ("c[zeros]", "`c` that is exactly 0 is held at what it holds when the model is frozen."),
        ("c[~zeros]", "`c` that is not exactly 0 is"),
        ("c[smallest(0.25)]", "`c` among the 25 % of least magnitude is"),
        ("c[~smallest(0.125)]", "`c` outside the 12.5 % of least magnitude is"),
        ("c[nm(2, 4)]", "that is not one of the 2 entries of largest magnitude in its group of 4 along dimension 1 is"),
        ("c[~nm(1, 2)]", "that is the entry of largest magnitude in its group of 2 along dimension 1 is"),
        (
            "c[center | 0] = 0",
            "Every entry of `c[center | 0]` is held at 0. `center`: every entry in the middle of the kernel.",
        ),
        (
            "c[~(zeros & border) | border] = 0",
            "`c[~(zeros & border) | border]` is held at 0. `zeros`: every entry that is exactly 0. `border`: every "
            "entry on the border of the kernel.",
        ),
        ("d.weight = tied(0)", "All slices along dimension 0 of `d.weight` are tied: they hold the same numbers."),
        ("d = tied(-1, start=mean)", "All slices along dimension -1 of `d` are tied"),
    ],
)
def test_a_rule_in_words(text: str, words: str) -> None:
    assert words in in_words(parse_rule(text))


@given(rules())
@many
def test_every_rule_has_words(rule: Rule) -> None:
    of_ties = "All slices ", "Each slice ", "Each entry "
    assert in_words(rule).startswith(of_ties if isinstance(rule.value, Tie) else f"Every entry of `{rule.target}")


# --------------------------------------------------------------------------------------------------------------------
# Counts


@st.composite
def _regions_and_shapes(draw: st.DrawFn, numbers: bool) -> tuple[Region, tuple[int, ...]]:
    shape = draw(shapes(min_dims=1))
    leaves = near_indices(shape) | patterns().filter(lambda pattern: numbers or not pattern.depends_on_numbers)
    return draw(combinations(leaves, 4)), shape


def _selected(region: Region, tensor: Tensor) -> Tensor | None:
    try:
        return select(region, tensor)
    except RegionError:
        return None


@given(_regions_and_shapes(numbers=True), st.data())
@many
def test_what_is_refused_for_its_shape_is_refused_with_any_numbers(
    drawn: tuple[Region, tuple[int, ...]], data: st.DataObject
) -> None:
    region, shape = drawn
    if main(["explain", f"w[{region}]", "--shape", str(shape)]) == 2:
        assert _selected(region, data.draw(weights(shape))) is None


@given(_regions_and_shapes(numbers=True), st.data())
@many
def test_what_fits_no_shape_of_its_kind_is_refused(drawn: tuple[Region, tuple[int, ...]], data: st.DataObject) -> None:
    region, shape = drawn
    if _selected(region | entries[...], data.draw(weights(shape))) is None:
        assert main(["explain", f"w[{region}]", "--shape", str(shape)]) == 2


@pytest.mark.parametrize("region", [smallest(0.3), ~smallest(0.3), nm(2, 4), ~~nm(1, 2), smallest(1)], ids=str)
def test_patterns_that_count_beforehand_are_counted(region: Region, capsys: pytest.CaptureFixture[str]) -> None:
    count = int(select(region, torch.randn(4, 8)).sum())
    assert f" 32 entries, {count} (" in _explained(capsys, f"w[{region}]", "--shape", "4,8")


@given(rules(), shapes())
@many
def test_every_rule_is_explained_or_refused(rule: Rule, shape: tuple[int, ...]) -> None:
    assert main(["explain", str(rule), "--shape", str(shape)]) in (0, 2)


@pytest.mark.parametrize(
    ("rule", "shape", "counted"),
    [
        ("w[~cross]", "64,32,3,3", "64x32x3x3: 18,432 entries, 8,192 (44.4 %) frozen, 10,240 free"),
        ("w[:50257]", "50273x768", "38,597,376 (over 99.9 %) frozen, 12,288 free"),
        ("w[0]", "5000", "shape (5000,): 5,000 entries, 1 (under 0.1 %) frozen, 4,999 free"),
        ("w", "()", "shape (): 1 entry, 1 (100 %) frozen, 0 free"),
        ("w[smallest(0.5)]", "10,10", "10x10: 100 entries, 50 (50 %) frozen, 50 free"),
        ("w[zeros]", "10,10", "10x10: 100 entries, how many are frozen depends on the numbers"),
        ("w[zeros | 0]", "4,5", "20 entries, how many are frozen depends on the numbers"),
        ("d = tied(0)", "64,1,3,3", "576 entries, but the 64 slices along dimension 0 are tied: 9 numbers to train"),
        ("d = tied(-1)", "3,1", "3 entries, but the 1 slice along dimension 1 is tied: 3 numbers to train"),
    ],
)
def test_a_count_as_printed(capsys: pytest.CaptureFixture[str], rule: str, shape: str, counted: str) -> None:
    assert counted in _explained(capsys, rule, "--shape", shape)


@given(_regions_and_shapes(numbers=False))
@many
def test_the_count_printed_is_the_number_selected(drawn: tuple[Region, tuple[int, ...]]) -> None:
    region, shape = drawn
    frozen = _selected(region, torch.zeros(shape))
    if frozen is not None:
        printed = _printed(["explain", f"w[{region}]", "--shape", str(shape)])
        count = re.search(r"entr(?:y|ies), ([\d,]+) \(.* %\) frozen, ([\d,]+) free", printed)
        assert count is not None
        assert [int(part.replace(",", "")) for part in count.groups()] == [int(frozen.sum()), int((~frozen).sum())]
        if len(shape) == 2:
            assert printed.split("\n\n")[-2].count("#") == int(frozen.sum())


def _printed(arguments: list[str]) -> str:
    written = io.StringIO()
    with contextlib.redirect_stdout(written):
        assert main(arguments) == 0
    return written.getvalue()


# --------------------------------------------------------------------------------------------------------------------
# Drawings


def _drawn(region: Region, *shape: int) -> list[str]:
    return draw(select(region, torch.zeros(shape))).splitlines()


def test_kernels_that_are_alike_are_drawn_once() -> None:
    assert _drawn(center, 4, 3, 3, 3) == [
        "all 4x3 kernels:",
        "  · · ·",
        "  · # ·",
        "  · · ·",
        "",
        "# frozen   · free",
    ]


def test_kernels_that_differ_are_drawn_with_how_many_each_stands_for() -> None:
    assert _drawn(entries[0, 1] | entries[2, :, 0], 3, 2, 2) == [
        "kernel [0, 0] and 2 more:",
        "  · ·",
        "kernel [0, 1]:",
        "  # #",
        "kernel [2, 0] and 1 more:",
        "  # ·",
        "",
        "# frozen   · free",
    ]


def test_of_many_different_kernels_the_first_four_are_drawn() -> None:
    lines = _drawn(entries[list(range(6)), :, list(range(6))], 6, 2, 6)
    assert [line for line in lines if not line.startswith(" ")] == [
        *("kernel [0, 0] and 1 more:", "kernel [1, 0] and 1 more:", "kernel [2, 0] and 1 more:"),
        *("kernel [3, 0] and 1 more:", "4 more kernels differ from these", "", "# frozen   · free"),
    ]


def test_one_kernel_that_is_not_drawn_is_one() -> None:
    mask = torch.eye(5, dtype=torch.bool).reshape(5, 1, 5)
    assert "1 more kernel differs from these" in draw(mask).splitlines()


def test_one_kernel_is_named_as_one() -> None:
    assert _drawn(center, 1, 1, 1, 1) == ["the one kernel:", "  #", "", "# frozen"]


def test_the_planes_of_a_kernel_in_three_dimensions_are_drawn_each() -> None:
    assert _drawn(center, 2, 1, 3, 3, 3)[:8] == [
        *("plane [0, 0, 0] and 3 more:", "  · · ·", "  · · ·", "  · · ·"),
        *("plane [0, 0, 1] and 1 more:", "  · · ·", "  · # ·", "  · · ·"),
    ]


def test_a_triangle_of_several_matrices_is_drawn_as_one(capsys: pytest.CaptureFixture[str]) -> None:
    printed = _explained(capsys, "w[tril(-1)]", "--shape", "5,3,3")
    assert "all 5 matrices:\n  · · ·\n  # · ·\n  # # ·\n" in printed


def test_a_vector_is_one_row_and_a_number_one_cell() -> None:
    assert _drawn(entries[1:-1], 5)[0] == "  · # # # ·"
    assert _drawn(entries[...])[0] == "  #"


def test_a_large_matrix_is_drawn_in_cells_and_says_their_size() -> None:
    lines = _drawn(entries[:-16], 50273, 768)
    assert lines[:23] == ["  " + 64 * "#"] * 23
    assert lines[23:] == [
        "  " + 64 * "+",
        "each cell stands for 2,095 x 12 entries, the last ones for what is left",
        "",
        "# frozen   + some of both",
    ]


def test_cells_that_come_out_even_are_all_of_one_size() -> None:
    assert _drawn(entries[:24], 48, 128)[24] == "each cell stands for 2 x 2 entries"


@given(st.integers(1, 200), st.integers(1, 200), st.data())
@many
def test_a_cell_shows_what_all_of_its_entries_are(rows: int, columns: int, data: st.DataObject) -> None:
    frozen = torch.zeros(rows, columns, dtype=torch.bool)
    top, left = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    frozen[top:, left:] = True
    cells = [line.replace(" ", "") for line in draw(frozen).splitlines() if line.startswith(" ")]
    height, width = -(-rows // 24), -(-columns // 64)
    for row, line in enumerate(cells):
        for column, cell in enumerate(line):
            part = frozen[row * height : (row + 1) * height, column * width : (column + 1) * width]
            assert cell == ("#" if part.all() else "+" if part.any() else "·")
    assert (len(cells), len(cells[0])) == (-(-rows // height), -(-columns // width))


@given(st.lists(st.integers(1, 40), min_size=3, max_size=6).filter(lambda shape: prod(shape) < 10**6))
@settings(max_examples=60, deadline=None)
def test_no_drawing_is_wider_than_a_terminal(shape: list[int]) -> None:
    assert max(map(len, draw(torch.ones(shape, dtype=torch.bool)).splitlines())) <= 80


def test_a_tensor_without_entries_has_no_drawing() -> None:
    assert draw(torch.ones(0, 3, dtype=torch.bool)) == "no entries, nothing to draw"


# --------------------------------------------------------------------------------------------------------------------
# The command


def test_without_a_shape_there_are_words_and_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    printed = _explained(capsys, "bn.weight[0] = 1")
    assert printed.startswith("bn.weight[0] = 1\n\nEvery entry of `bn.weight[0]` is held at 1.\n")
    assert printed.endswith(
        "Give the shape of the tensor, as in --shape 64,32,3,3, to have the entries counted and drawn.\n"
    )


def test_several_rules_are_explained_in_turn(capsys: pytest.CaptureFixture[str]) -> None:
    printed = _explained(capsys, "a[0] = 1  # one\n\nb[1] = 2", "c[2] = 3", "--shape", "4")
    assert [line for line in printed.splitlines() if re.fullmatch(r"\w\[.*", line)] == [
        "a[0] = 1",
        "b[1] = 2",
        "c[2] = 3",
    ]
    assert printed.count("1 (25 %) frozen") == 3


def test_what_numbers_choose_alone_is_not_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    printed = _explained(capsys, "w[smallest(0.5)] = 0", "--shape", "4,4")
    assert printed.endswith("Which entries these are depends on the numbers: there is nothing to draw.\n")


def test_both_ways_to_write_a_shape_are_one(capsys: pytest.CaptureFixture[str]) -> None:
    plain = _explained(capsys, "w[center]", "--shape", "2,2,3,3")
    others = ["2x2x3x3", "(2, 2, 3, 3)", "torch.Size([2, 2, 3, 3])", " 2 , 2x3,3 "]
    assert [_explained(capsys, "w[center]", "--shape", shape) for shape in others] == [plain] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["w[center]", "--shape", "4,4"],
            r"rule `w\[center\] = keep`: pattern `center` needs .* \(shape \(4, 4\)\); name",
        ),
        (["w[0]", "w[9]", "--shape", "4"], r"rule `w\[9\] = keep`: index 9 is out of range for dimension 0 of size 4"),
        (["w[nm(2, 4)] = 0", "--shape", "4,6"], r"needs dimension 1 to be a multiple of 4, found 6 \(shape \(4, 6\)\)"),
        (["w[nm(2, 4) | 0] = 0", "--shape", "4"], r"pattern `nm` needs a tensor of 2 or more dimensions, found 1"),
        (["w[smallest(0.01)]", "--shape", "4"], r"the region selects no entry \(shape \(4,\)\); correct it"),
        (["w[~smallest(1)]", "--shape", "4"], r"the region selects no entry"),
        (["w[zeros | 4]", "--shape", "4,4"], r"index 4 is out of range for dimension 0 of size 4"),
        (["w[zeros]", "--shape", "4,0"], r"the region selects no entry"),
        (["w", "--shape", "4,0"], r"the region selects no entry \(shape \(4, 0\)\)"),
        (["w = tied(2)", "--shape", "4,4"], r"rule `w = tied\(2\)`: dimension 2 is out of range .* \(shape \(4, 4\)\)"),
        (["w = tied(0)", "--shape", "0,4"], r"dimension 0 has size 0"),
        (["w[", "--shape", "4"], r"rule `w\[`: column 3: expected an index"),
        (["# nothing"], r"there is no rule to explain; write for instance `conv\.weight\[center\] = 0`"),
        (["w[diagonal(-9223372036854775809)]", "--shape", "4,4"], r"the region selects no entry"),
        (["w", "--shape", "4,-1"], r"`--shape` must be sizes with commas or x between them, found '4,-1'; write 64,32"),
        (["w", "--shape", "many"], r"`--shape` must be sizes .* found 'many'"),
        (["w", "--shape", "4,,4"], r"`--shape` must be sizes"),
        (
            ["w[0]", "--shape", "65536,32769"],
            r"`--shape` of 2,147,549,184 entries is too large to count here, which takes 2,147.*; give a sm",
        ),
        (
            ["w", "--shape", ",".join(["1"] * 65)],
            r"`--shape` takes 16 dimensions at most, found 65; leave it out",
        ),
    ],
)
def test_what_cannot_be_explained_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert re.search(rf"^freezehooks: error: .*{message}", _refused(capsys, *arguments))


def test_a_tied_shape_of_any_size_takes_no_memory(capsys: pytest.CaptureFixture[str]) -> None:
    printed = _explained(capsys, "w = tied(0)", "--shape", "1000000,1000000,1000")
    assert "1,000,000,000,000,000 entries, but the 1,000,000 slices" in printed


def test_the_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["explain", "--help"])
    assert ended.value.code == 0
    assert 'freezehooks explain "conv.weight[~cross] = 0" --shape 64,32,3,3' in capsys.readouterr().out


def test_the_command_runs_as_a_program_also_where_only_ascii_can_be_written() -> None:
    command = [sys.executable, "-m", "freezehooks", "explain", "w[center] = 0", "--shape", "1,1,3"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "the one kernel:\n  . # .\n\n# frozen   . free\n" in done.stdout
