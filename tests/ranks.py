"""Run bodies of tests on several ranks: one set of processes for all of them, a result for each.

A test marked `on_ranks(2)` runs in two processes that form a process group. Starting processes takes seconds, so those
for one number of ranks are started once and run all selected tests of that kind, one after another. If a rank fails,
all processes end, since the others would wait for it, and new ones run the remaining tests.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import pytest
import torch
import torch.distributed as dist

ROOT: Final = Path(__file__).parents[1]
ALONE: Final = "alone"  # the case of a test that has no cases
LAUNCH_SECONDS: Final = 480  # how long all jobs for one number of ranks may take
COLLECTIVE_SECONDS: Final = 30  # how long a collective waits for a missing rank
GRACE_SECONDS: Final = 8  # how long ranks may run after the first has ended

_Body = Callable[..., None]
_Alone = Callable[[Path], None]


@dataclass(frozen=True)
class OnRanks:
    """A test to run on some number of ranks; `cases` are keyword arguments by the case's name."""

    count: int
    body: _Body
    cases: Mapping[str, Mapping[str, Any]]
    before: _Alone | None


def on_ranks(
    count: int,
    cases: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    before: _Alone | None = None,
    after: _Alone | None = None,
) -> Callable[[_Body], _Body]:
    """Make a test of a body that runs on `count` ranks, once for each case.

    `before` and `after` run in the one process that pytest runs in, with the folder that all share.
    """

    def make(body: _Body) -> _Body:
        if cases is None:

            def test(launches: Launches) -> None:
                launches.check(body, count)
                if after is not None:
                    after(launches.folder)

        else:

            @pytest.mark.parametrize("case", list(cases))
            def test(launches: Launches, case: str) -> None:  # type: ignore[misc]  # the same test, by case
                launches.check(body, count, case)

        test.__name__, test.__module__, test.__doc__ = body.__name__, body.__module__, body.__doc__
        test.on_ranks = OnRanks(count, body, cases or {ALONE: {}}, before)  # type: ignore[attr-defined]
        needs = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
        return needs(pytest.mark.xdist_group("ranks")(test))  # one worker starts the processes of all of them

    return make


@dataclass(frozen=True)
class Job:
    """One test, in one case."""

    module: str
    test: str
    case: str

    def run(self) -> None:
        marked: OnRanks = getattr(importlib.import_module(self.module), self.test).on_ranks
        marked.body(**marked.cases[self.case])


class Launches:
    """The processes of a test session, by number of ranks, each started when its first test asks."""

    def __init__(self, selected: Iterable[pytest.Item], folder: Path) -> None:
        self.folder = folder
        self._jobs: dict[int, list[Job]] = {}
        self._before: dict[int, list[_Alone]] = {}
        self._results: dict[int, dict[Job, list[str]]] = {}
        for item in selected:
            marked = getattr(getattr(item, "function", None), "on_ranks", None)
            if marked is not None and not any(mark.args[0] for mark in item.iter_markers("skipif")):
                case = item.callspec.params["case"] if hasattr(item, "callspec") else ALONE
                self._jobs.setdefault(marked.count, []).append(Job(marked.body.__module__, marked.body.__name__, case))
                if marked.before is not None:
                    self._before.setdefault(marked.count, []).append(marked.before)

    def check(self, body: _Body, count: int, case: str = ALONE) -> None:
        """Fail if a rank failed, or did not finish."""
        if count not in self._results:
            for prepare in self._before.get(count, []):
                prepare(self.folder)
            self._results[count] = launch(self._jobs[count], count, self.folder)
        errors = self._results[count][Job(body.__module__, body.__name__, case)]
        if errors:
            pytest.fail("\n".join(errors), pytrace=False)


def launch(jobs: list[Job], count: int, folder: Path, seconds: float = LAUNCH_SECONDS) -> dict[Job, list[str]]:
    """Run jobs on `count` ranks and return, for each, what went wrong on which rank."""
    deadline = time.monotonic() + seconds
    results: dict[Job, list[str]] = {}
    while len(results) < len(jobs):
        results.update(_launch_once(jobs[len(results) :], count, folder / f"{count} ranks, {len(results)}", deadline))
    return results


def _launch_once(jobs: list[Job], count: int, folder: Path, deadline: float) -> dict[Job, list[str]]:
    """Run jobs until one fails, and return the results so far, including that one."""
    folder.mkdir()
    (folder / "jobs.json").write_text(json.dumps([[job.module, job.test, job.case] for job in jobs]))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [_start(rank, count, port, folder) for rank in range(count)]
    try:
        _wait(processes, deadline)
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    by_rank = [_results(folder / f"{rank}.results") for rank in range(count)]
    found = {}
    for n, job in enumerate(jobs):
        found[job] = _errors([results[n] if n < len(results) else None for results in by_rank], folder)
        if found[job]:
            break
    return found


def _wait(processes: list[subprocess.Popen[bytes]], deadline: float) -> None:
    """Wait until all have ended; once one has, the others get a little time to notice."""
    while time.monotonic() < deadline and None in (ended := [process.poll() for process in processes]):
        if ended.count(None) < len(ended):
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        time.sleep(0.05)


def _start(rank: int, count: int, port: int, folder: Path) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",  # gloo's ranks compute on the CPU; torch would choose a GPU, of which there is one
        "FREEZEHOOKS_RANKS_FOLDER": str(folder),
    }
    with open(folder / f"{rank}.output", "wb") as output:
        return subprocess.Popen(
            [sys.executable, "-c", "from tests.ranks import work; work()"],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that any process it starts ends with it
        )


def _results(file: Path) -> list[str]:
    """Return what a rank wrote about each job that it finished, which is empty for success."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _errors(by_rank: list[str | None], folder: Path) -> list[str]:
    errors = []
    for rank, error in enumerate(by_rank):
        if error is None:
            output = (folder / f"{rank}.output").read_text(errors="replace")
            errors.append(f"rank {rank} did not finish; its output ends:\n{output[-3000:]}")
        elif error:
            errors.append(f"rank {rank}: {error}")
    return errors


# In the processes


def folder() -> Path:
    """Return the folder that all ranks and tests of a session share."""
    return Path(os.environ["FREEZEHOOKS_RANKS_FOLDER"]).parent


def work() -> None:
    """Run the jobs as one rank, and write a line for each; a rank that fails ends."""
    torch.set_num_threads(1)
    ours = Path(os.environ["FREEZEHOOKS_RANKS_FOLDER"])
    jobs = [Job(*names) for names in json.loads((ours / "jobs.json").read_text())]
    dist.init_process_group("gloo", timeout=timedelta(seconds=COLLECTIVE_SECONDS))
    with open(ours / f"{dist.get_rank()}.results", "w") as results:
        for job in jobs:
            torch.manual_seed(0)
            error = _run(job)
            results.write(json.dumps(error) + "\n")
            results.flush()
            if error:
                break
    # Skip the interpreter's shutdown, which gloo's threads sometimes abort after all results are written.
    os._exit(bool(error))


def _run(job: Job) -> str:
    """Run a job and return its error. All ranks wait for each other, so that only one job runs at a time."""
    faulthandler.dump_traceback_later(COLLECTIVE_SECONDS * 1.5)
    try:
        job.run()
        dist.barrier()
    except BaseException:
        return traceback.format_exc()
    finally:
        faulthandler.cancel_dump_traceback_later()
    return ""
