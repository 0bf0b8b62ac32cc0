"""`verify --train-only`: nothing else changed; `verify --frozen`: what a handle saved holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from freezehooks import MaskedOptimizer, Rule, entries, freeze_entries, tied

from .checkpoints import Folder, Hostile, ramp


@pytest.fixture
def folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Folder:
    return Folder(tmp_path, capsys)


# --------------------------------------------------------------------------------------------------------------------
# --train-only


def _trained(
    folder: Folder, rule: str, now: dict[str, Tensor], before: dict[str, Tensor], *more: str
) -> tuple[int, str]:
    tuned, base = folder.saved("a.pt", now), folder.saved("b.pt", before)
    return folder.run("verify", tuned, "--train-only", rule, "--against", base, *more)


def _moved(tensor: Tensor, *index: Any) -> Tensor:
    moved = tensor.clone()
    moved[index] += 1
    return moved


def test_everything_but_what_was_trained_is_as_it_was(folder: Folder) -> None:
    before = {"wte": ramp(4, 2), "bn.n": torch.tensor(3), "head": ramp(3)}
    now = before | {"wte": _moved(ramp(4, 2), slice(2, None))}
    assert _trained(folder, "wte[2:]", now, before) == (
        0,
        "ok  wte: all but `wte[2:]`: 4 entries hold\n"
        "ok  bn.n: all of it: 1 entry holds\n"
        "ok  head: all of it: 3 entries hold\n"
        "verified 8 entries of 3 parameters\n"
        "0 other tensors were not looked at\n",
    )


def test_whatever_else_changed_came_or_went_is_named(folder: Folder) -> None:
    before = {"wte": ramp(4, 2), "bn.n": torch.tensor(3), "gone": ramp(3), "cast": ramp(2), "flat": ramp(2, 2)}
    now = {"wte": _moved(ramp(4, 2), 1), "bn.n": torch.tensor(4), "came": ramp(1)}
    now |= {"cast": ramp(2).half(), "flat": ramp(4)}
    assert _trained(folder, "wte[2:]", now, before, "--limit", "1") == (
        1,
        "NO  wte: all but `wte[2:]`: 2 of 4 entries do not hold\n"
        "    wte[1, 0]: found 4.0, expected 3.0\n"
        "    and 1 more\n"
        "    worst, off by 1: wte[1, 0]: found 4.0, expected 3.0\n"
        "NO  bn.n: all of it: 1 of 1 entry does not hold\n"
        "    bn.n: found 4, expected 3\n"
        "NO  cast: torch.float16 of shape (2,), and torch.float32 of shape (2,) in the base\n"
        "NO  flat: torch.float32 of shape (4,), and torch.float32 of shape (2, 2) in the base\n"
        "NO  came: only in the checkpoint\n"
        "NO  gone: only in the base\n"
        "NOT verified: 3 of 5 entries, in 2 of 2 parameters, do not hold; "
        "4 tensors added, removed, or changed in shape or dtype\n"
        "0 other tensors were not looked at\n",
    )


@pytest.mark.parametrize(("now", "before"), [(0.0, -0.0), (float("nan"), 1.0), (1.0, float("nan"))])
def test_one_bit_is_a_change(folder: Folder, now: float, before: float) -> None:
    tensors = {"v": ramp(2), "w": torch.tensor([now])}
    assert _trained(folder, "v", tensors, tensors | {"w": torch.tensor([before])})[0] == 1


def test_rows_that_came_may_be_what_was_trained(folder: Folder) -> None:
    before, now = {"wte": ramp(4, 2)}, {"wte": torch.cat([ramp(4, 2), torch.zeros(2, 2)])}
    assert _trained(folder, "wte[4:]", now, before)[0] == 0
    code, said = _trained(folder, "wte[5:]", now, before)
    assert code == 1
    assert (
        "NO  wte: torch.float32 of shape (6, 2), and torch.float32 of shape (4, 2) in the base: 2 entries came" in said
    )
    code, said = _trained(folder, "wte[:1]", before, now)
    assert code == 1
    assert "0 entries came, 4 entries went that no rule names" in said
    now["wte"][3, 1] = 9
    assert "wte[3, 1]: found 9.0, expected 8.0" in _trained(folder, "wte[4:]", now, before)[1]


def test_what_was_trained_as_a_whole_may_be_anything_and_is_not_looked_at(folder: Folder) -> None:
    before = {"w": ramp(2), "head": ramp(3, 2), "bn.n": torch.tensor(1)}
    now = {"w": ramp(2), "head": ramp(5, 2).half(), "bn.n": torch.tensor(2)}
    assert _trained(folder, "head\nbn.*", now, before) == (
        0,
        "ok  w: all of it: 2 entries hold\nverified 2 entries of 1 parameter\n2 other tensors were not looked at\n",
    )


def test_a_rule_for_one_name_of_a_tied_tensor_stands_for_all_of_them(folder: Folder) -> None:
    before, now = ramp(4, 2), _moved(ramp(4, 2), slice(2, None))
    both, old = {"wte": now, "head": now}, {"wte": before, "head": before}
    for rule in ("wte[2:]", "head[2:]"):
        code, said = _trained(folder, rule, both, old)
        assert (code, said.splitlines()[-2]) == (0, "verified 4 entries of 1 parameter")
    assert _trained(folder, "wte[2:]", {"wte": now}, old)[0] == 0  # safetensors keep one name
    assert _trained(folder, "wte[2:]", both, {"wte": before})[0] == 0
    apart = {"wte": now, "head": now.clone()}
    assert "NO  head: all of it: 4 of 8" in _trained(folder, "wte[2:]", apart, old)[1]


def test_names_of_wrappers_are_no_change(folder: Folder) -> None:
    before, now = {"v": ramp(2), "w": ramp(3)}, {"_orig_mod.v": ramp(2), "_orig_mod.w": ramp(3) + 1}
    assert _trained(folder, "w", now, before)[0] == 0


def test_a_region_chosen_by_numbers_is_chosen_on_the_base(folder: Folder) -> None:
    before = {"w": torch.tensor([0.0, 1.0, 0.0])}
    assert _trained(folder, "w[zeros]", {"w": torch.tensor([5.0, 1.0, 6.0])}, before)[0] == 0
    assert _trained(folder, "w[zeros]", {"w": torch.tensor([5.0, 0.0, 6.0])}, before)[0] == 1


def test_what_was_trained_and_is_missing_is_a_no(folder: Folder) -> None:
    code, said = _trained(folder, "head", {"w": ramp(2)}, {"w": ramp(2), "head": ramp(2)})
    assert code == 1
    assert "NO  head: only in the base\n" in said


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("w = 0", "rule `w = 0`: what is trained has no value; leave the value out"),
        ("w = tied(0)", "what is trained has no value"),
        ("v", "rule `v = keep`: `v` is not a parameter of the model; did you mean `w`?"),
        ("w[9]", "index 9 is out of range"),
        ("w[2:]", "the region selects no entry"),
        ("w[", "column 3"),
        ("w", "the rules freeze no entry of the checkpoint: there is nothing to verify"),
        ("", "there is no rule to go by"),
    ],
)
def test_what_cannot_have_been_trained_is_refused(folder: Folder, rule: str, message: str) -> None:
    code, said = _trained(folder, rule, {"w": ramp(2)}, {"w": ramp(2)})
    assert code == 2
    assert message in said


def test_numbers_choose_nothing_where_the_shape_changed(folder: Folder) -> None:
    code, said = _trained(folder, "w[zeros]", {"w": ramp(3)}, {"w": ramp(2)})
    assert code == 2
    assert "`zeros` is chosen on the base, where `w` has shape (2,) instead of (3,)" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train-only", "w"], "--train-only asks what is as it was before; name the base: --against BASE"),
        (["--train-only", "w", "--rule", "w"], "a rule and --train-only are two questions; ask one after the other"),
        (["--train-only", "w", "--frozen", "f"], "--train-only and --frozen are two questions; ask one after the"),
        (["--frozen", "f", "--against", "b"], "--frozen says itself what the entries are to hold; leave --against out"),
    ],
)
def test_one_question_is_asked_at_a_time(folder: Folder, arguments: list[str], message: str) -> None:
    code, said = folder.run("verify", folder.checkpoint("a.pt", w=ramp(2)), *arguments)
    assert code == 2
    assert message in said


# --------------------------------------------------------------------------------------------------------------------
# --frozen


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 3))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of a model's tensors, into which writes are not undone on saving."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


_SPEC: dict[str, Any] = {
    "0.weight": torch.rand(4, 1, 3, 3, generator=torch.Generator().manual_seed(1)) > 0.5,
    "0.bias": (entries[:2], torch.tensor([1.0, -0.0])),
    "2.weight": lambda parameter: parameter > 0.1,
}


def _step(model: nn.Module, frozen: Any) -> None:
    optimizer = MaskedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1), frozen)
    for _ in range(3):
        model(torch.randn(2, 1, 4, 4)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("place", ["alone", "beside the model", "in a callback's state"])
def test_what_a_handle_saved_is_verified_masks_and_tensors_too(folder: Folder, place: str) -> None:
    model = _model()
    frozen = freeze_entries(model, [_SPEC, "2.bias[smallest(0.4)]"])
    saved: Any = frozen.state_dict()
    _step(model, frozen)
    path = folder.checkpoint("a.pt", **model.state_dict())
    if place == "beside the model":
        saved = {"model": model.state_dict(), "frozen": saved}
    elif place == "in a callback's state":
        saved = {"callbacks": {"FreezeEntries": {"format": 2, "released": False, "frozen": saved}}}
    state = folder.saved("frozen.pt", saved)
    code, said = folder.run("verify", path, "--frozen", state)
    assert code == 0
    assert "`0.weight[<tensor of shape (4, 1, 3, 3)>] = keep`" in said
    assert "`0.bias[:2] = <tensor of shape (2,)>`: 2 entries hold\n" in said
    assert said.endswith(
        f"verified {frozen.frozen_count} entries of 4 parameters\n0 other tensors were not looked at\n"
    )
    broken = _tensors(model)
    broken["2.weight"][frozen["2.weight"].frozen] += 1
    code, said = folder.run("verify", folder.saved("b.pt", broken), "--frozen", state)
    count = frozen["2.weight"].frozen_count
    assert code == 1
    assert f"NO  2.weight: `2.weight[<<lambda>>] = keep`: {count} of {count} entries do not hold\n" in said


def test_every_entry_that_a_handle_held_is_looked_at(folder: Folder) -> None:
    model = _model()
    frozen = freeze_entries(model, _SPEC)
    state = folder.saved("frozen.pt", frozen.state_dict())
    for name in frozen:
        for place in map(tuple, frozen[name].frozen.nonzero().tolist()):
            tensors = _tensors(model)
            tensors[name][place] += 1
            assert folder.run("verify", folder.saved("a.pt", tensors), "--frozen", state, "--quiet") == (1, "")


def test_a_checkpoint_in_another_dtype_or_under_a_wrapper_is_verified_too(folder: Folder) -> None:
    model = _model()
    state = folder.saved("frozen.pt", freeze_entries(model, _SPEC).state_dict())
    wrapped = {f"module.{name}": tensor.bfloat16() for name, tensor in model.state_dict().items()}
    assert folder.run("verify", folder.saved("a.pt", wrapped), "--frozen", state)[0] == 0


@pytest.mark.parametrize(
    "tie",
    [tied(0, start="first"), tied(torch.tensor([[0, 1], [0, -1], [0, 1]]), start="mean")],
    ids=["slices", "labels"],
)
def test_tied_entries_are_verified_from_a_saved_state(folder: Folder, tie: Any) -> None:
    model = nn.Linear(2, 3)
    frozen = freeze_entries(model, Rule("weight", value=tie))
    state = folder.saved("frozen.pt", frozen.state_dict())
    assert folder.run("verify", folder.checkpoint("a.pt", **model.state_dict()), "--frozen", state)[0] == 0
    tensors = _tensors(model)
    tensors["weight"][1, 0] += 1
    assert folder.run("verify", folder.saved("a.pt", tensors), "--frozen", state)[0] == 1


def test_the_states_of_two_handles_in_one_file_are_both_looked_at(folder: Folder) -> None:
    model = nn.Linear(2, 3)
    saved = [freeze_entries(model, rule).state_dict() for rule in ("weight[0] = 1", "weight[1] = 2")]
    state = folder.saved("frozen.pt", {"a": saved[0], "b": saved[1]})
    code, said = folder.run("verify", folder.checkpoint("a.pt", **model.state_dict()), "--frozen", state)
    assert code == 0
    assert "`weight[0] = 1`, `weight[1] = 2`: 4 entries hold\n" in said
    tensors = _tensors(model)
    tensors["weight"][0, 0] = 0
    assert folder.run("verify", folder.saved("a.pt", tensors), "--frozen", state)[0] == 1


def _state(**changes: Any) -> dict[str, Any]:
    state = freeze_entries({"w": ramp(3, 2).requires_grad_()}, {"w": ramp(3, 2) > 3}).state_dict()
    state["parameters"]["w"]["constraints"][0].update(changes)
    return state


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"w": ramp(2)}, "holds no state of frozen entries; save one: torch.save(frozen.state_dict(), path)"),
        ([1, 2], "holds no state of frozen entries"),
        ({"format": 1, "parameters": {}}, "the state has format 1, expected 2; load it with the version"),
        ({"format": 2, "parameters": {}}, "there is nothing to verify"),
        ({"format": 2, "parameters": {"w": 3}}, "the state cannot be read (TypeError"),
        ({"format": 2, "parameters": {3: {}}}, "the state cannot be read (TypeError"),
        (_state(entries={}), "the state cannot be read (KeyError: 'packed')"),
        (_state(entries={"positions": torch.tensor([99])}), "the state cannot be read (IndexError"),
        (_state(value=ramp(9)), "the state cannot be read (ValueError: values of shape (9,)"),
        (_state(value=None), "the state cannot be read (AttributeError"),
        (_state(rule=7), "`spec` must be text"),
    ],
)
def test_a_file_that_is_no_state_is_refused(folder: Folder, saved: Any, message: str) -> None:
    path = folder.checkpoint("a.pt", w=ramp(3, 2))
    code, said = folder.run("verify", path, "--frozen", folder.saved("frozen.pt", saved))
    assert code == 2
    assert message in said


def test_a_state_of_another_model_is_refused(folder: Folder) -> None:
    state = folder.saved("frozen.pt", _state())
    for tensors, message in (
        ({"v": ramp(3, 2)}, "the checkpoint has no `w`, of which entries were frozen; give the state that was saved"),
        (
            {"w": ramp(2, 3)},
            "`w` had shape (3, 2) when it was frozen, and has (2, 3) in the checkpoint; give the state",
        ),
        ({"w": ramp(3, 2).int()}, "parameter `w`: the parameter holds torch.int32, which no optimizer trains"),
    ):
        code, said = folder.run("verify", folder.saved("a.pt", tensors), "--frozen", state)
        assert code == 2
        assert message in said


def test_a_hostile_state_is_refused_and_not_executed(folder: Folder) -> None:
    mark = folder.path / "executed"
    path, state = folder.checkpoint("a.pt", w=ramp(2)), folder.saved("evil.pt", _state() | {"x": Hostile(mark)})
    code, said = folder.run("verify", path, "--frozen", state)
    assert code == 2
    assert "and nothing of it was executed" in said
    assert not mark.exists()


def test_a_state_within_itself_is_searched_once(folder: Folder) -> None:
    saved: dict[str, Any] = {"state": _state()}
    saved["self"] = saved
    path = folder.checkpoint("a.pt", w=ramp(3, 2))
    assert folder.run("verify", path, "--frozen", folder.saved("frozen.pt", saved))[0] == 0


def test_a_rule_with_a_pattern_and_a_tensor_is_verified_from_a_state(folder: Folder) -> None:
    tensors = {"w": ramp(2, 1, 3, 3).requires_grad_()}
    rule = Rule("w", ~entries[0], torch.tensor(2.0))
    frozen = freeze_entries(tensors, rule)
    path = folder.checkpoint("a.pt", w=tensors["w"].detach())
    assert folder.run("verify", path, "--frozen", folder.saved("frozen.pt", frozen.state_dict()))[0] == 0
