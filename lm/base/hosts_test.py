"""A machine that falls silent is named, and whoever is heard of late is not."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lm.base import effects, hosts
from lm.base.options import parse
from theory.shell import FAILED

LIMIT = 5.0


class Store(dict[str, bytes]):
    """Answers at once, until it is `gone`."""

    gone = False

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def multi_get(self, keys: list[str]) -> list[bytes]:
        if self.gone:
            raise RuntimeError("Connection reset by peer")
        return [self[key] for key in keys]


class Ended(BaseException):
    """In place of the end of the process."""


def beats(count: int, *there: hosts._Watch) -> None:
    """So many, on these machines."""
    for _ in range(count):
        for watch in there:
            watch.count()
        for watch in there:
            watch.miss()


@pytest.fixture
def watches(monkeypatch: pytest.MonkeyPatch) -> tuple[Store, list[hosts._Watch]]:
    """Of the first ranks of three machines, each of two ranks, of which the first has the store."""

    def end(status: int) -> None:
        raise Ended(status)

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setenv("MASTER_ADDR", "one.cluster")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    store, names = Store(), {0: "one", 2: "two", 4: "three"}
    for rank in names:
        store.set(f"alive/{rank}", "0")
    made = [
        hosts._Watch(store, own, {rank: name for rank, name in names.items() if rank != own}, True, LIMIT)
        for own in names
    ]
    for watch in made:
        watch.count()
    return store, made


def test_a_machine_that_falls_silent_is_named_and_no_other(
    watches: tuple[Store, list[hosts._Watch]], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "__stderr__", sys.stderr)
    one, two, three = watches[1]
    beats(50, one, two, three)  # far beyond the limit, with all there
    beats(3, one, three)
    two.count()  # late
    beats(4, one, three)
    assert not capfd.readouterr().err
    with pytest.raises(Ended, match=str(FAILED)):
        beats(1, one, three)
    said = capfd.readouterr().err
    assert said.startswith("error: nothing has been heard of host two for 5 seconds (host_timeout): it or the network ")
    assert said.count("\n") == 1
    assert "three" not in said


def test_a_store_that_does_not_answer_is_named_by_its_machine(
    watches: tuple[Store, list[hosts._Watch]], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "__stderr__", sys.stderr)
    store, all_three = watches
    store.gone = True
    beats(4, *all_three)
    store.gone = False  # it comes back in time
    beats(1, *all_three)
    store.gone = True
    beats(3, *all_three)
    assert not capfd.readouterr().err
    with pytest.raises(Ended):
        beats(1, all_three[1])
    said = capfd.readouterr().err
    assert "nothing has been heard of host one.cluster for 5 seconds" in said


def test_other_ranks_of_a_machine_end_too_and_say_nothing(
    watches: tuple[Store, list[hosts._Watch]], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "__stderr__", sys.stderr)
    quiet = hosts._Watch(watches[0], 3, {0: "one"}, False, LIMIT)
    quiet.count()
    assert "alive/3" not in watches[0]
    for _ in range(4):
        quiet.miss()
    with pytest.raises(Ended):
        quiet.miss()
    assert not capfd.readouterr().err


def test_the_time_out_is_an_option_of_a_run_on_several_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="host_timeout must be at least 5, and finite, got 4"):
        parse("lm.train", "", ["--host_timeout", "4"])
    for launched, here, several in (("1", "1", False), ("4", "4", False), ("4", "2", True)):
        monkeypatch.setenv("WORLD_SIZE", launched)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
        assert hosts.several() == several
        config, _ = parse("lm.train", "", [])
        assert ("host_timeout" in dict(effects.idle(config, "lm.train"))) != several


RANK = """
import os, socket, sys, time
from lm.base import hosts, ranks
rank = int(os.environ["RANK"])
socket.gethostname = lambda: ["one", "two"][rank]
hosts.BEAT = 0.2
with ranks.together("cpu", float(sys.argv[1])):
    print("connected", file=sys.__stdout__, flush=True)
    ranks.from_first(lambda: time.sleep(float(sys.argv[2])))
"""


def start(limit: float, work: float) -> list[subprocess.Popen[str]]:
    """Two ranks, of two machines by name; the first works by itself, while the other waits."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    common |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
    common["PYTHONPATH"] = str(Path(hosts.__file__).parents[2])
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", RANK, str(limit), str(work)]
    started = [subprocess.Popen(command, env={**common, "RANK": rank}, **options) for rank in "01"]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "connected\n", process.communicate(timeout=60)[1]
    return started


@pytest.mark.thorough
def test_a_rank_waits_for_one_that_works_and_not_for_one_that_is_silent() -> None:
    """Whoever has the store, the other ends by itself."""
    for process in start(limit=6, work=9):
        _, said = process.communicate(timeout=120)
        assert (process.returncode, "silent" in said or "heard of" in said) == (0, False), said
    for silent, named in ((1, "two"), (0, "127.0.0.1")):
        processes = start(limit=6, work=600)
        processes[silent].send_signal(signal.SIGSTOP)
        try:
            _, said = processes[1 - silent].communicate(timeout=120)
            assert processes[1 - silent].returncode == FAILED
            assert f"nothing has been heard of host {named} for 6 seconds" in said
            time.sleep(0.1)
            assert processes[silent].poll() is None, "it is only stopped"
        finally:
            for process in processes:
                process.kill()
                process.communicate()
