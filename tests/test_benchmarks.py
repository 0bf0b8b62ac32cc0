"""The benchmarks run and report what they should; timings themselves are not tested."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD

from benchmarks import _comparison
from benchmarks.__main__ import ON_CPU, ON_CUDA, SCENARIOS, _chosen, _parser
from benchmarks._comparison import Case, Claim, Options, Row, whether_held
from benchmarks._kernels import kernels_launched, launches
from benchmarks._measure import Clock, Spread, Timing, added_milliseconds, interleave, ratios
from benchmarks._memory import held_bytes, peak_bytes, state_bytes, tensor_bytes
from benchmarks._report import broken, table
from benchmarks.alternatives import AT_VALUES, AT_ZERO, MaskAroundStep, Parametrize, Prune, TrainableTokens
from benchmarks.gpt2 import GPT2, Architecture
from benchmarks.many_layers import many
from benchmarks.models import FULL, TINY
from benchmarks.resnet50 import resnet
from benchmarks.subjects import FreezeHooks, FreezeHooksCompact, Held, Plain, Task
from freezehooks import entries, freeze_entries

ROOT = Path(__file__).parents[1]
ONCE = Options(torch.device("cpu"), rounds=1, warm_up=0, sizes=TINY)


def _run(*options: str) -> str:
    command = [sys.executable, "-m", "benchmarks", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _task(held: Held) -> Task:
    """A layer to train with momentum and weight decay, which move entries frozen only by their gradient."""
    region = entries[held.index] if isinstance(held.index, tuple) else held.index
    return Task(
        nn.Linear(4, 3, bias=False),
        [torch.randn(5, 4) for _ in range(2)],
        lambda model, rows: model(rows).square().sum(),
        lambda parameters: SGD(parameters, lr=0.01, momentum=0.9, weight_decay=0.1),
        [held],
        {held.name: (region, held.value)},
    )


def _trained(kind: type[Plain], task: Task) -> Plain:
    subject = kind(task)
    for number in range(3):
        subject.turn(number, Clock(torch.device("cpu")))
    return subject


# The command


def test_the_command_measures_prints_and_writes(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    output = _run("--quick", "--scenario", "install", "--json", str(found))
    for said in ("torch: ", "threads: 1", "allocator: ", "1,000 parameters", "10,000,000 entries", "claims not held"):
        assert said in output
    written = json.loads(found.read_text())
    assert written["environment"]["torch"] == torch.__version__
    rows = written["scenarios"]["install"][0]["rows"]
    assert rows["1,000 parameters"]["time"]["median"] > 0
    assert rows["1,000 parameters"]["ratio"]["median"] is None


def test_the_command_lists_what_must_hold() -> None:
    output = _run("--list")
    for name in SCENARIOS:
        assert f"{name}: " in output
    assert output.count("Must hold: ") == len(SCENARIOS)
    assert output.count("Runs on: ") == len(SCENARIOS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
def test_without_cuda_the_command_says_so_and_what_to_do() -> None:
    command = [sys.executable, "-m", "benchmarks", "--device", "cuda", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 2
    assert "torch sees no CUDA device here; to see that its scenarios run, leave --device out" in done.stderr


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ([], ON_CPU),
        (["--device", "cuda", "--quick"], ON_CUDA),
        (["--tiny", "--quick"], SCENARIOS),
        (["--scenario", "gpt2"], ["gpt2"]),
    ],
    ids=" ".join,
)
def test_the_scenarios_are_those_for_the_device_unless_named_or_tiny(options: list[str], chosen: list[str]) -> None:
    assert _chosen(_parser().parse_args(options)) == list(chosen)


def test_what_is_for_cuda_runs_on_the_cpu_by_name() -> None:
    output = _run("--tiny", "--rounds", "1", "--scenario", "resnet50")
    assert "center of every 3x3 kernel, ResNet-50, bfloat16" in output
    assert "at most 1.02 x plain: " in output


@pytest.mark.filterwarnings("default")  # those of PEFT and of what it imports are not ours
@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario_runs_and_every_subject_holds_what_it_must(name: str) -> None:
    cases = list(SCENARIOS[name](ONCE))
    assert cases
    assert any(row.claims for case in cases for row in case.rows.values())
    for case in cases:
        assert case.title in table(case)
        for row in case.rows.values():
            assert not row.entries.startswith("drifted"), row.name
            assert row.claims[:1] == [Claim("entries held", held=True)] or "freezehooks" not in row.name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here")
@pytest.mark.parametrize("name", ON_CUDA)
def test_scenario_runs_on_cuda(name: str) -> None:
    for case in ON_CUDA[name](Options(torch.device("cuda"), rounds=1, warm_up=0, sizes=TINY)):
        plain = case.rows[Plain.name]
        assert plain.time.median > 0
        assert plain.step.median == 1
        assert plain.kernels


@pytest.mark.parametrize(
    ("name", "limits"),
    [
        (
            "gpt2",
            ["at most 1.03 x plain", "at most 1.03 x plain", "step at most 1.3 x plain", "step at most 1 x plain"],
        ),
        ("resnet50", ["at most 1.02 x plain"]),
        ("wide", ["at most 1.25 x plain"]),
        ("wide_tokens", ["step at most 0.1 x plain", "state under 300 kB", "no slower than PEFT"]),
    ],
)
def test_scenario_says_how_slow_it_may_be(name: str, limits: list[str]) -> None:
    found = [row.claims[1:] for case in SCENARIOS[name](ONCE) for row in case.rows.values()]
    if TrainableTokens.missing():
        limits = [limit for limit in limits if "PEFT" not in limit]
    assert [claim.text for claims in found for claim in claims] == limits


@pytest.mark.filterwarnings("default")  # as above
@pytest.mark.parametrize("name", ["gpt2", "many", "resnet50", "wide", "wide_tokens"])
def test_scenario_for_cuda_has_the_forum_s_recipe_and_all_that_can_hold_its_values(name: str) -> None:
    wanted = AT_VALUES if name == "wide_tokens" else AT_ZERO
    tokens = {TrainableTokens.name} - ({TrainableTokens.name} if TrainableTokens.missing() else set())
    cases = [case for case in ON_CUDA[name](ONCE) if "nine tenths" not in case.title]  # which is about compact mode
    for case in cases:
        assert {FreezeHooksCompact.name, *(kind.name for kind in wanted)} <= case.rows.keys()
        assert (tokens <= case.rows.keys()) or name != "wide_tokens"


def test_fused_steps_are_measured_against_what_the_mask_around_the_step_adds() -> None:
    claims = {case.title: case.rows[FreezeHooks.name].claims[1:] for case in SCENARIOS["half"](ONCE)}
    for title, found in claims.items():
        fused = ["adds at most 1.8 x mask around step"] if "fused" in title else []
        assert [claim.text for claim in found] == fused


def test_the_longest_chain_is_measured_against_plain_and_prune() -> None:
    cases = list(many(ONCE))
    lengths = len(TINY.chains)
    for number, case in enumerate(cases, start=1):
        assert {Prune.name, Parametrize.name, MaskAroundStep.name} < set(case.rows)
        said = str(case.rows[FreezeHooks.name].claims)
        assert "us a parameter" in said
        for claim in ("at most 1.15 x plain", "not above torch prune", "linear, "):
            assert (claim in said) == (number % lengths == 0)


# The models


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_gpt2_is_the_one_with_124_million_parameters() -> None:
    with torch.device("meta"):
        model = GPT2(Architecture())
        scores = model(torch.zeros(FULL.sentences, dtype=torch.long))
    assert _parameters(model) == 124_439_808
    assert scores.shape == (8, 1024, 50_257)


def test_gpt2_sees_no_token_before_its_time() -> None:
    model = GPT2(TINY.gpt2)
    tokens = torch.tensor([[1, 2, 3, 4], [1, 2, 5, 6]])
    first, second = model(tokens)
    torch.testing.assert_close(first[:2], second[:2])
    assert not first[2].allclose(second[2])


def test_resnet50_has_its_parameters_and_kernels() -> None:
    with torch.device("meta"):
        model = resnet(FULL.bottlenecks)
        assert model(torch.zeros(2, 3, 224, 224)).shape == (2, 1000)
    assert _parameters(model) == 25_557_032
    kernels = [m.kernel_size for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert (len(kernels), kernels.count((3, 3))) == (53, 16)


# The subjects


@pytest.mark.parametrize("kind", [FreezeHooks, FreezeHooksCompact, *AT_ZERO], ids=lambda kind: kind.name)
def test_subject_holds_zeros(kind: type[Plain]) -> None:
    if kind.missing():
        pytest.skip(str(kind.missing()))
    subject = _trained(kind, _task(Held("weight", torch.rand(3, 4) < 0.5)))
    assert not whether_held(subject)[0].startswith("drifted")


@pytest.mark.parametrize("kind", [FreezeHooks, FreezeHooksCompact, *AT_VALUES], ids=lambda kind: kind.name)
def test_subject_holds_values(kind: type[Plain]) -> None:
    if kind.missing():
        pytest.skip(str(kind.missing()))
    subject = _trained(kind, _task(Held("weight", torch.rand(3, 4) < 0.5, torch.randn(3, 4))))
    assert not whether_held(subject)[0].startswith("drifted")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_whether_entries_held_is_told_to_the_last_bit_in_every_width(dtype: torch.dtype) -> None:
    task = _task(Held("weight", (slice(None), 0)))
    task = replace(task, model=task.model.to(dtype), batches=[batch.to(dtype) for batch in task.batches])
    subject = _trained(FreezeHooks, task)
    assert whether_held(subject) == ("bit for bit", True)
    subject.parameter(task.held[0]).data[:, 0] = -0.0
    assert whether_held(subject) == ("but for the sign of 0", False)


def test_every_subject_computes_the_same_free_entries() -> None:
    held = Held("weight", (slice(None), 0))
    task = _task(held)
    with torch.no_grad():
        task.model.get_parameter("weight")[held.index] = 0  # for those that look at it before they hold it
    kinds: list[type[Plain]] = [FreezeHooks, *AT_ZERO]
    subjects = [_trained(kind, task) for kind in kinds]
    for subject in subjects:
        torch.testing.assert_close(subject.computed(held), subjects[0].computed(held), rtol=0, atol=1e-6)


def test_drift_under_an_alternative_is_reported() -> None:
    task = _task(Held("weight", (slice(None), 0)))
    assert whether_held(_trained(Plain, task)) == ("not frozen", False)
    assert whether_held(_trained(FreezeHooks, task)) == ("bit for bit", True)
    assert whether_held(_trained(MaskAroundStep, task))[0] == "but for the sign of 0"
    for kind in (Prune, Parametrize):
        assert whether_held(_trained(kind, task))[0].startswith("in the forward; stored off by ")
    moved = _trained(FreezeHooks, task)
    moved.parameter(task.held[0]).data.add_(0.5)
    assert whether_held(moved) == ("drifted by 0.5", False)


@pytest.mark.filterwarnings("default")  # as above
def test_trainable_tokens_learn_the_free_rows_alone() -> None:
    pytest.importorskip("peft")
    model = nn.Sequential(nn.Embedding(6, 4))
    held = Held("0.weight", slice(None, -2), model.get_parameter("0.weight").detach().clone())
    batches = [torch.tensor([[0, 4, 5]])]
    task = Task(model, batches, lambda model, tokens: model(tokens).square().sum(), SGD, [held], None)
    subject = _trained(TrainableTokens, task)
    assert whether_held(subject) == ("bit for bit", True)
    assert not subject.computed(held)[-2:].equal(model.get_parameter("0.weight")[-2:])


# Measuring


def test_rounds_are_paired_and_the_first_do_not_count() -> None:
    calls: list[tuple[str, int]] = []

    def turn(number: int, name: str, seconds: float) -> Timing:
        calls.append((name, number))
        return Timing(seconds * (number + 1))

    turns = {"a": partial(turn, name="a", seconds=1), "b": partial(turn, name="b", seconds=3)}
    found = interleave(turns, rounds=4, warm_up=2)
    own, base = ([timing.whole for timing in found[name]] for name in ("b", "a"))
    assert base == [3, 4, 5, 6]
    assert ratios(own, base) == Spread(3, 3, 3)
    assert added_milliseconds(own, base).median == 9000
    assert [number for _, number in calls] == [n for n in range(6) for _ in "ab"]
    assert len({tuple(name for name, n in calls if n == number) for number in range(6)}) == 2


class Counting(Clock):
    """Counts up by one at each reading, and records which readings were taken."""

    def __init__(self, parts: bool) -> None:
        super().__init__(torch.device("cpu"), parts)
        self.reads_parts = parts
        self.readings = 0

    def __call__(self) -> float:
        self.readings += 1
        return self.readings


def test_on_cuda_the_step_is_timed_in_rounds_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Clock] = []

    class Recorded(Clock):
        """Reads parts only where it must, as on CUDA."""

        def __init__(self, device: torch.device, parts: bool = False) -> None:
            super().__init__(device, parts)
            self.reads_parts = parts
            made.append(self)

    monkeypatch.setattr(_comparison, "Clock", Recorded)
    case = _comparison.compare("title", [Plain, Prune], _task(Held("weight", (slice(None), 0))), ONCE, rounds=1)
    assert [clock.reads_parts for clock in made] == [False, True]
    assert all(row.step.median > 0 and row.time.median > 0 for row in case.rows.values())


def test_a_turn_reads_the_clock_within_it_only_where_the_step_is_timed_alone() -> None:
    task = replace(_task(Held("weight", (slice(None), 0))), steps=3)
    whole, parts = Counting(parts=False), Counting(parts=True)
    found = Plain(task).turn(0, whole)
    assert (found.whole, whole.readings) == (1 / 3, 2)
    assert math.isnan(found.step)
    assert Plain(task).turn(0, parts) == Timing(7 / 3, 1)


def test_bytes_count_each_storage_once() -> None:
    tensor = torch.zeros(10)
    assert tensor_bytes({"a": tensor, "b": [tensor[:3], (tensor,)]}) == 40
    assert tensor_bytes([tensor, torch.zeros(2)], beyond=[tensor]) == 8
    layer = nn.Linear(4, 3, bias=False)
    optimizer = SGD(layer.parameters(), momentum=0.9)
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert state_bytes(optimizer) == 48


def test_a_slice_keeps_no_bytes_and_kept_values_theirs() -> None:
    assert held_bytes(freeze_entries(nn.Linear(4, 3), "weight[:, 0] = 0")) == 0
    assert held_bytes(freeze_entries(nn.Linear(4, 3), "weight[:, 0] = keep")) == 12


def test_peak_is_what_a_step_has_at_once() -> None:
    def step() -> None:
        first = torch.zeros(1000)
        second = torch.zeros(1000)
        del first, second
        torch.zeros(500)

    assert peak_bytes(step, torch.device("cpu")) == pytest.approx(8000, abs=200)


def test_kernels_are_counted_by_the_calls_that_launch_them() -> None:
    calls = ["aten::add", "cudaLaunchKernel", "cudaMemcpyAsync", "cuLaunchKernelEx", "void add_kernel()", "cudaMemset"]
    assert launches(calls) == 2
    assert kernels_launched(lambda: torch.ones(3).add_(1), torch.device("cpu")) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here")
def test_kernels_of_a_step_on_cuda() -> None:
    numbers = torch.ones(3, device="cuda")
    assert kernels_launched(lambda: numbers.add_(1).mul_(2), numbers.device) == 2


def test_kernels_have_a_column_where_they_were_counted() -> None:
    case = Case("title", {"fast": Row("fast", kernels=1234), "slow": Row("slow")})
    assert [line.split() for line in table(case).splitlines()[1:]] == [["kernels"], ["fast", "1,234"], ["slow", "-"]]
    case.rows["fast"].kernels = None
    assert "kernels" not in table(case)


def _case(ours: float, other: float) -> Case:
    """Results in which these are the times relative to a plain step of one millisecond."""
    rows = {kind.name: Row(kind.name) for kind in (FreezeHooks, Prune)}
    for row, ratio in zip(rows.values(), (ours, other), strict=True):
        row.ratio, row.added = Spread.of([ratio]), Spread.of([ratio - 1])
    return Case("title", rows)


@pytest.mark.parametrize(("ours", "held"), [(1.25, True), (1.5, True), (1.625, False)])
def test_claim_not_above_an_alternative(ours: float, held: bool) -> None:
    case = _case(ours, other=1.5)
    case.claim_not_above(Prune)
    assert case.rows[FreezeHooks.name].claims == [Claim("not above torch prune", held)]


@pytest.mark.parametrize(("ours", "held"), [(1.25, True), (2.0, True), (2.25, False)])
def test_claim_about_what_is_added(ours: float, held: bool) -> None:
    case = _case(ours, other=1.5)
    case.claim_added(Prune, 2)
    assert case.rows[FreezeHooks.name].claims == [Claim("adds at most 2 x torch prune", held)]


def test_claims_are_printed_with_their_row_and_counted() -> None:
    case = Case("title", {"fast": Row("fast"), "slow": Row("slow")}, ["one left out"])
    case.rows["fast"].claim("quick", held=True)
    case.rows["slow"].claim("quick", held=False)
    lines = table(case).splitlines()
    assert lines[0] == "title"
    assert lines[2].split() == ["fast", "quick:", "held"]
    assert lines[3].endswith("quick: NOT HELD")
    assert lines[4] == "  (one left out)"
    assert broken([case]) == [Claim("quick", held=False)]
