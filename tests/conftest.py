"""Settings shared by all tests: random cases, slow tests, seeds, threads."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from tests import known

# Two tests run at a time, on two cores: neither they nor the processes that they start are to have more threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# `default` draws the same cases every time, so that the gate never depends on luck; `thorough` looks further.
hypothesis.settings.register_profile("default", derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile("thorough", max_examples=1000, deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


def pytest_configure(config: pytest.Config) -> None:
    # The tensors of the tests are small: a second thread costs more than it brings.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Last, since a process that has compiled may count one tensor more at the peak of an eager step afterwards.
    items.sort(key=lambda item: "test_compile.py" in item.nodeid)
    for item in items:
        if (why := known.reason(item.name)) is not None:
            item.add_marker(pytest.mark.xfail(reason=why, strict=True))
    if config.getoption("--slow"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow, or `make test-all`"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_accelerator() -> Iterator[None]:
    """The process's one `Accelerator` takes the options of the first."""
    yield
    if (state := sys.modules.get("accelerate.state")) is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
