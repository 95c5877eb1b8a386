"""Tests draw coarsely: what is asserted depends neither on the resolution nor on where things stand."""

import pytest

from figures import style


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(style._RC, "savefig.dpi", 30)
    monkeypatch.setitem(style._RC, "figure.constrained_layout.use", False)
