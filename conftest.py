"""The Hypothesis profile of a test run: fast by default, `pytest --thorough` for 10,000 examples a property."""

import pytest

from theory.testing import load_profile


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="10,000 examples a property, larger enumerations")


def pytest_configure(config: pytest.Config) -> None:
    load_profile("thorough" if config.getoption("--thorough") else "default")
