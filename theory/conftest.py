"""What holds for the tests of this folder alone."""

from collections.abc import Iterator

import pytest

from theory.testing import seldom_collected


@pytest.fixture(scope="package", autouse=True)
def _seldom_collected() -> Iterator[None]:
    with seldom_collected():
        yield
