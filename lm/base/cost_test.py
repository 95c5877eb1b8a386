"""What a stage took is its own: without the stages that it asks for, and without the memory of those before it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lm.base import cost
from lm.base.cost import Meter, together
from lm.base.store import Store

MEGABYTES = 2**20


class Clock:
    """Seconds that pass when they are told to, on the wall and, half as many, on the processor."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)
        monkeypatch.setattr(cost, "_cpu_seconds", lambda: self.now / 2)

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_what_a_meter_inside_measures_is_not_the_outer_ones(clock: Clock) -> None:
    with Meter() as outer:
        clock.passes(1.0)
        with Meter() as inner:
            clock.passes(10.0)
            with Meter() as innermost:
                clock.passes(100.0)
        clock.passes(2.0)
    clock.passes(1000.0)
    walls = [meter.found()["wall_seconds"] for meter in (outer, inner, innermost)]
    assert walls == [3.0, 10.0, 100.0]
    assert outer.found()["cpu_seconds"] == 1.5


def test_a_meter_goes_on_after_one_inside_that_failed(clock: Clock) -> None:
    with Meter() as outer:
        with contextlib.suppress(KeyError), Meter():
            clock.passes(1.0)
            raise KeyError
        clock.passes(4.0)
    assert outer.found()["wall_seconds"] == 4.0


PEAKS = """
import numpy as np
from lm.base.cost import Meter

with Meter() as large:
    block = np.ones(200_000_000, dtype=np.uint8)
    del block
with Meter() as small:
    pass
with Meter() as outer:
    block = np.ones(100_000_000, dtype=np.uint8)
    del block
    with Meter() as inner:
        pass
print(*(meter.found()["peak_bytes"] for meter in (large, small, outer, inner)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a peak is the process's so far")
def test_the_peak_is_of_what_was_measured() -> None:
    """In a process of its own, where nothing else comes and goes."""
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True)
    large, small, outer, inner = map(int, done.stdout.split())
    assert 150 * MEGABYTES < large - small < 250 * MEGABYTES
    assert 70 * MEGABYTES < outer - inner < 150 * MEGABYTES


def test_ranks_together_take_the_sum_of_cpu_and_the_most_memory_of_one() -> None:
    one = {"wall_seconds": 2.0, "cpu_seconds": 3.0, "peak_bytes": 5, "cuda_peak_bytes": 7}
    other = {"wall_seconds": 2.5, "cpu_seconds": 1.0, "peak_bytes": None, "cuda_peak_bytes": 9}
    assert together([one, other]) == {
        "wall_seconds": 2.5,
        "cpu_seconds": 4.0,
        "peak_bytes": 5,
        "cuda_peak_bytes": 9,
    }


def test_what_was_made_with_others_is_an_equal_part_of_the_seconds_and_all_of_the_memory() -> None:
    found = {"wall_seconds": 6.0, "cpu_seconds": 9.0, "peak_bytes": 5}
    part = cost.share(found, 3)
    assert part == {"wall_seconds": 2.0, "cpu_seconds": 3.0, "peak_bytes": 5}
    own = {"wall_seconds": 1.0, "cpu_seconds": 0.5, "peak_bytes": 7, "resumed": False}
    assert cost.added(own, part) == {"wall_seconds": 3.0, "cpu_seconds": 3.5, "peak_bytes": 7, "resumed": False}
    assert cost.added({**own, "peak_bytes": None}, part)["peak_bytes"] == 5
    assert cost.added(own, None) == own


def test_an_artifact_says_what_it_took_and_a_store_of_all_that_were_asked_for(clock: Clock, tmp_path: Path) -> None:
    def lower(store: Store) -> Any:
        def make(folder: Path, scratch: Path) -> dict[str, Any]:
            clock.passes(5.0)
            return {}

        return store.get("sft", "policy", {}, make)

    def upper(store: Store, fails: bool = False) -> Any:
        def make(folder: Path, scratch: Path) -> dict[str, Any]:
            clock.passes(1.0)
            lower(store)
            (scratch / "checkpoint").touch()
            if fails:
                raise KeyboardInterrupt
            return {}

        return store.get("policy", "dpo", {}, make)

    store = Store(tmp_path, seed=0)
    with pytest.raises(KeyboardInterrupt):
        upper(store, fails=True)
    made = upper(store)
    record = json.loads((made.path / "artifact.json").read_text())
    assert record["cost"]["wall_seconds"] == 1.0, "of the process that finished it, and without sft"
    assert record["cost"]["resumed"]
    told = {one["stage"]: one for one in store.costs()}
    assert told["sft"]["wall_seconds"] == 5.0
    assert not told["sft"]["resumed"]
    assert told["sft"]["peak_bytes"] > 2**20
    again = Store(tmp_path, seed=0)
    upper(again), lower(again)
    assert again.costs() == store.costs()


def test_an_artifact_of_an_earlier_version_has_no_cost(tmp_path: Path) -> None:
    store = Store(tmp_path, seed=0)
    made = store.get("sft", "policy", {}, lambda *_: {})
    record = json.loads((made.path / "artifact.json").read_text())
    del record["cost"]
    (made.path / "artifact.json").write_text(json.dumps(record))
    later = Store(tmp_path, seed=0)
    later.get("sft", "policy", {}, lambda *_: {})
    date = record["provenance"]["date"]
    assert later.costs() == [{"stage": "sft", "name": "policy", "artifact": made.key, "finished": date}]
