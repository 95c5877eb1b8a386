"""The scale curve: a made file is drawn, and what is no such file is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from figures import scale
from figures.style import style


def document(**changes: Any) -> dict[str, Any]:
    rows = [
        {"stage": stage, "pairs": pairs, "cpu_seconds": pairs / 1000, "anonymous_mb": 400.0}
        for stage in ("prepare", "trl")
        for pairs in (1000, 10_000)
    ]
    return {"rows": rows, "provenance": {"commit": "abc"}, **changes}


def read(folder: Path, values: Any) -> scale.Scale:
    path = folder / scale.RESULTS
    path.write_text(json.dumps(values))
    return scale.READ(path)


def test_a_line_a_stage_in_each_panel(tmp_path: Path) -> None:
    results = read(tmp_path, document())
    assert results.sizes == [1000, 10_000]
    with style():
        figure = scale.draw(results)
    seconds, memory = figure.axes
    drawn = {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in seconds.lines[:-1]}
    assert drawn == {"prepare": [1.0, 10.0], "TRL's preparation": [1.0, 10.0]}
    assert np.asarray(seconds.lines[-1].get_ydata()).tolist() == [1.0, 10.0], "what linear is"
    assert [len(axis.lines) for axis in (seconds, memory)] == [3, 2]
    assert "1,000, 10,000 pairs" in scale.caption(results)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (document(rows=[]), "has no rows"),
        (document(rows=[{"stage": "fly", "pairs": 1, "cpu_seconds": 1.0, "anonymous_mb": 1.0}]), "has a stage 'fly'"),
        ({"provenance": {}}, "lacks rows"),
    ],
)
def test_what_is_no_such_file_is_named(values: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"scale.json {message}.*lm.bench --scale"):
        read(tmp_path, values)
