from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Final

import pytest
import torch

from .ranks import Launches


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="the device that the promises are tested on (default: cpu)")


NEEDS: Final = {"freezehooks._handle.FrozenEntries.plot": "matplotlib"}
"""Docstring examples that need an optional package although their module does not."""


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    for item in items:
        package = NEEDS.get(item.name) if isinstance(item, pytest.DoctestItem) else None
        if package is not None and importlib.util.find_spec(package) is None:
            item.add_marker(pytest.mark.skip(reason=f"the example needs {package}"))


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def launches(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Launches:
    """The processes that run the tests marked `on_ranks`."""
    return Launches(request.session.items, tmp_path_factory.mktemp("launches"))


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the models are tiny: more threads only wait for one another
