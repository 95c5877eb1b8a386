"""The Hypothesis profile of a test run: fast by default, `pytest --thorough` for 10,000 examples a property."""

from collections.abc import Generator

import pytest

from lm.base import progress
from theory.claim import not_run_without_library
from theory.testing import load_profile


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="10,000 examples a property, larger enumerations")


def pytest_configure(config: pytest.Config) -> None:
    progress.be_quiet(False)  # what commands say is under test
    load_profile("thorough" if config.getoption("--thorough") else "default")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, None, None]:
    """A test that needs torch is skipped where torch is not installed."""
    with not_run_without_library():
        yield
