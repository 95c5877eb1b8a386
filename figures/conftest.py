"""Tests draw coarsely: what is asserted does not depend on the resolution."""

import pytest

from figures import style


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(style._RC, "savefig.dpi", 30)
