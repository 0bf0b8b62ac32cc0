"""`freezehooks verify` says yes only if every frozen entry was looked at and holds, bit for bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from freezehooks import MaskedOptimizer, freeze_entries
from freezehooks.cli import comparison as _comparison
from freezehooks.cli.comparison import compare

from .checkpoints import Folder, ramp


@pytest.fixture
def folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Folder:
    return Folder(tmp_path, capsys)


def _verify(folder: Folder, tensor: Any, rule: str, base: Any = None, *more: str) -> tuple[int, str]:
    """Verify one parameter `w`, against another one if given."""
    against = [] if base is None else ["--against", folder.checkpoint("base.pt", w=base)]
    return folder.run("verify", folder.checkpoint("a.pt", w=tensor), "--rule", rule, *against, *more)


# --------------------------------------------------------------------------------------------------------------------
# Yes


def test_what_was_trained_under_rules_is_verified_by_them(folder: Folder) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 2))
    rules = "0.weight[center] = 0\n2.weight[smallest(0.5)]\n2.bias[0]"
    base = folder.saved("base.pt", model.state_dict())
    frozen = freeze_entries(model, rules)
    optimizer = MaskedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1), frozen)
    for _ in range(3):
        model(torch.randn(2, 1, 4, 4)).square().sum().backward()
        optimizer.step()
    tuned = folder.saved("tuned.ckpt", {"state_dict": model.state_dict(), "epoch": 1})
    written = folder.text("r.txt", rules)
    assert folder.run("verify", tuned, "--rules", written, "--against", base) == (
        0,
        "ok  0.weight: `0.weight[center] = 0`: 4 entries hold\n"
        "ok  2.weight: `2.weight[smallest(0.5)] = keep`: 16 entries hold\n"
        "ok  2.bias: `2.bias[0] = keep`: 1 entry holds\n"
        "verified 21 entries of 3 parameters\n"
        "1 other tensor was not looked at\n",
    )


@pytest.mark.parametrize(
    ("rule", "tensor"),
    [
        ("w = 0.1", torch.full((3,), 0.1)),
        ("w = 0.1", torch.full((3,), 0.1, dtype=torch.bfloat16)),
        ("w = -0.0", torch.full((3,), -0.0)),
        ("w = 2", torch.full((3,), 2 + 0j)),
        ("w = 1", torch.tensor(1.0)),
        ("w[1] = 7", torch.tensor([math.nan, 7, math.inf])),
        ("w = tied(0)", torch.ones(3, 2)),
    ],
)
def test_exact_numbers_hold(folder: Folder, rule: str, tensor: Tensor) -> None:
    assert _verify(folder, tensor, rule)[0] == 0


def test_a_parameter_in_no_dense_order_is_verified_entry_by_entry(folder: Folder) -> None:
    tensor = ramp(4, 6).t()
    assert _verify(folder, tensor, "w[triu]", ramp(4, 6).t().contiguous())[0] == 0
    assert _verify(folder, tensor, "w[tril(-1)]", ramp(6, 4))[0] == 1


def test_nan_holds_where_the_base_has_the_same_bits(folder: Folder) -> None:
    nan = torch.tensor([math.nan, 1.0])
    assert _verify(folder, nan, "w", nan)[0] == 0


def test_names_differ_by_those_of_wrappers(folder: Folder) -> None:
    tuned = folder.checkpoint("a.pt", module__w=ramp(3))
    base = folder.checkpoint("b.pt", _orig_mod__w=ramp(3))
    assert folder.run("verify", tuned, "--rule", "w", "--against", base)[0] == 0


def test_each_file_has_its_own_key(folder: Folder) -> None:
    tuned, base = folder.saved("a.pt", {"x": {"w": ramp(2)}}), folder.saved("b.pt", {"y": {"w": ramp(2)}})
    arguments = ["verify", tuned, "--rule", "w", "--against", base, "--key", "x"]
    assert folder.run(*arguments, "--against-key", "y")[0] == 0
    assert "has no `x` on the way to `x`" in folder.run(*arguments)[1]


def test_an_entry_that_two_rules_hold_is_counted_once(folder: Folder) -> None:
    path = folder.checkpoint("a.pt", w=torch.zeros(4))
    said = folder.run("verify", path, "--rule", "w[:3] = 0", "--rule", "w[1:] = 0")[1]
    assert said.startswith("ok  w: `w[:3] = 0`, `w[1:] = 0`: 4 entries hold\nverified 4 entries of 1 parameter\n")


def test_integers_are_passed_over_by_wildcards(folder: Folder) -> None:
    path = folder.checkpoint("a.pt", w=torch.zeros(4), n=torch.tensor(3))
    assert folder.run("verify", path, "--rule", "* = 0")[1].endswith(
        "verified 4 entries of 1 parameter\n1 other tensor was not looked at\n"
    )


# --------------------------------------------------------------------------------------------------------------------
# No


def test_one_entry_does_not_hold(folder: Folder) -> None:
    path = folder.checkpoint("a.pt", w=torch.ones(1))
    assert folder.run("verify", path, "--rule", "w = 0") == (
        1,
        "NO  w: `w = 0`: 1 of 1 entry does not hold\n"
        "    w[0]: found 1.0, expected 0.0\n"
        "NOT verified: 1 of 1 entry, in 1 of 1 parameter, does not hold\n"
        "0 other tensors were not looked at\n",
    )


def test_a_limit_of_0_lists_no_entry_but_the_worst(folder: Folder) -> None:
    path = folder.checkpoint("a.pt", w=torch.tensor([1.0, 2.0]))
    assert folder.run("verify", path, "--rule", "w = 0", "--limit", "0") == (
        1,
        "NO  w: `w = 0`: 2 of 2 entries do not hold\n"
        "    worst, off by 2: w[1]: found 2.0, expected 0.0\n"
        "NOT verified: 2 of 2 entries, in 1 of 1 parameter, do not hold\n"
        "0 other tensors were not looked at\n",
    )


def test_what_does_not_hold_is_listed_with_exact_numbers(folder: Folder) -> None:
    tensor = torch.zeros(2, 3)
    tensor[0, 1], tensor[1, 0], tensor[1, 2] = 0.1, -2.0, 1e-30
    path = folder.checkpoint("a.pt", v=torch.ones(2), w=tensor)
    assert folder.run("verify", path, "--rule", "v = 1", "--rule", "w = 0", "--limit", "2") == (
        1,
        "ok  v: `v = 1`: 2 entries hold\n"
        "NO  w: `w = 0`: 3 of 6 entries do not hold\n"
        "    w[0, 1]: found 0.10000000149011612, expected 0.0\n"
        "    w[1, 0]: found -2.0, expected 0.0\n"
        "    and 1 more\n"
        "    worst, off by 2: w[1, 0]: found -2.0, expected 0.0\n"
        "NOT verified: 3 of 8 entries, in 1 of 2 parameters, do not hold\n"
        "0 other tensors were not looked at\n",
    )


@pytest.mark.parametrize(
    ("rule", "tensor", "base", "message"),
    [
        ("w = 0", [0.0, -0.0], None, "w[1]: found -0.0, expected 0.0"),
        ("w = -0.0", [0.0, -0.0], None, "w[0]: found 0.0, expected -0.0"),
        ("w = 0", [0.0, math.nan], None, "w[1]: found nan, expected 0.0"),
        ("w", [0.0, math.nan], [0.0, 1.0], "w[1]: found nan, expected 1.0"),
        ("w[~0]", [1.0, 2.0], [1.0, 3.0], "w[1]: found 2.0, expected 3.0"),
        ("w[zeros]", [0.5, 1.0], [0.0, 1.0], "w[0]: found 0.5, expected 0.0"),
        ("w[smallest(0.5)]", [1.0, 5.0], [4.0, 3.0], "w[1]: found 5.0, expected 3.0"),
        ("w = tied(0)", [1.0, 1.0, 2.0], None, "w[2]: found 2.0, expected 1.0"),
        ("w = tied(0, start=mean)", [1.0, -0.0, 1.0], None, "w[1]: found -0.0, expected 1.0"),
        ("w = 0", [0j, 1j], None, "w[1]: found 1j, expected 0j"),
    ],
)
def test_a_difference_of_one_bit_is_a_no(folder: Folder, rule: str, tensor: Any, base: Any, message: str) -> None:
    code, said = _verify(folder, torch.tensor(tensor), rule, None if base is None else torch.tensor(base))
    assert code == 1
    assert message in said


def test_two_kinds_of_nan_are_told_apart_by_their_bits(folder: Folder) -> None:
    found, expected = (torch.tensor([0x7FC00000 + n], dtype=torch.int32).view(torch.float32) for n in (1, 2))
    code, said = _verify(folder, found, "w", expected)
    assert code == 1
    assert "w[0]: found nan (bits 0x7fc00001), expected nan (bits 0x7fc00002)" in said


def test_the_next_number_is_another_one(folder: Folder) -> None:
    base = torch.tensor([0.5])
    said = _verify(folder, base.nextafter(torch.tensor(1.0)), "w", base)[1]
    assert "w[0]: found 0.5000000596046448, expected 0.5\n" in said


def test_a_number_for_nan_is_infinitely_far(folder: Folder) -> None:
    assert "worst, off by inf: w[1]: found nan" in _verify(folder, torch.tensor([1.0, math.nan]), "w = 0")[1]


def test_a_single_number_needs_no_worst(folder: Folder) -> None:
    assert "worst" not in _verify(folder, torch.tensor([1.0, 0.0]), "w = 0")[1]


def test_a_scalar_is_named_without_brackets(folder: Folder) -> None:
    assert "\n    w: found 2.0, expected 1.0\n" in _verify(folder, torch.tensor(2.0), "w = 1")[1]


def test_a_tensor_is_compared_in_steps_with_the_same_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    found, expected = ramp(5, 7), ramp(5, 7)
    found[0, 3] += 1
    found[3, 1] -= 9
    found[4, 6] += 2
    whole = compare(found, expected, limit=2)
    monkeypatch.setattr(_comparison, "_AT_ONCE", 4)
    assert compare(found, expected, limit=2) == whole
    assert (whole.count, whole.gap, [entry.index for entry in whole.examples]) == (3, 9, [(0, 3), (3, 1)])
    assert whole.worst is not None
    assert whole.worst.index == (3, 1)


# --------------------------------------------------------------------------------------------------------------------
# Shapes that differ: new rows


def test_new_rows_are_free_and_old_ones_are_compared(folder: Folder) -> None:
    base, tuned = ramp(4, 2), torch.cat([ramp(4, 2), torch.zeros(2, 2)])
    assert _verify(folder, tuned, "w[~4:]", base) == (
        0,
        "ok  w: `w[~4:] = keep`: 8 entries hold\nverified 8 entries of 1 parameter\n"
        "0 other tensors were not looked at\n",
    )
    tuned[3, 1] = -1
    assert "w[3, 1]: found -1.0, expected 8.0" in _verify(folder, tuned, "w[:-2]", base)[1]


def test_a_number_in_a_new_row_needs_no_base(folder: Folder) -> None:
    tuned = torch.cat([ramp(4, 2), torch.zeros(2, 2)])
    assert _verify(folder, tuned, "w[4:] = 0", ramp(4, 2))[0] == 0
    tuned[5, 0] = 1
    assert _verify(folder, tuned, "w[4:] = 0", ramp(4, 2))[0] == 1


# --------------------------------------------------------------------------------------------------------------------
# No answer


@pytest.mark.parametrize(
    ("rule", "tensor", "base", "message"),
    [
        ("w", ramp(2), None, "nothing tells what the entries held before; name the base: --against BASE"),
        ("w[zeros] = 0", ramp(2), None, "`zeros` chosen on the checkpoint itself would hold for any checkpoint; name"),
        ("w[~zeros | 0] = 0", ramp(2), None, "`zeros` chosen on the checkpoint itself"),
        ("w[:5]", ramp(6), ramp(4), "the base has no entry [4] of `w`, its shape is (4,) in the base and (6,) in"),
        ("w", ramp(4), ramp(6), "the checkpoint has no entry [4] of `w`, its shape is (6,) in the base and (4,) in"),
        ("w[~-1]", ramp(4), ramp(6), "the checkpoint has no entry [4] of `w`"),
        ("w[smallest(0.5)]", ramp(6), ramp(4), "`smallest` is chosen on the base, where `w` has shape (4,) instead of"),
        ("w[0]", ramp(2, 2), ramp(4), "`w` has shape (2, 2), and (4,) in the base; name parameters that have the same"),
        ("w", ramp(2), ramp(2).double(), "`w` is of torch.float32, and of torch.float64 in the base; convert one of"),
        ("w = 0", ramp(2), ramp(2) + 0j, "`w` is of torch.float32, and of torch.complex64 in the base; convert one of"),
        ("w = 1e300", ramp(2), ramp(2).double(), "the value is not finite as torch.float32, the dtype of `w`; correct"),
        ("v", ramp(2), ramp(2), "`v` is not a parameter of the model; did you mean `w`?"),
        ("v*", ramp(2), ramp(2), "`v*` matches no parameter"),
        ("w[2:]", ramp(2), ramp(2), "the region selects no entry"),
        ("w[zeros]", ramp(2), ramp(2), "the region selects no entry"),
        ("w = tied(3)", ramp(2), None, "dimension 3 is out of range"),
    ],
)
def test_what_cannot_be_verified_is_no_yes(folder: Folder, rule: str, tensor: Tensor, base: Any, message: str) -> None:
    code, said = _verify(folder, tensor, rule, base)
    assert code == 2
    assert message in said
    assert f"rule `{rule.replace('1e300', '1e+300')}" in said


def test_without_rules_there_is_no_answer(folder: Folder) -> None:
    code, said = folder.run("verify", folder.checkpoint("a.pt", w=ramp(2)))
    assert (code, said) == (
        2,
        "freezehooks: error: there is no rule to go by; give --rules FILE, or --rule 'conv.weight[center] = 0'\n",
    )


def test_a_key_of_no_base_is_refused(folder: Folder) -> None:
    code, said = _verify(folder, ramp(2), "w = 1", None, "--against-key", "model")
    assert code == 2
    assert "--against-key without --against says nothing; name the base" in said


def test_a_base_without_the_parameter_is_no_base(folder: Folder) -> None:
    tuned, base = folder.checkpoint("a.pt", w=ramp(2)), folder.checkpoint("b.pt", v=ramp(2))
    code, said = folder.run("verify", tuned, "--rule", "w = 1", "--against", base)
    assert code == 2
    assert "rule `w = 1`: the base has no `w`; name parameters that both files have, or another base" in said


@pytest.mark.parametrize("value", ["keep", "1"])
def test_a_checkpoint_without_what_the_rules_speak_of_in_the_base_is_no_yes(folder: Folder, value: str) -> None:
    base = folder.checkpoint("base.pt", v=torch.ones(2), w=torch.ones(3))
    tuned = folder.checkpoint("a.pt", module__v=torch.ones(2))
    code, said = folder.run("verify", tuned, "--rule", f"* = {value}", "--against", base)
    assert code == 2
    told = (
        "the checkpoint has no `w`, which the base has; name parameters that both files have, or the whole checkpoint"
    )
    assert f"rule `* = {value}`: {told}" in said
    assert folder.run("verify", tuned, "--rule", f"v = {value}", "--against", base)[0] == 0


def test_numbers_that_became_integers_are_no_yes(folder: Folder) -> None:
    base = folder.checkpoint("base.pt", v=torch.ones(2), w=torch.ones(3))
    tuned = folder.checkpoint("a.pt", v=torch.ones(2), w=torch.ones(3, dtype=torch.int8))
    code, said = folder.run("verify", tuned, "--rule", "*", "--against", base)
    assert code == 2
    assert "rule `* = keep`: `w` is of torch.int8, and of torch.float32 in the base; convert one of them" in said


@pytest.mark.parametrize("rule", ["* = 1", "w = 1", "w"])
def test_numbers_of_eight_bits_are_refused_before_anything_is_said(folder: Folder, rule: str) -> None:
    tensors = {"v": ramp(2), "w": torch.ones(2).to(torch.float8_e4m3fn)}
    one, two = folder.checkpoint("a.pt", **tensors), folder.checkpoint("b.pt", **tensors)
    code, said = folder.run("verify", one, "--rule", rule, "--against", two)
    assert code == 2
    assert "the parameter holds torch.float8_e4m3fn, which no optimizer trains (parameter `w`); name" in said


def test_copies_of_which_there_is_one_alone_leave_nothing_to_verify(folder: Folder) -> None:
    code, said = _verify(folder, torch.ones(1, 2), "w = tied(0)")
    assert code == 2
    assert "the rules freeze no entry of the checkpoint: there is nothing to verify; correct them" in said


def test_the_base_may_be_where_tensors_usually_are_while_the_checkpoint_is_not(folder: Folder) -> None:
    tuned, base = folder.saved("a.pt", {"ema": {"w": ramp(2)}}), folder.checkpoint("b.pt", w=ramp(2))
    arguments = ["verify", tuned, "--rule", "w", "--against", base, "--key", "ema"]
    assert folder.run(*arguments, "--against-key", "")[0] == 0
    assert folder.run(*arguments)[0] == 2


def test_rules_that_disagree_are_refused(folder: Folder) -> None:
    path = folder.checkpoint("a.pt", w=torch.zeros(3))
    code, said = folder.run("verify", path, "--rule", "w = 0", "--rule", "w[0] = 1")
    assert code == 2
    assert "disagree about entry [0] of `w`" in said


def test_nothing_is_said_before_every_rule_was_looked_at(folder: Folder) -> None:
    path = folder.checkpoint("a.pt", v=torch.zeros(2), w=ramp(2))
    assert folder.run("verify", path, "--rule", "v = 0", "--rule", "w")[0] == 2


@pytest.mark.parametrize("pattern", ["smallest(0.5)", "nm(1, 2)"])
def test_a_region_chosen_on_the_checkpoint_itself_is_told(folder: Folder, pattern: str) -> None:
    code, said = _verify(folder, torch.tensor([[0.0, 3.0], [2.0, 0.0]]), f"w[{pattern}] = 0")
    assert code == 0
    name = pattern.split("(")[0]
    assert f"note: `w[{pattern}] = 0`: `{name}` was chosen on the checkpoint itself, since there is no --aga" in said


def test_a_dtype_may_differ_where_a_number_is_asked_for(folder: Folder) -> None:
    base = torch.tensor([0.0, 1.0])
    assert _verify(folder, torch.tensor([0.0, 2.0]).half(), "w[zeros] = 0", base)[0] == 0
