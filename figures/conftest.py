"""Tests draw coarsely: what is asserted depends neither on the resolution nor on where things stand."""

import pytest

from figures import style


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = style._settings
    fast = {"savefig.dpi": 30, "figure.constrained_layout.use": False}
    monkeypatch.setattr(style, "_settings", lambda this: whole(this) | fast)
