"""The command line: exit codes, the files that it opens and those that it rejects, rules files, and `show`."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from freezehooks import CheckpointError, FreezeError, parse_rule
from freezehooks.cli import main
from freezehooks.cli.checkpoints import open_checkpoint
from freezehooks.cli.output import complain, say
from freezehooks.cli.pairs import counterparts
from freezehooks.cli.rules_file import read_rules

from .checkpoints import Folder, Hostile, ramp


@pytest.fixture
def folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Folder:
    return Folder(tmp_path, capsys)


# --------------------------------------------------------------------------------------------------------------------
# The program


@pytest.mark.parametrize("command", ["show", "verify", "diff", "demo"])
def test_every_command_has_help_with_worked_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main([command, "--help"])
    assert leaving.value.code == 0
    assert f"freezehooks {command} " in capsys.readouterr().out.split("examples:")[1]


def test_the_help_says_what_commands_are_for_and_how_rules_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    commands = [f"\n    {command} " for command in ("explain", "show", "verify", "diff", "demo")]
    order = [said.index(text) for text in [*commands, "smallest(fraction)", "exit codes"]]
    assert order == sorted(order)


@pytest.mark.parametrize(
    "rule",
    [
        *("conv.weight[:, :, 1, 1] = 0", "conv?.weight[~cross] = 0", "layer*.conv?.weight[center]", "wte[~50257:]"),
        *("w[cross(3)]", "w[nm(2, 4)]"),
    ],
)
def test_the_rules_in_the_help_are_rules(rule: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_rule(rule).target
    with pytest.raises(SystemExit):
        main(["--help"])
    assert rule.removeprefix("w[").removesuffix("]") in capsys.readouterr().out.replace("nm(n, m)", "nm(2, 4)")


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["--version"])
    assert (leaving.value.code, capsys.readouterr().out.split()[0]) == (0, "freezehooks")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["praise", "a.pt"], "praise"),
        (["verify", "a.pt", "--rule", "w", "--limit", "-1"], "expected 0 or more, found -1"),
        (["verify", "a.pt", "--rule", "w", "--limit", "few"], "expected a whole number, found 'few'"),
    ],
)
def test_bad_use_is_code_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    assert leaving.value.code == 2
    assert message in capsys.readouterr().err


def test_alone_it_prints_its_help_and_is_no_yes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main([])
    said = capsys.readouterr().err
    assert leaving.value.code == 2
    assert said.startswith("usage: freezehooks")
    assert "exit codes" in said


@pytest.mark.parametrize(
    ("verb", "advice"),
    [
        ("verfy", "did you mean `verify`?"),
        ("Verify", "did you mean `verify`?"),
        ("explian", "did you mean `explain`?"),
        ("dif", "did you mean `diff`?"),
        ("shows", "did you mean `show`?"),
        ("praise", "the commands are explain, show, verify, diff, demo"),
        ("", "the commands are explain, show, verify, diff, demo"),
    ],
)
def test_a_mistyped_command_gets_a_suggestion(verb: str, advice: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main([verb, "a.pt"])
    assert leaving.value.code == 2
    assert f"error: there is no command {verb!r}; {advice}\n" in capsys.readouterr().err


def _asked(command: str, path: str) -> list[str]:
    return {
        "explain": ["explain", "w[0] = 1", "--shape", "2"],
        "show": ["show", path, "--rule", "w"],
        "verify": ["verify", path, "--rule", "w[0] = 1"],
        "diff": ["diff", path, path],
        "demo": ["demo", "--steps", "1"],
    }[command]


_COMMANDS = ["explain", "show", "verify", "diff", "demo"]


@pytest.mark.parametrize("command", _COMMANDS)
def test_quiet_leaves_the_code_alone(folder: Folder, command: str) -> None:
    path = folder.checkpoint("a.pt", w=ramp(2))
    assert folder.run(*_asked(command, path), "--quiet") == (0, "")
    assert folder.run("verify", path, "--rule", "w = 1", "--quiet") == (1, "")
    code, said = folder.run("verify", path, "--rule", "v = 1", "--quiet")
    assert code == 2
    assert "`v` is not a parameter" in said


@pytest.mark.parametrize("command", _COMMANDS)
def test_every_answer_is_also_json(folder: Folder, command: str) -> None:
    path = folder.saved("a.pt", {"w": ramp(2), "\x1b\n\u2028\u00e4": ramp(1)})
    code, said = folder.run(*_asked(command, path), "--json")
    told = json.loads(said)
    assert (code, told["code"]) == (0, 0)
    assert said.isascii()
    assert "\x1b" not in said


def test_the_json_of_verify_says_what_its_lines_say(folder: Folder) -> None:
    path = folder.checkpoint("a.pt", w=torch.tensor([0.0, float("nan"), 2.0]), v=ramp(2), u=ramp(1))
    code, said = folder.run(
        "verify", path, "--rule", "w = 0", "--rule", "v[smallest(0.5)] = 1", "--limit", "1", "--json"
    )
    first = {"index": [1], "found": "nan", "expected": "0.0"}
    wrong = {"count": 2, "compared": 3, "examples": [first], "worst": first, "gap": None}
    right = {"count": 0, "compared": 1, "examples": [], "worst": None, "gap": 0.0}
    rule = "v[smallest(0.5)] = 1"
    assert (code, json.loads(said)) == (
        1,
        {
            "code": 1,
            "verified": False,
            "tensors": [
                {"name": "w", "entries": 3, "broken": 2, "claims": {"`w = 0`": wrong}, "fact": ""},
                {"name": "v", "entries": 1, "broken": 0, "claims": {f"`{rule}`": right}, "fact": ""},
            ],
            "notes": [f"`{rule}`: `smallest` was chosen on the checkpoint itself, since there is no --against BASE"],
            "not_looked_at": ["u"],
        },
    )


@pytest.mark.parametrize("forms", [["--quiet", "--json"], ["--json", "--rules-only"], ["--quiet", "--rules-only"]])
def test_an_answer_has_one_form(folder: Folder, forms: list[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["diff", "a.pt", "b.pt", *forms])
    assert leaving.value.code == 2


def _crowd(folder: Path, count: int) -> None:
    """Write two files of many small tensors, every other one changed, and a rule for each."""
    before = {f"h.{n}.weight": ramp(8, 4) + n for n in range(count)}
    now = {name: tensor.clone() for name, tensor in before.items()}
    for n in range(0, count, 2):
        now[f"h.{n}.weight"][0] += 1
    torch.save(before, folder / "a.pt")
    torch.save(now, folder / "b.pt")
    (folder / "r.txt").write_text("\n".join(f"h.{n}[1:]" for n in range(count)), encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["show", "b.pt"], 0),
        (["show", "b.pt", "--rules", "r.txt"], 0),
        (["diff", "a.pt", "b.pt"], 1),
        (["verify", "b.pt", "--against", "a.pt", "--rule", "*[1:]"], 0),
        (["verify", "b.pt", "--against", "a.pt", "--rules", "r.txt"], 0),
        (["verify", "b.pt", "--against", "a.pt", "--train-only", "*[0]"], 0),
    ],
    ids=["show", "show rules", "diff", "verify", "verify rules", "verify --train-only"],
)
def test_work_grows_as_the_number_of_tensors_does(
    folder: Folder, arguments: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python -m benchmarks --scenario commands` says how long it takes."""
    monkeypatch.chdir(tmp_path)
    calls = []
    for count in (40, 40, 160):  # the first time some work is done once and for all
        _crowd(tmp_path, count)
        calls.append(_calls(partial(folder.run, *arguments)))
    assert folder.run(*arguments)[0] == code
    assert calls[2] < 4.4 * calls[1]


def _calls(do: Callable[[], object]) -> int:
    """Return how many functions are called, in Python and in C."""
    seen: Counter[str] = Counter()
    sys.setprofile(lambda frame, event, argument: seen.update([event]))
    try:
        do()
    finally:
        sys.setprofile(None)
    return seen["call"] + seen["c_call"]


def _process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "freezehooks", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)


def test_a_process_ends_with_the_code_of_the_answer(folder: Folder) -> None:
    path = folder.checkpoint("a.pt", w=torch.tensor([0.0, 1.0]))
    no, bad = (_process("verify", path, "--rule", rule) for rule in ("w = 0", "w[2] = 0"))
    assert (no.returncode, no.stderr) == (1, "")
    assert "w[1]: found 1.0, expected 0.0" in no.stdout
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("freezehooks: error: rule `w[2] = 0`")
    assert bad.stderr.count("\n") == 1


def test_a_closed_pipe_ends_it_quietly_and_is_no_yes(folder: Folder) -> None:
    command = [sys.executable, "-m", "freezehooks", "show", folder.checkpoint("a.pt", w=ramp(2))]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, timeout=300, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_an_answer_that_cannot_be_written_is_no_yes(folder: Folder) -> None:
    command = [sys.executable, "-m", "freezehooks", "show", folder.checkpoint("a.pt", w=ramp(2))]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300, check=False)
        silent = subprocess.run([*command[:-1], "none.pt"], stdout=full, stderr=full, timeout=300, check=False)
    said = "freezehooks: error: the answer cannot be written (No space left on device); write it elsewhere\n"
    assert (done.returncode, done.stderr) == (2, said)
    assert silent.returncode == 2


@pytest.mark.parametrize(("rule", "code"), [("w[0] = 1", 0), ("w = 1", 1), ("v = 1", 2)])
def test_without_streams_the_code_still_tells(
    folder: Folder, rule: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder.checkpoint("a.pt", w=ramp(2))
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it where a process is started with it closed
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["verify", path, "--rule", rule]) == code


class _Raises:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, *_: object, **__: object) -> Any:
        raise self.error


_NO_MEMORY = [
    MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    RuntimeError("unable to mmap 8 bytes from file <a.pt>: Cannot allocate memory (12)"),
]


@pytest.mark.parametrize("place", ["torch.load", "freezehooks.cli.show.rules_by_name"], ids=["opening", "looking"])
@pytest.mark.parametrize("error", _NO_MEMORY, ids=["Python", "allocator", "mmap"])
def test_too_little_memory_is_told_as_such(
    folder: Folder, place: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder.checkpoint("a.pt", w=ramp(2))
    monkeypatch.setattr(place, _Raises(error))
    told = "freezehooks: error: the tensors do not fit into memory; run it where there is more\n"
    assert folder.run("show", path, "--rule", "w") == (2, told)


def test_what_nobody_foresaw_is_not_hidden(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("freezehooks.cli.show.open_checkpoint", _Raises(RuntimeError("unforeseen")))
    with pytest.raises(RuntimeError, match="unforeseen"):
        main(["show", "a.pt"])


def test_an_interrupt_ends_it_quietly(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("freezehooks.cli.show.open_checkpoint", interrupted)
    assert folder.run("show", "a.pt") == (130, "")


class _Terminal(io.StringIO):
    encoding = "ascii"


def test_what_a_stream_cannot_encode_is_written_in_signs_that_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    say("\u25a0\u25a1 3\u00d73 \u00e4")
    assert terminal.getvalue() == "#. 3x3 \\xe4\n"


def test_a_name_from_a_file_commands_no_terminal_and_forges_no_line(folder: Folder) -> None:
    path = folder.saved("a.pt", {"w\x1b[2J\nverified": torch.ones(2)})
    said = folder.run("show", path)[1]
    assert "\x1b" not in said
    assert "w\\x1b[2J\\nverified" in said
    assert folder.run("verify", path, "--rule", "w* = 0")[1].count("\n") == 6


def test_an_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    complain("one\ntwo\x1b[0m")
    assert capsys.readouterr().err == "freezehooks: error: one two\\x1b[0m\n"


# --------------------------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.mark.parametrize(
    "content",
    [
        {"w": ramp(2)},
        {"state_dict": {"w": ramp(2)}, "epoch": 3, "best": torch.tensor(0.5)},
        {"model": {"w": ramp(2)}, "optimizer": {"state": {0: {"exp_avg": ramp(2)}}}},
        {"model_state_dict": {"w": ramp(2)}},
        {"module": {"w": ramp(2)}},
        {"state": {"w": ramp(2)}},
        {"w": nn.Parameter(ramp(2)), "_extra_state": 5},
    ],
    ids=["flat", "Lightning", "model", "model_state_dict", "module", "state", "parameters"],
)
def test_the_tensors_are_found_where_they_usually_are(folder: Folder, content: Any) -> None:
    found = open_checkpoint(folder.saved("a.pt", content))
    assert list(found) == ["w"]
    assert found["w"].equal(ramp(2))
    assert not found["w"].requires_grad


def test_a_key_says_where_else_they_are(folder: Folder) -> None:
    path = folder.saved("a.pt", {"ema": {"net": {"w": ramp(2)}}, "model": {"w": ramp(3)}, "a.b": {"w": ramp(4)}})
    assert len(open_checkpoint(path, "ema.net")["w"]) == 2
    assert len(open_checkpoint(path, "a.b")["w"]) == 4
    with pytest.raises(CheckpointError, match=r"has no `nets` on the way to `ema.nets`: its keys are `net` \(dict\)"):
        open_checkpoint(path, "ema.nets")
    with pytest.raises(CheckpointError, match=r"no tensors by name under `ema`: its keys are `net` \(dict\); correct"):
        open_checkpoint(path, "ema")


def test_two_models_in_one_file_are_told_apart_by_the_key(folder: Folder) -> None:
    path = folder.saved("a.pt", {"model": {"w": ramp(3)}, "state_dict": {"w": ramp(2)}, "ema": {"w": ramp(4)}})
    with pytest.raises(CheckpointError, match="holds tensors under `state_dict` and `model`; say which: --key state_d"):
        open_checkpoint(path)
    assert len(open_checkpoint(path, "model")["w"]) == 3


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
def test_both_formats_of_torch_are_read(tmp_path: Path, options: Any) -> None:
    torch.save({"w": ramp(2)}, tmp_path / "a.bin", **options)
    assert open_checkpoint(str(tmp_path / "a.bin"))["w"].equal(ramp(2))


def test_safetensors_are_read(folder: Folder) -> None:
    path = folder.saved("a.safetensors", {"w": ramp(2).bfloat16()})
    assert open_checkpoint(path)["w"].equal(ramp(2).bfloat16())


def test_one_tensor_under_two_names_is_looked_at_under_both(folder: Folder) -> None:
    path = folder.checkpoint("a.pt", **dict.fromkeys(("v", "w"), ramp(2)))
    assert "verified 2 entries of 2 parameters" in folder.run("verify", path, "--rule", "*[0] = 1")[1]


def _file(folder: Folder, kind: str) -> str:
    whole = folder.checkpoint("whole.pt", w=ramp(1000))
    match kind:
        case "missing":
            return str(folder.path / "missing.pt")
        case "folder":
            return str(folder.path)
        case "text":
            return folder.text("text.pt", "hello there\n")
        case "empty":
            return folder.text("empty.pt", "")
        case "truncated":
            (folder.path / "cut.pt").write_bytes(Path(whole).read_bytes()[:2000])
            return str(folder.path / "cut.pt")
        case "safetensors by another name":
            return str(Path(folder.saved("s.safetensors", {"w": ramp(2)})).rename(folder.path / "s.pt"))
        case "torch by another name":
            pytest.importorskip("safetensors")
            return str(Path(whole).rename(folder.path / "t.safetensors"))
        case "a whole module":
            return folder.saved("module.pt", nn.Linear(2, 2))
        case "no tensors":
            return folder.saved("none.pt", {"epoch": 3})
        case "a list":
            return folder.saved("list.pt", [ramp(2)])
        case "optimizer":
            return folder.saved("optimizer.pt", {"state": {0: {"exp_avg": ramp(2)}}, "param_groups": []})
        case "compressed":
            packed = folder.path / "packed.pt"
            with zipfile.ZipFile(whole) as archive, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as copy:
                for part in archive.namelist():
                    copy.writestr(part, archive.read(part))
            return str(packed)
        case "TorchScript":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch is giving it up
                torch.jit.save(torch.jit.script(nn.Linear(2, 2)), folder.path / "script.pt")
            return str(folder.path / "script.pt")
        case "nested":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it is a prototype
                return folder.saved("nested.pt", {"w": torch.nested.nested_tensor([ramp(2), ramp(3)])})
        case "index":
            (folder.path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "model-1.safetensors"}}')
            return str(folder.path / "model.safetensors.index.json")
        case "sparse":
            return folder.saved("sparse.pt", {"w": torch.eye(3).to_sparse()})
    return folder.saved("meta.pt", {"w": torch.empty(2, device="meta")})


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "there is no file `.*missing.pt`; check the path"),
        ("folder", "is a folder; name the file inside it; it holds whole.pt"),
        ("text", "is not a checkpoint, or is incomplete .*; give a file that torch.save wrote"),
        ("empty", "is not a checkpoint, or is incomplete .*; give a file that torch.save wrote"),
        ("truncated", "is not a checkpoint, or is incomplete .* copy it again if it was cut short"),
        ("safetensors by another name", "is not a checkpoint of tensors only, and nothing of it was executed"),
        ("torch by another name", "is not a file of safetensors, or is incomplete .*; copy it again"),
        (
            "a whole module",
            r"asks for `torch.nn.modules.linear.Linear`, .*; .*\(model.state_dict\(\), path\)",
        ),
        ("no tensors", r"holds no tensors by name: its keys are `epoch` \(int\); say where they are: --key KEY"),
        ("a list", "holds no tensors by name: there is a list"),
        ("optimizer", r"its keys are `state` \(dict\), `param_groups` \(list\)"),
        (
            "compressed",
            r"is compressed \(`whole/data/0` in it\), as torch.save never does; load it and save it again",
        ),
        ("TorchScript", r"is not a checkpoint, .*TorchScript archive"),
        ("nested", r"`w` of .* is nested; save dense tensors"),
        ("sparse", r"`w` of .* is torch.float32 in layout torch.sparse_coo; save dense tensors"),
        ("meta", r"`w` of .* is on the meta device, and has no numbers; save the model after it was loaded"),
        ("index", r"index.json` lists the files of a checkpoint and holds no tensors; name one of those files"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(folder: Folder, kind: str, message: str) -> None:
    path = _file(folder, kind)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)
    assert folder.run("show", path)[0] == 2


def test_a_folder_that_may_not_be_read_is_refused(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "iterdir", _Raises(PermissionError(13, "Permission denied")))
    with pytest.raises(CheckpointError, match=r"is a folder; name the file inside it$"):
        open_checkpoint(str(folder.path))


class _Part(torch.Tensor):
    """Imitates a tensor that is sharded over ranks."""


def test_a_tensor_of_another_class_is_refused(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder.checkpoint("a.pt", w=ramp(2))
    monkeypatch.setattr(torch, "load", lambda *_, **__: {"w": ramp(2).as_subclass(_Part)})
    with pytest.raises(CheckpointError, match=r"`w` of .* is a _Part, .* only a shard; save the full state_dict"):
        open_checkpoint(path)


def test_a_file_that_may_not_be_read_is_refused(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = folder.checkpoint("a.pt", w=ramp(2))
    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(CheckpointError, match=r"`.*a.pt` cannot be read \(Permission denied\); check the file"):
        open_checkpoint(path)


class _Recorder:
    """Replaces torch.load, and records how it was called."""

    def __init__(self, asked: list[dict[str, Any]]) -> None:
        self.asked = asked

    def __call__(self, path: str, **options: Any) -> Any:
        self.asked.append(options)
        return {"w": ramp(2)}


def test_no_numbers_are_loaded_with_trust(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    path = folder.checkpoint("a.pt", w=ramp(2))
    monkeypatch.setattr(torch, "load", _Recorder(asked))
    open_checkpoint(path)
    assert [(options["weights_only"], options["mmap"]) for options in asked] == [(True, True)]


def test_a_list_of_many_keys_is_cut_short(folder: Folder) -> None:
    path = folder.saved("a.pt", {f"k{n}": n for n in range(11)})
    with pytest.raises(CheckpointError, match=r"`k7` \(int\) and 3 more"):
        open_checkpoint(path)


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_hostile_file_is_refused_and_not_executed(folder: Folder, write: Any) -> None:
    mark, path = folder.path / "executed", folder.path / "evil.pt"
    write({"w": Hostile(mark)}, path)
    for command in (["show"], ["verify", "--rule", "w = 0"], ["diff", str(path)]):
        code, said = folder.run(command[0], str(path), *command[1:])
        assert code == 2
        assert "and nothing of it was executed; save only its tensors" in said
    assert not mark.exists()
    pickle.loads(pickle.dumps(Hostile(mark)))  # what it would have done
    assert mark.exists()


def test_without_safetensors_the_error_names_the_extra(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder.text("a.safetensors", "not looked at")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert folder.run("show", path) == (
        2,
        f"freezehooks: error: reading `{path}` needs the package safetensors, which is not installed; "
        'run `pip install "freezehooks[cli]"`\n',
    )


def test_names_pair_but_for_names_of_wrappers() -> None:
    one = ramp(1)
    assert counterparts({"module.w": one, "b": one}, {"w": one, "_orig_mod.b": one}) == {
        "module.w": "w",
        "b": "_orig_mod.b",
    }
    with pytest.raises(CheckpointError, match=r"`w` may be `module.w` or `_orig_mod.w` of the other file; save both"):
        counterparts({"w": one}, {"module.w": one, "_orig_mod.w": one})
    with pytest.raises(CheckpointError, match=r"`w` of the other file may be `module.w` or `_orig_mod.w`; save both"):
        counterparts({"module.w": one, "_orig_mod.w": one}, {"w": one})


def test_a_name_that_both_files_have_stands_for_itself_alone() -> None:
    one = ramp(1)
    assert counterparts({"w": one, "module.w": one}, {"w": one}) == {"w": "w"}
    assert counterparts({"w": one}, {"module.w": one, "w": one}) == {"w": "w"}


# --------------------------------------------------------------------------------------------------------------------
# Rules files

_TWO = ["conv.weight[:, :, 1, 1] = 0", "head = keep"]


def _rules_file(folder: Folder, name: str, content: str) -> str:
    """Write a file of rules; skip the test if it is YAML and PyYAML is missing."""
    if Path(name).suffix in (".yaml", ".yml"):
        pytest.importorskip("yaml")
    return folder.text(name, content)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("r.txt", "# two rules\nconv.weight[:, :, 1, 1] = 0  # the center\n\nhead\n"),
        ("r.rules", "\ufeffconv.weight[:, :, 1, 1] = 0\r\nhead"),
        ("r.yaml", "|\n  conv.weight[:, :, 1, 1] = 0\n  head\n"),
        ("r.yml", "- conv.weight[:, :, 1, 1] = 0\n- head\n"),
        ("r.yaml", "rules:\n  - conv.weight[:, :, 1, 1] = 0\n  - head: ...\n"),
        ("r.yaml", 'spec:\n  conv.weight: [":, :, 1, 1", 0]\n  head: ...\n'),
        ("r.yaml", "conv.weight:\n  - ':, :, 1, 1'\n  - 0\nhead: [..., keep]\n"),
    ],
    ids=["text", "text of Windows", "block", "list", "rules", "spec", "mapping"],
)
def test_a_rules_file_is_read_in_every_form(folder: Folder, name: str, content: str) -> None:
    assert [str(rule) for rule in read_rules(_rules_file(folder, name, content))] == _TWO


def test_what_yaml_takes_for_numbers_is_the_text_that_it_was(folder: Folder) -> None:
    path = _rules_file(folder, "r.yaml", "0: 0\n1.50: [1:30, 1e3]\nno: ['1', -0.0]\n")
    assert [str(rule) for rule in read_rules(path)] == ["0[0] = keep", "1.50[1:30] = 1000", "no[1] = -0"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.txt", "w\nw[", "r.txt`: line 2: rule `w.`: column 3: expected an index"),
        ("r.txt", "# nothing\n", "r.txt`: the file holds no rule; write one a line"),
        ("r.yaml", "[]", "r.yaml`: the file holds no rule"),
        ("r.yaml", "", "expected rules, found nothing; write a list of rules"),
        ("r.yaml", "- w\n- [a, b]", "item 2: expected a rule or a mapping, found a list"),
        ("r.yaml", "- w\n- 'w['", "item 2: line 1: rule `w.`: column 3"),
        ("r.yaml", "w: {a: b}", "rule for `w`: expected text, found a mapping"),
        ("r.yaml", "w: [0, 1, 2]", "rule for `w`: a mapping's item is a region or .region, value., found 3 items"),
        ("r.yaml", "w: [0, center]", "rule for `w`: value `center`: column 1"),
        ("r.yaml", "w: middle", "rule for `w`: region `middle`: column 1: unknown pattern"),
        ("r.yaml", "w:", "rule for `w`: the region or the value is empty; write `...`"),
        ("r.yaml", "w: 0\nw: 1", "a key is not text, or is written twice"),
        ("r.yaml", "[a]: 1", "a key is not text, or is written twice"),
        ("r.yaml", "- &a w\n- *a", "anchors and aliases have no meaning here"),
        ("r.yaml", "w: !!int 3", "the tag .* has no meaning here, and nothing was made of it"),
        ("r.yaml", "!!map [w]", "the tag .* has no meaning here, and nothing was made of it"),
        ("r.yaml", "? !!python/name:os.x w\n: 0", "the tag .* has no meaning here, and nothing was made of it"),
        ("r.yaml", "w: [", "the YAML cannot be read"),
        ("r.yaml", "[" * 1000, "the YAML is nested too deeply"),
    ],
)
def test_a_bad_rules_file_is_refused_by_name(folder: Folder, name: str, content: str, message: str) -> None:
    path = _rules_file(folder, name, content)
    with pytest.raises(FreezeError, match=message):
        read_rules(path)
    assert folder.run("verify", "a.pt", "--rules", path)[1].startswith("freezehooks: error: `")


def test_a_hostile_yaml_is_refused_and_not_executed(folder: Folder) -> None:
    mark = folder.path / "executed"
    path = _rules_file(folder, "r.yaml", f'- !!python/object/apply:os.system ["touch {mark}"]\n')
    code, said = folder.run("verify", "a.pt", "--rules", path)
    assert code == 2
    assert "python/object/apply:os.system' has no meaning here" in said
    assert not mark.exists()


def test_a_rules_file_that_cannot_be_read_is_refused(folder: Folder) -> None:
    (folder.path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FreezeError, match=r"the rules file `.*binary.txt` is not text in UTF-8; check --rules"):
        read_rules(str(folder.path / "binary.txt"))
    with pytest.raises(FreezeError, match=r"the rules file `.*none.txt` cannot be read \(No such file or directory\)"):
        read_rules(str(folder.path / "none.txt"))


def test_without_yaml_text_files_are_still_read(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert len(read_rules(folder.text("r.txt", "w"))) == 1
    with pytest.raises(FreezeError, match=r'PyYAML, which is not installed; run `pip install "freezehooks\[cli\]"`'):
        read_rules(folder.text("r.yaml", "- w"))


def test_rules_come_from_files_and_from_the_command_line_together(folder: Folder) -> None:
    path = folder.checkpoint("a.pt", v=ramp(2), w=ramp(2))
    said = folder.run("show", path, "--rules", folder.text("r.txt", "v[0]"), "--rule", "w[1]", "--rule", "v[0]")[1]
    assert "v[0] = keep" in said
    assert "w[1] = keep" in said
    assert "frozen: 2 of all 4 entries" in said


# --------------------------------------------------------------------------------------------------------------------
# show


def test_without_rules_the_tensors_of_the_file_are_listed(folder: Folder) -> None:
    path = folder.checkpoint("a.pt", conv__weight=ramp(8, 1, 3, 3), steps=torch.tensor(3), half=ramp(2).half())
    assert folder.run("show", path) == (
        0,
        "tensor       shape         dtype    entries\n"
        "conv.weight  (8, 1, 3, 3)  float32       72\n"
        "steps        ()            int64          1\n"
        "half         (2,)          float16        2\n"
        "3 tensors, 75 entries\n",
    )


def test_the_table_says_what_is_selected_and_what_it_holds(folder: Folder) -> None:
    path = folder.checkpoint("a.pt", v=ramp(2, 3), w=torch.tensor([0.5, 0.5, 2.0]), n=torch.tensor(3))
    rules = folder.text("r.txt", "v[0]\nw[:2] = 0.5\n")
    assert folder.run("show", path, "--rules", rules) == (
        0,
        "parameter  shape   rules        frozen  free  hold now\n"
        "v          (2, 3)  v[0] = keep       3     3  1 to 3\n"
        "w          (3,)    w[:2] = 0.5       2     1  0.5\n"
        "frozen: 5 of all 10 entries of the file (50 %)\n",
    )


def test_a_file_without_entries_is_shown(folder: Folder) -> None:
    path = folder.checkpoint("a.pt", w=torch.empty(2, 0))
    code, said = folder.run("show", path, "--rule", "w = tied(0)")
    assert code == 0
    assert said.endswith("frozen: 0 of all 0 entries of the file (0 %)\n")


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ([0.0, -0.0], "-0 to 0|0 to -0|0 to 0"),
        ([1.0, float("nan")], "1 to 1, and nan"),
        ([float("nan"), float("nan")], "nan"),
        ([3 + 4j, 0j], "magnitudes 0 to 5"),
    ],
)
def test_odd_numbers_are_shown_too(folder: Folder, numbers: list[Any], said: str) -> None:
    path = folder.checkpoint("a.pt", w=torch.tensor(numbers))
    assert any(folder.run("show", path, "--rule", "w")[1].split("\n")[1].endswith(text) for text in said.split("|"))


@pytest.mark.parametrize(
    ("copies", "said"),
    [
        ([1.0, 1.0], "the 2 slices along dimension 0 are tied"),
        ([1.0, 3.5], "the 2 slices along dimension 0 differ, by up"),
    ],
)
def test_tied_copies_are_shown_whether_they_differ_or_not(folder: Folder, copies: list[float], said: str) -> None:
    path = folder.checkpoint("a.pt", w=torch.tensor(copies).view(2, 1))
    code, out = folder.run("show", path, "--rule", "w = tied(0)")
    assert code == 0
    assert f"w = tied(0)       0     2  {said}" in out


def test_one_of_a_kind_is_counted_as_one(folder: Folder) -> None:
    path = folder.checkpoint("a.pt", w=ramp(1))
    assert folder.run("show", path)[1].endswith("\n1 tensor, 1 entry\n")
    assert folder.run("show", path, "--rule", "w")[1].endswith("\nfrozen: 1 of all 1 entry of the file (100 %)\n")
    assert "the 1 slice along dimension 0 is tied\n" in folder.run("show", path, "--rule", "w = tied(0)")[1]


def test_a_wildcard_passes_over_integers_and_a_name_does_not(folder: Folder) -> None:
    path = folder.checkpoint("a.pt", bn__num_batches_tracked=torch.tensor(3), bn__weight=ramp(2))
    assert "num_batches" not in folder.run("show", path, "--rule", "bn.*")[1]
    code, said = folder.run("show", path, "--rule", "bn.num_batches_tracked")
    assert code == 2
    assert "`bn.num_batches_tracked` holds torch.int64, which no optimizer trains; name floating-point" in said


@pytest.mark.parametrize(
    ("rule", "message"),
    [("v", "rule `v = keep`: `v` is not a parameter"), ("w[9]", "index 9 is out of range"), ("w[", "column 3")],
)
def test_a_rule_that_does_not_fit_is_refused(folder: Folder, rule: str, message: str) -> None:
    code, said = folder.run("show", folder.checkpoint("a.pt", w=ramp(2)), "--rule", rule)
    assert code == 2
    assert message in said
