"""`freezehooks diff` finds every entry that differs; its rules freeze exactly the entries that do not."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor

from freezehooks import RegionError, parse_region
from freezehooks._entries.bits import differ
from freezehooks._entries.select import select
from freezehooks._held.resolve import resolve
from freezehooks._rules.spec import rules_of
from freezehooks.cli import main
from freezehooks.cli.unchanged import region_of, unchanged_rules

from .checkpoints import Folder, ramp
from .strategies import combinations, masks, near_indices, patterns, weights


@pytest.fixture
def folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Folder:
    return Folder(tmp_path, capsys)


# --------------------------------------------------------------------------------------------------------------------
# What differs


def test_what_differs_is_listed_entry_by_entry(folder: Folder) -> None:
    first = {"w": ramp(2, 2), "n": torch.tensor(3), "same": ramp(2), "gone": ramp(2), "m": ramp(2), "t": ramp(2)}
    changed = ramp(2, 2)
    changed[1] = torch.tensor([3.5, -4.0])
    second = {"w": changed, "n": torch.tensor(4), "same": ramp(2), "new": ramp(2), "m": ramp(1, 2), "t": ramp(2).half()}
    code, said = folder.run("diff", folder.saved("a.pt", first), folder.saved("b.pt", second), "--limit", "1")
    assert (code, said.split("\n#")[0]) == (
        1,
        "6 of 7 tensors differ\n"
        "w (2, 2): 2 of 4 entries differ, by up to 8\n"
        "n (): 1 of 1 entry differs, by up to 1\n"
        "m: shape (2,) in A, (1, 2) in B\n"
        "t: torch.float32 in A, torch.float16 in B\n"
        "new: only in B\n"
        "gone: only in A\n"
        "w:\n"
        "    w[1, 0]: 3.0 in A, 3.5 in B\n"
        "    and 1 more\n"
        "n:\n"
        "    n: 3 in A, 4 in B",
    )


def test_what_lost_entries_is_not_said_to_be_kept(folder: Folder) -> None:
    """`w = keep` would be refused by `verify`: the base holds entries that are gone."""
    first, second = folder.checkpoint("a.pt", w=ramp(6)), folder.checkpoint("b.pt", w=ramp(4))
    _, said = folder.run("diff", first, second)
    assert said.splitlines()[-1] == "# w: 4 of 4 entries unchanged, but it has lost others: freeze what both files have"


def test_where_nothing_stayed_as_it_was_no_rules_are_announced(folder: Folder) -> None:
    first, second = folder.saved("a.pt", {"w": torch.ones(2)}), folder.saved("b.pt", {"w": torch.zeros(2)})
    code, said = folder.run("diff", first, second, "--limit", "0")
    assert (code, said) == (
        1,
        "1 of 1 tensor differs\n"
        "w (2,): 2 of 2 entries differ, by up to 1\n"
        "# No entry that a rule can name stayed as it was.\n",
    )


def test_files_that_hold_the_same_bits_differ_in_nothing(folder: Folder) -> None:
    one, two = folder.checkpoint("a.pt", w=ramp(2)), folder.saved("b.ckpt", {"state_dict": {"module.w": ramp(2)}})
    code, said = folder.run("diff", one, two)
    assert code == 0
    assert said.startswith("nothing differs: 1 tensor\n#")
    assert said.endswith("\nmodule.w\n")


@pytest.mark.parametrize("number", [-0.0, float("nan"), 5e-324])
def test_the_smallest_difference_is_one(folder: Folder, number: float) -> None:
    one = folder.checkpoint("a.pt", w=torch.tensor([0.0], dtype=torch.float64))
    two = folder.checkpoint("b.pt", w=torch.tensor([number], dtype=torch.float64))
    assert folder.run("diff", one, two)[0] == 1


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.complex64, torch.float8_e4m3fn])
def test_every_dtype_is_compared(folder: Folder, dtype: torch.dtype) -> None:
    one = folder.checkpoint("a.pt", w=torch.tensor([0.0, 1.0]).to(dtype))
    two = folder.checkpoint("b.pt", w=torch.tensor([0.0, 0.0]).to(dtype))
    code, said = folder.run("diff", one, two)
    assert code == 1
    assert said.startswith("1 of 1 tensor differs\nw (2,): 1 of 2 entries differs, by up to 1\n")


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="this torch has no numbers of four bits")
def test_two_numbers_in_one_byte_are_compared_as_the_byte(folder: Folder) -> None:
    packed = [torch.tensor(numbers, dtype=torch.uint8).view(torch.float4_e2m1fn_x2) for numbers in ([7, 16], [7, 33])]
    one, two = (folder.checkpoint(name, w=tensor) for name, tensor in zip(("a.pt", "b.pt"), packed, strict=True))
    code, said = folder.run("diff", one, two, "--limit", "1")
    assert (code, said.split("\n#")[0]) == (
        1,
        "1 of 1 tensor differs\nw (2,): 1 of 2 entries differs, by up to 17\nw:\n    w[1]: 16 in A, 33 in B",
    )
    assert folder.run("diff", one, one)[0] == 0


def test_a_file_that_cannot_be_read_is_code_2(folder: Folder) -> None:
    assert folder.run("diff", folder.checkpoint("a.pt", w=ramp(2)), "none.pt")[0] == 2


def test_the_second_file_may_have_a_key_of_its_own(folder: Folder) -> None:
    one, two = folder.saved("a.pt", {"x": {"w": ramp(2)}}), folder.saved("b.pt", {"y": {"w": ramp(2)}})
    assert folder.run("diff", one, two, "--key", "x", "--key-b", "y")[0] == 0


def test_the_second_file_may_be_flat_while_the_first_is_not(folder: Folder) -> None:
    one, two = folder.saved("a.pt", {"ema": {"w": ramp(2)}}), folder.checkpoint("b.pt", w=ramp(2))
    assert folder.run("diff", one, two, "--key", "ema", "--key-b", "")[0] == 0


def test_a_tensor_that_one_file_has_twice_differs(folder: Folder) -> None:
    one, two = folder.checkpoint("a.pt", w=ramp(2)), folder.checkpoint("b.pt", w=ramp(2), module__w=ramp(2))
    for files, only in (((one, two), "B"), ((two, one), "A")):
        code, said = folder.run("diff", *files)
        assert (code, said.split("\n#")[0]) == (1, f"1 of 2 tensors differs\nmodule.w: only in {only}")


def test_entries_are_listed_on_demand_alone(folder: Folder) -> None:
    one, two = folder.checkpoint("a.pt", w=ramp(3)), folder.checkpoint("b.pt", w=ramp(3) + 1)
    assert "[0]" not in folder.run("diff", one, two)[1]
    assert "\n    w[0]: 1.0 in A, 2.0 in B\n    and 2 more\n" in folder.run("diff", one, two, "--limit", "1")[1]


def test_a_tied_tensor_is_told_once_under_all_of_its_names(folder: Folder) -> None:
    before, now = ramp(3), ramp(3)
    now[2] = 9
    one = folder.saved("a.pt", {"wte": before, "v": ramp(2), "head": before})
    two = folder.saved("b.pt", {"wte": now, "v": ramp(2), "head": now})
    assert folder.run("diff", one, two, "--limit", "1") == (
        1,
        "1 of 2 tensors differs\n"
        "wte, also head (3,): 1 of 3 entries differs, by up to 6\n"
        "wte:\n"
        "    wte[2]: 3.0 in A, 9.0 in B\n"
        "# What did not change, as rules for `freezehooks verify B --rules FILE --against A`:\n"
        "wte[:2]\n"
        "v\n",
    )


def test_a_tensor_that_is_tied_in_one_file_alone_is_told_by_each_name(folder: Folder) -> None:
    tensor = ramp(3)
    tied = folder.saved("a.pt", {"wte": tensor, "head": tensor})
    apart = folder.saved("b.pt", {"wte": ramp(3), "head": ramp(3) + 1})
    assert folder.run("diff", tied, apart)[1].startswith("1 of 2 tensors differs\nhead (3,): 3 of 3 entries differ")
    assert folder.run("diff", apart, tied)[1].startswith("1 of 2 tensors differs\nhead (3,): 3 of 3 entries differ")


def test_a_second_name_in_one_file_alone_is_no_other_tensor(folder: Folder) -> None:
    tensor = ramp(3)
    both, single = folder.saved("a.pt", {"wte": tensor, "head": tensor}), folder.checkpoint("b.pt", wte=ramp(3))
    for files in ((both, single), (single, both)):
        code, said = folder.run("diff", *files)
        assert (code, said.split("\n#")[0]) == (0, "nothing differs: 1 tensor")


def test_rules_alone_are_a_file_that_verify_takes(folder: Folder) -> None:
    first = {
        "wte": ramp(4, 2),
        "conv": torch.zeros(2, 1, 3, 3),
        "a b": ramp(2),
        "n": torch.tensor(3),
        "v": ramp(40, 40),
    }
    second = {name: tensor.clone() for name, tensor in first.items()}
    second["wte"][3] += 1
    second["v"] += torch.eye(40).roll(1, 0)
    one, two = folder.saved("a.pt", first), folder.saved("b.pt", second)
    code, said = folder.run("diff", one, two, "--rules-only")
    assert (code, [line for line in said.splitlines() if line[0] != "#"]) == (1, ["wte[:3]", "conv = 0"])
    assert folder.run("verify", two, "--rules", folder.text("r.txt", said), "--against", one)[0] == 0


def test_the_json_of_diff_says_what_its_lines_say(folder: Folder) -> None:
    one = folder.checkpoint("a.pt", w=ramp(2), gone=ramp(1), v=ramp(3))
    two = folder.checkpoint("b.pt", w=torch.tensor([1.0, 4.0]), v=ramp(3))
    code, said = folder.run("diff", one, two, "--limit", "1", "--json")
    entry = {"index": [1], "found": "4.0", "expected": "2.0"}
    entries = {"count": 1, "compared": 2, "examples": [entry], "worst": entry, "gap": 2.0}
    assert (code, json.loads(said)) == (
        1,
        {
            "code": 1,
            "tensors": 3,
            "differing": [
                {"names": ["w"], "facts": [], "shape": [2], "entries": entries},
                {"names": ["gone"], "facts": ["only in A"], "shape": [], "entries": None},
            ],
            "unchanged": ["w[0] = 1", "v"],
        },
    )


# --------------------------------------------------------------------------------------------------------------------
# Regions


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((4, 2, 3, 3), ":, :, 1, 1"),
        ((4, 2, 3, 3), ":, :, 0, 2"),
        ((4, 2, 3, 3), ":2, :, 1, 1"),
        ((4, 2, 3, 3), ":, 1"),
        ((4, 2, 3, 3), "..., 0"),
        ((2, 2, 2, 3, 3), "..., 1:, 2"),
        ((9, 3), ":7"),
        ((9, 3), "7:"),
        ((9, 3), "[0, 5, 6]"),
        ((9, 3), "~[0, 5, 6]"),
        ((9, 9), "1:3, [2, 5, 6]"),
        ((9, 9), "~(1:3, 2:5)"),
        ((9,), "3"),
        ((9,), "~3"),
    ],
)
def test_a_box_that_somebody_would_write_is_found_again(shape: tuple[int, ...], text: str) -> None:
    wanted = select(parse_region(text), torch.empty(shape))
    found = region_of(wanted)
    assert found is not None
    assert len(str(found)) <= len(text)
    assert select(found, torch.empty(shape)).equal(wanted)


@pytest.mark.parametrize("text", ["[0, 5, 6] & (:, [1, 2, 4])", "triu(1)", "diagonal", "1 | (:, 1)"])
def test_what_is_no_box_and_not_all_but_a_box_has_no_region(text: str) -> None:
    assert region_of(select(parse_region(text), torch.empty(9, 9))) is None


def test_a_region_without_a_short_rule_has_none() -> None:
    assert region_of(torch.rand(40, 40) > 0.5) is None
    assert region_of((torch.rand(200, 1) > 0.5).expand(200, 2)) is None


def test_a_large_tensor_is_described_by_one_region() -> None:
    wanted = torch.zeros(2048, 512, dtype=torch.bool)
    wanted[5:] = True
    assert str(region_of(wanted)) == "5:"
    wanted[0, 0] = True
    assert region_of(wanted) is None


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_region_says_exactly_what_was_asked_for(data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([(5,), (3, 4), (2, 2, 3, 3)]))
    wanted = data.draw(masks(shape).filter(lambda mask: not bool(mask.all())))
    found = region_of(wanted)
    assert found is None or select(found, torch.empty(shape)).equal(wanted)


# --------------------------------------------------------------------------------------------------------------------
# Rules


def _rules(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    return list(unchanged_rules(first, second, {name: name for name in second if name in first}))


def test_what_did_not_change_is_said_in_a_rule_for_each_parameter() -> None:
    first = {f"h.{n}.{kind}.weight": torch.randn(4, 4) for n in range(3) for kind in ("attn", "ln")}
    first |= {"wte.weight": torch.randn(9, 4), "conv.weight": torch.randn(2, 2, 3, 3), "head.weight": torch.randn(4, 4)}
    first["conv.weight"][:, :, 1, 1] = 0
    first["head.weight"].triu_().sub_(torch.eye(4) * 3)
    second = {name: tensor + 1 for name, tensor in first.items()}
    for n in range(3):
        second[f"h.{n}.ln.weight"] = first[f"h.{n}.ln.weight"]
    second["wte.weight"][:7] = first["wte.weight"][:7]
    second["conv.weight"][:, :, 1, 1] = 0
    second["head.weight"][0] = first["head.weight"][0]
    assert _rules(first, second) == [
        *("h.0.ln.weight", "h.1.ln.weight", "h.2.ln.weight"),
        *("wte.weight[:7]", "conv.weight[:, :, 1, 1] = 0", "head.weight[0]"),
    ]


def test_rules_speak_of_nothing_that_the_second_file_lacks(folder: Folder) -> None:
    first = {"h.v": ramp(2), "h.w": ramp(3), "h.n": ramp(2), "head": ramp(2)}
    second = {"module.h.v": ramp(2), "module.h.w": ramp(3), "module.h.n": ramp(2).int()}
    one, two = folder.saved("a.pt", first), folder.saved("b.pt", second)
    rules = folder.run("diff", one, two)[1].split("--against A`:\n")[1]
    assert rules.splitlines() == ["module.h.v", "module.h.w"]
    assert folder.run("verify", two, "--rules", folder.text("r.txt", rules), "--against", one)[0] == 0


def test_a_tensor_without_a_name_is_told(folder: Folder) -> None:
    one = folder.saved("a.pt", {"": ramp(2), "w": ramp(2)})
    two = folder.saved("b.pt", {"": ramp(2), "w": ramp(2) + 1})
    code, said = folder.run("diff", one, two)
    assert code == 1
    assert said.endswith("\n# : no rule can name it alone: freeze it through a mapping\n")


def test_old_rows_are_described_where_new_ones_were_added(folder: Folder) -> None:
    base, tuned = ramp(4, 2), torch.cat([ramp(4, 2), torch.zeros(2, 2)])
    assert _rules({"w": base}, {"w": tuned}) == ["w[:4]"]
    one, two = folder.checkpoint("a.pt", w=base), folder.checkpoint("b.pt", w=tuned)
    assert folder.run("verify", two, "--rule", "w[:4]", "--against", one)[0] == 0


def test_all_but_the_center_of_a_kernel_is_all_but_a_box() -> None:
    first = {"conv.weight": torch.randn(2, 2, 3, 3)}
    second = {"conv.weight": first["conv.weight"].clone()}
    second["conv.weight"][:, :, 1, 1] += 1
    assert _rules(first, second) == ["conv.weight[~(:, :, 1, 1)]"]


@pytest.mark.parametrize(
    ("number", "dtype", "text"),
    [
        (0.1, torch.float32, "w = 0.1"),
        (0.1, torch.bfloat16, "w = 0.1"),
        (1 / 3, torch.float32, "w = 0.33333334"),
        (1 / 3, torch.float64, "w = 0.3333333333333333"),
        (-0.0, torch.float32, "w = -0"),
        (65504.0, torch.float16, "w = 65500"),
        (2.0, torch.complex64, "w = 2"),
        (2j, torch.complex64, "w"),
        (float("inf"), torch.float32, "w"),
        (float("nan"), torch.float32, "w"),
    ],
)
def test_one_number_is_said_in_as_few_digits_as_say_it(number: Any, dtype: torch.dtype, text: str) -> None:
    same = torch.full((3,), number, dtype=dtype)
    assert _rules({"w": same, "v": ramp(2)}, {"w": same, "v": ramp(2) + 1}) == [text]
    ((part, _),) = resolve({"w": same.clone()}, rules_of(text))
    assert part.violation(same) is None


def test_what_has_no_short_rule_is_told_in_a_comment() -> None:
    first = torch.randn(40, 40)
    second = first + (torch.rand(40, 40) > 0.5)
    (line,) = _rules({"w": first}, {"w": second})
    assert re.fullmatch(
        r"# w: [\d,]+ of 1,600 entries unchanged, no short rule: freeze them by the mask `before == after`",
        line,
    )
    assert rules_of(line) == ()


def test_a_name_that_no_rule_says_is_told_in_a_comment() -> None:
    first = {"a b": ramp(2), "a-b": ramp(2)}
    (line,) = _rules(first, {"a b": ramp(2), "a-b": ramp(2) + 1})
    assert line == "# a b: no rule can name it alone: freeze it through a mapping"


def test_integers_bytes_and_empty_tensors_are_in_no_rule() -> None:
    tensors = {
        "n": torch.tensor(3),
        "e": torch.ones(0),
        "f": ramp(2).to(torch.float8_e4m3fn),
        "v": ramp(2),
        "w": ramp(3),
    }
    rules = _rules(tensors, tensors)
    assert len(rules) == 2
    assert {part.name for part, _ in resolve({k: tensors[k] for k in "efvw"}, rules_of(rules))} == {"v", "w"}


class _Files(NamedTuple):
    first: dict[str, Tensor]
    second: dict[str, Tensor]


_NAMES = ["conv.weight", "conv.bias", "h.0.ln.weight", "h.1.ln.weight", "h.0.fc.weight", "wte", "module.x"]


@st.composite
def _files(draw: DrawFn) -> _Files:
    """Two files of small matrices and kernels; the second differs at a region, or at random, or nowhere."""
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    for name in draw(st.lists(st.sampled_from(_NAMES), min_size=1, max_size=4, unique=True)):
        shape = draw(st.sampled_from([(4,), (3, 3), (2, 5), (2, 1, 3, 3), (1, 2, 2, 3)]))
        first[name] = draw(weights(shape))
        changed = _changed(draw, first[name])
        second[name] = torch.where(changed, draw(weights(shape)), first[name])
    return _Files(first, second)


def _changed(draw: DrawFn, tensor: Tensor) -> Tensor:
    shape = tuple(tensor.shape)
    region = draw(
        st.none() | st.just(...) | masks(shape) | combinations(near_indices(shape) | patterns(), max_leaves=2)
    )
    if region is None or region is ...:
        return torch.full(shape, region is ...)
    try:
        return select(region, tensor)
    except RegionError:  # it does not fit: change nothing
        return torch.zeros(shape, dtype=torch.bool)


@given(_files())
@settings(max_examples=80, deadline=None)
def test_the_rules_freeze_exactly_what_did_not_change(files: _Files) -> None:
    lines = _rules(*files)
    rules = [rule for line in lines for rule in rules_of(line)]
    told = " ".join(line for line in lines if line.startswith("#"))
    frozen = {part.name: part.frozen for part, _ in resolve(files.second, rules)}
    for name, tensor in files.second.items():
        same = ~differ(files.first[name], tensor)
        if f"# {name}:" in told:
            assert name not in frozen
        elif bool(same.any()):
            assert frozen[name].equal(same)
        else:
            assert name not in frozen
    _check_verified(files, lines, bool(rules))


def _check_verified(files: _Files, lines: list[str], any_rule: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        first, second, rules = (f"{folder}/{name}" for name in ("a.pt", "b.pt", "r.txt"))
        torch.save(files.first, first)
        torch.save(files.second, second)
        Path(rules).write_text("\n".join(lines), encoding="utf-8")
        assert main(["verify", second, "--rules", rules, "--against", first]) == (0 if any_rule else 2)
