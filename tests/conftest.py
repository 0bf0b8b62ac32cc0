from __future__ import annotations

import importlib.util
from collections.abc import Generator, Iterable, Iterator
from typing import Final

import pytest
import torch

from .devices import FROM_OUTSIDE, VARIABLE, default, device_of, prepare, repeatable, why_not
from .ranks import Launches


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", default=FROM_OUTSIDE, help=f"the device that the tests run on (default: {VARIABLE}, or else cpu)"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "on_cpu(why): runs on the CPU whatever device is named")
    config.addinivalue_line("filterwarnings", "ignore:.* does not have a deterministic implementation")
    missing = why_not(config.getoption("--device"))
    if missing:
        raise pytest.UsageError(missing)
    config.addinivalue_line("filterwarnings", "ignore:RNN module weights are not part of single contiguous chunk")
    prepare(config.getoption("--device"))


NEEDS: Final = {"freezehooks._handle.FrozenEntries.plot": "matplotlib"}
"""Docstring examples that need an optional package although their module does not."""


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    for item in items:
        package = NEEDS.get(item.name) if isinstance(item, pytest.DoctestItem) else None
        if package is not None and importlib.util.find_spec(package) is None:
            item.add_marker(pytest.mark.skip(reason=f"the example needs {package}"))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Import a module of tests on the device that they run on."""
    with default(device_of(collector, collector.config.getoption("--device"))):
        return (yield)


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device that the test runs on, which is torch's default meanwhile."""
    chosen = device_of(request.node, request.config.getoption("--device"))
    with default(chosen), repeatable(chosen):
        yield chosen


@pytest.fixture(scope="session")
def launches(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Launches:
    """The processes that run the tests marked `on_ranks`."""
    return Launches(request.session.items, tmp_path_factory.mktemp("launches"))


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the models are tiny: more threads only wait for one another
