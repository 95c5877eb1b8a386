"""The machines of a run by several: each hears whether the others are there, and ends when one falls silent.

A connection over a link that is cut stays open, and how long ranks wait for each other tells nothing: one may work for
hours while the others wait. So the first rank of each machine counts aloud in the launcher's store, and every rank
hears whether the others do. The store is on one of the machines: where it does not answer, that is the one to name.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

from theory.shell import FAILED

TIMEOUT = 300.0
"""Seconds for which a machine may be silent."""
BEAT = 1.0
"""Seconds between two signs of life."""
LATER = 5.0
"""Seconds by which ranks that say nothing end after the one that speaks for their machine."""
LAUNCHER_ENDS = 10
"""Seconds that the launcher is left to end by itself."""


def several() -> bool:
    """Whether the launcher started processes on other machines too."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    return int(os.environ.get("LOCAL_WORLD_SIZE", launched)) < launched


@contextlib.contextmanager
def heard(own: int, gathered: Callable[[Any], Sequence[Any]], limit: float) -> Iterator[None]:
    """Ends this process, with a message and FAILED, once another machine has been silent for so many seconds.

    Within an error it goes on until the process ends, as what is said of the error goes by the same store.

    Args:
        own: this rank.
        gathered: every rank's value, in their order. All ranks enter together.
        limit: seconds.
    """
    if not several():
        yield
        return
    from torch.distributed.rendezvous import rendezvous

    here = (os.environ.get("GROUP_RANK", ""), socket.gethostname())
    store = next(rendezvous("env://", timeout=timedelta(seconds=limit)))[0]
    store.set(_key(own), "0")
    machines = gathered(here)  # after which each has counted
    others = {machines.index(one): one[1] for one in machines if one != here}
    if not others:
        yield
        return
    speaks = machines.index(here) == own
    watch = _Watch(store, own, others, speaks, limit if speaks else limit + LATER)
    over = threading.Event()

    def every_beat(work: Callable[[], None]) -> None:
        while not over.wait(BEAT):
            work()

    # Two, as a call to a store that does not answer may not return.
    threads = [threading.Thread(target=every_beat, args=(work,), daemon=True) for work in (watch.count, watch.miss)]
    for thread in threads:
        thread.start()
    yield
    over.set()
    for thread in threads:
        thread.join(limit)


def _key(rank: int) -> str:
    return f"alive/{rank}"


class _Watch:
    """What is heard of the other machines.

    Args:
        store: the launcher's.
        own: this rank.
        others: name of every other machine, by its first rank.
        speaks: whether this rank is the first of its machine.
        limit: seconds of silence.
    """

    def __init__(self, store: Any, own: int, others: Mapping[int, str], speaks: bool, limit: float) -> None:
        self.store, self.own, self.others, self.speaks, self.limit = store, own, others, speaks, limit
        self.turn = 0
        self.counts = dict[int, bytes]()
        self.missed = dict.fromkeys(others, 0)
        """Beats since each was heard of last. Not by the clock: a process that was stopped, and goes on, has heard
        nobody either."""
        self.unanswered = 0
        """Beats since the store answered last."""

    def count(self) -> None:
        """Counts aloud, and hears the others' counts."""
        self.turn += 1
        with contextlib.suppress(RuntimeError):  # the store does not answer; it may again
            if self.speaks:
                self.store.set(_key(self.own), str(self.turn))
            found = self.store.multi_get([_key(rank) for rank in self.others])
            self.unanswered = 0
            for rank, count in zip(self.others, found, strict=True):
                if self.counts.get(rank) != count:
                    self.counts[rank], self.missed[rank] = count, 0

    def miss(self) -> None:
        """A beat has passed. Ends the process where too many have in which nothing was heard."""
        self.unanswered += 1
        for rank in self.others:
            self.missed[rank] += 1
        if self.unanswered * BEAT >= self.limit:
            self.end(os.environ["MASTER_ADDR"])
        elif silent := [name for rank, name in self.others.items() if self.missed[rank] * BEAT >= self.limit]:
            self.end(", ".join(silent))

    def end(self, silent: str) -> None:
        """Says who is silent, and ends the process, whose main thread waits where no exception would reach it."""
        if self.speaks:
            text = (
                f"error: nothing has been heard of host {silent} for {self.limit:g} seconds (host_timeout): it or the "
                f"network to it is down. {socket.gethostname()} ends; the same command goes on from what is finished."
            )
            print(text, file=sys.__stderr__, flush=True)
            if self.unanswered * BEAT >= self.limit and "TORCHELASTIC_RUN_ID" in os.environ:
                # The launcher waits for the same store, and has no end of that until the kernel gives the connection
                # up, after a quarter of an hour.
                subprocess.Popen(
                    ["sh", "-c", f"sleep {LAUNCHER_ENDS}; kill -KILL {os.getppid()}"],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
        os._exit(FAILED)
