"""Kills `lm.train` -9 at random moments of every stage, runs it again each time, and compares what it leaves behind
with an uninterrupted run's, byte for byte.

    python tests/kill.py --kills 20 [--signal TERM] [--seed 0] [--config tests/kill.yaml] [--out FOLDER]

Ends in a table of kills by stage and in the differences; the exit status is 1 where there are any. The moments are
drawn by the seed: so many in every artifact's making, each uniform in the time that the uninterrupted run took for it,
half of them counted from its first checkpoint where it has any.
Every run is a process group of its own, forked from a server that has done the imports, which take ten seconds and of
which a kill shows nothing; what runs in it is `python -m lm.train`. After each kill every finished artifact must pass
its checksums. SIGTERM in place of SIGKILL lets a run end by itself, with the status of a run that was terminated.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import runpy
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

PROVENANCE = ("date", "commit")
"""When a run was, and of which commit: the checkout may move on meanwhile."""
COST = ("cost", "stages")
"""Of artifact.json and of results.json: time and memory."""
HISTORY = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
"""What a log tells of time."""
FINGERPRINT = "_fingerprint"
"""Of `datasets`, in the state.json of a saved set: drawn at random."""
MADE = re.compile(r"^\[(\w+)\] (.+)$", re.MULTILINE)
"""What a run says on stderr when it starts to make an artifact."""


# ---------------------------------------------------------------- what two runs left behind


def files_of(run: Path) -> dict[str, Path]:
    """A run's files by their names in it, without the hidden ones: locks, and what a kill left of a write."""
    found = {path.relative_to(run): path for path in sorted(run.rglob("*")) if path.is_file()}
    return {str(name): path for name, path in found.items() if not any(part.startswith(".") for part in name.parts)}


def content(path: Path) -> Any:
    """What must be the same in two runs: the bytes, without what tells the time of day or is drawn at random."""
    if path.name == "report.html":
        told = json.loads((path.parent / "results.json").read_text())["provenance"]
        return path.read_text().replace(told["date"], "").replace(told["commit"] or "", "").encode()
    if path.name not in ("artifact.json", "results.json", "state.json"):
        return path.read_bytes()
    value = json.loads(path.read_text())
    value.pop(FINGERPRINT, None)
    for name in COST if path.name != "state.json" else ():
        value.pop(name, None)
    for name in PROVENANCE if "provenance" in value else ():
        del value["provenance"][name]
    for name in [name for name in value.get("files", {}) if Path(name).name == "state.json"]:
        del value["files"][name]  # its checksum; the file is compared itself
    for entry in value.get("metrics", {}).get("history", []):
        for name in HISTORY:
            entry.pop(name, None)
    return value


def differences(one: Path, other: Path) -> list[str]:
    """Names of the files that two runs do not share, or that differ in more than PROVENANCE, HISTORY and FINGERPRINT,
    with the place; and of work that was left over."""
    ours, theirs = files_of(one), files_of(other)
    found = [f"{name}: only in {one if name in ours else other}" for name in sorted(ours.keys() ^ theirs.keys())]
    for name in sorted(ours.keys() & theirs.keys()):
        mine, its = content(ours[name]), content(theirs[name])
        if mine != its:
            found.append(f"{name}: {', '.join(_places(mine, its)) or 'bytes'}")
    return found + [f"{path}: left over" for run in (one, other) for path in run.glob(".work/*")]


def _places(one: Any, other: Any, at: str = "") -> Iterator[str]:
    """Where two JSON values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys()):
            yield from _places(one.get(key), other.get(key), f"{at}.{key}" if at else key)
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, pair in enumerate(zip(one, other, strict=True)):
            yield from _places(*pair, f"{at}[{index}]")
    elif isinstance(one, bytes):
        return
    elif one != other:
        yield f"{at} {str(one)[:40]} | {str(other)[:40]}"


# ---------------------------------------------------------------- runs and kills


def train(folder: Path, arguments: Sequence[str]) -> None:
    """`python -m lm.train` in a folder and process group of its own; stderr goes to `log` in it."""
    os.setsid()
    os.chdir(folder)
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.argv = ["lm.train", *arguments]
    runpy.run_module("lm.train", run_name="__main__")


@dataclass
class Runner:
    """Starts runs of one config."""

    config: Path

    def __post_init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["lm.reporting.results", "lm.reporting.page", "figures.methods"])

    def start(self, folder: Path) -> Any:
        """A run with its output in `folder/run`; the name is the same in each, as the results hold it."""
        folder.mkdir(parents=True, exist_ok=True)
        arguments = ["--config", str(self.config.resolve()), "--output_dir", "run"]
        process = self.context.Process(target=train, args=(folder, arguments))
        process.start()
        return process


def made(log: Path, start: int = 0) -> list[str]:
    """The artifacts that a log says were begun, from a position on."""
    text = log.read_text(errors="replace")[start:] if log.exists() else ""
    return [f"{stage} {name}" for stage, name in MADE.findall(text)]


def checkpointed(folder: Path, name: str) -> bool:
    """Whether the artifact that is being made has a whole checkpoint."""
    return any(folder.glob(f"run/.work/{name.replace(' ', '-', 1)}-*/scratch/checkpoint-*/checksums.json"))


def uninterrupted(runner: Runner, folder: Path) -> dict[str, float]:
    """Runs to the end; the seconds that each artifact took, in their order (the last one's until the end)."""
    process, began = runner.start(folder), dict[str, float]()
    while process.is_alive():
        for name in made(folder / "log"):
            began.setdefault(name, time.monotonic())
        process.join(0.005)
    if process.exitcode != 0:
        raise SystemExit(f"the uninterrupted run ended with status {process.exitcode}: {folder / 'log'}")
    ends = [*list(began.values())[1:], time.monotonic()]
    return {name: end - start for (name, start), end in zip(began.items(), ends, strict=True)}


@dataclass
class Killed:
    """What was done to one run."""

    kills: Counter[str] = field(default_factory=Counter)
    """By stage."""
    resumable: Counter[str] = field(default_factory=Counter)
    """Those of them that left a whole checkpoint."""


def killed(
    runner: Runner, folder: Path, seconds: dict[str, float], count: int, rng: random.Random, by: signal.Signals
) -> Killed:
    """Runs to the end, with so many kills on the way. Raises CorruptArtifact where one left an artifact half-made."""
    from lm.base.store import verify

    order, done = list(seconds), Killed()
    aims = (
        sorted(i * len(order) // count for i in range(count))
        if count > len(order)
        else sorted(rng.sample(range(len(order)), count))
    )
    log = folder / "log"
    for aim in aims:
        delay = rng.uniform(0, seconds[order[aim]])
        start = len(log.read_text(errors="replace")) if log.exists() else 0
        process = runner.start(folder)
        while process.is_alive() and not any(order.index(name) >= aim for name in made(log, start)):
            process.join(0.001)
        if rng.random() < 0.5:  # in the middle of training, where it is trained
            while process.is_alive() and made(log, start)[-1:] == [order[aim]] and not checkpointed(folder, order[aim]):
                process.join(0.001)
        process.join(delay)
        if not process.is_alive():
            break
        os.killpg(process.pid, by)
        process.join()
        if process.exitcode == 0:
            break
        if process.exitcode not in (-by, 128 + by):
            raise SystemExit(f"a run ended with status {process.exitcode} by {by.name}: {log}")
        name = (made(log, start) or ["start-up"])[-1]
        stage = name.split()[0]
        done.kills[stage] += 1
        done.resumable[stage] += checkpointed(folder, name)
        for record in folder.glob("run/[!.]*/*"):
            if record.is_dir():
                verify(record)
    process = runner.start(folder)
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"the last run ended with status {process.exitcode}: {log}")
    return done


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--signal", choices=["KILL", "TERM"], default="KILL")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", type=Path, default=Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--out", type=Path, help="where the two runs go; a temporary folder by default")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary)
        runner, by = Runner(options.config), signal.Signals[f"SIG{options.signal}"]
        seconds = uninterrupted(runner, out / "whole")
        done = killed(runner, out / "killed", seconds, options.kills, random.Random(options.seed), by)
        found = differences(out / "whole" / "run", out / "killed" / "run")
        compared = len(files_of(out / "whole" / "run"))
    table = Table(title=f"{done.kills.total()} times {by.name}, seed {options.seed}")
    for heading in ("stage", "artifacts", "seconds uninterrupted", "kills", "of them with a checkpoint left"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    stages = Counter(name.split()[0] for name in seconds)
    for stage, artifacts in stages.items():
        took = sum(value for name, value in seconds.items() if name.split()[0] == stage)
        table.add_row(stage, str(artifacts), f"{took:.1f}", str(done.kills[stage]), str(done.resumable[stage]))
    console = Console(width=100)
    console.print(table)
    console.print(f"{compared} files compared, {len(found)} differ", *found, sep="\n", markup=False)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
