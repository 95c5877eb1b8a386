"""torchrun over two hosts: network namespaces of this machine, with names and addresses, and a virtual cable between.

    python -m tests.two_hosts [--out FOLDER] [--host-timeout 20]

A policy is trained in float64 by one process and over both hosts. Then the cable is cut in mid-training: both ends must
stop in time, each naming the other, and leave no artifact half-written. The same command must go on, also over a cut
that is shorter than the time-out, to the bits of the run that was not interrupted. Prints what was seen; the exit
status is 1 where something else was. Linux, root, iproute2 and util-linux are needed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from lm.base.hosts import LAUNCHER_ENDS
from lm.base.store import verify
from tests.kill import differences, files_of

ROOT = Path(__file__).parents[1]
HOSTS = {"first": "10.77.0.1", "second": "10.77.0.2"}
CABLE = "cable"
"""The name of its end, on either host."""
OPTIONS = """
model: scratch:tiny
device: cpu
dtype: float64
output_dir: run
data:
  kind: world
  prompt_template: "{post}\\n\\nTL;DR:"
  max_prompt_length: 120
  max_completion_length: 40
  valid_fraction: 0.1
  test_fraction: 0.15
  world: {posts: 100}
sft: {max_steps: 2, batch_size: 8, learning_rate: 1.0e-3}
oracle: {max_steps: 2, batch_size: 8, learning_rate: 1.0e-3}
reward: {max_steps: 2, batch_size: 8, learning_rate: 1.0e-3}
policy: {max_steps: 60, batch_size: 8, learning_rate: 1.0e-3, save_steps: 5, logging_steps: 5}
bias: {rho: 0.4, member_fractions: [0.4, 0.6]}
logprobs: {scoring_tokens: 1024}
methods: [e-dpo]
"""
PARITY = 1e-10
"""Largest difference of a parameter from one process's, relative to the largest; gradients are added in other order."""
BEFORE, BLINK = 10, 5.0
"""The step after which the cable is cut; seconds of the cut that is to be survived."""
ENDS = {"first": 1, "second": -signal.SIGKILL}
"""Status of a launcher whose rank ended; and of one that waits for its store on the other host, see `lm.base.hosts`."""
GRACE = LAUNCHER_ENDS + 5
"""Seconds after the time-out in which the launchers, too, have to end."""


def lacks() -> str | None:
    """What this machine has not that is needed here, in words; None where it has all."""
    if not sys.platform.startswith("linux"):
        return f"network namespaces need Linux, this is {sys.platform}"
    if absent := [name for name in ("ip", "unshare", "mount", "hostname") if shutil.which(name) is None]:
        return f"{absent[0]} is not installed (iproute2, util-linux, hostname)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"probe-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"no network namespace can be made here: {tried.stderr.strip()}"
    ip("netns", "del", name)
    return None


def ip(*arguments: str) -> None:
    """iproute2's command."""
    subprocess.run(["ip", *arguments], check=True)


class Hosts:
    """The two, and the cable; gone, with all that runs on them, at the end of the context.

    Args:
        folder: for the table of names, which stands in for a name server.
    """

    def __init__(self, folder: Path) -> None:
        self.table = folder / "hosts"
        self.running: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Hosts:
        self.table.write_text("".join(f"{ip} {name}\n" for name, ip in (("localhost", "127.0.0.1"), *HOSTS.items())))
        one, other = (self.netns(name) for name in HOSTS)
        for name in (one, other):
            ip("netns", "add", name)
        ip("-n", one, "link", "add", CABLE, "type", "veth", "peer", "name", CABLE, "netns", other)
        for name, address in HOSTS.items():
            ip("-n", self.netns(name), "addr", "add", f"{address}/24", "dev", CABLE)
            ip("-n", self.netns(name), "link", "set", "lo", "up")
            ip("-n", self.netns(name), "link", "set", CABLE, "up")
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for name in HOSTS:
            ip("netns", "del", self.netns(name))

    def netns(self, host: str) -> str:
        """A name that no other has."""
        return f"{host}-{os.getpid()}"

    def cable(self, how: str) -> None:
        """Is "up", or "down"."""
        ip("-n", self.netns("second"), "link", "set", CABLE, how)

    def start(self, host: str, command: Sequence[str], folder: Path, said: Path) -> subprocess.Popen[bytes]:
        """A command on a host, in a folder; what it says goes to a file."""
        own = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
        names = ["unshare", "--uts", "--mount", "sh", "-c", own, host, str(self.table)]
        with said.open("w") as out:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.netns(host), *names, *command],
                cwd=folder,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self.running.append(process)
        return process


class Trial:
    """The runs, in a folder of their own each, below `out`."""

    def __init__(self, out: Path, hosts: Hosts, host_timeout: float) -> None:
        self.out, self.hosts, self.timeout = out, hosts, host_timeout
        (out / "options.yaml").write_text(OPTIONS)
        self.command = ["-m", "lm.policy", "--config", str(out / "options.yaml")]

    def alone(self) -> Path:
        """The run of one process, from its beginning; the others share all but its policy."""
        folder = self.out / "alone"
        folder.mkdir()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, *self.command], cwd=folder, env=environment, check=True)
        for name in ("whole", "cut"):
            shutil.copytree(folder / "run", self.out / name / "run", ignore=shutil.ignore_patterns("policy", ".lock"))
        return folder / "run"

    def start(self, name: str, turn: str = "") -> dict[str, subprocess.Popen[bytes]]:
        """The same command on both hosts, as docs/many-gpus.md has it."""
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "first:29500"]
        command = [*launcher, *self.command, "--host_timeout", f"{self.timeout:g}"]
        folder = self.out / name
        return {host: self.hosts.start(host, command, folder, self.said(name, host, turn)) for host in HOSTS}

    def said(self, name: str, host: str, turn: str = "") -> Path:
        """What a host said in a run."""
        return self.out / name / f"{host}{turn}.log"

    def until(self, name: str, step: int, running: dict[str, subprocess.Popen[bytes]]) -> None:
        """Waits for the checkpoint of a step, while the run goes on."""
        while not any(self.out.glob(f"{name}/run/.work/policy-*/scratch/checkpoint-{step}/checksums.json")):
            ended = [host for host, process in running.items() if process.poll() is not None]
            assert not ended, f"{ended[0]} ended before step {step}: {self.out / name}"
            time.sleep(0.01)

    def end(self, name: str, running: dict[str, subprocess.Popen[bytes]]) -> None:
        """Waits for the good end of a run."""
        statuses = {host: process.wait(3600) for host, process in running.items()}
        assert set(statuses.values()) == {0}, f"statuses {statuses}: {self.out / name}"


def policy(run: Path) -> Path:
    """The one artifact of the policy."""
    (folder,) = (run / "policy").iterdir()
    return folder


def parity(alone: Path, whole: Path) -> str:
    """Asserts that two hosts trained what one process did, and that they trained."""
    assert policy(whole).name == policy(alone).name, "another artifact"
    record = json.loads((policy(whole) / "artifact.json").read_text())
    assert record["provenance"]["ranks"] == 2
    (start,) = (load_file(path / "model.safetensors") for path in (alone / "sft").iterdir())
    one, two = (load_file(policy(run) / "model.safetensors") for run in (alone, whole))
    assert {value.dtype for value in two.values()} == {torch.float64}
    largest = max(float(value.abs().max()) for value in one.values())
    off, moved = (max(float((two[k] - own[k]).abs().max()) for k in own) / largest for own in (one, start))
    assert moved > 1e-3, f"training moved no parameter by more than {moved:.1e} of the largest"
    assert off <= PARITY, f"a parameter is off by {off:.1e} of the largest"
    return (
        f"two hosts and one process differ by {off:.1e} of the largest parameter, which training moved by {moved:.1e}"
    )


def cut(trial: Trial) -> Iterator[str]:
    """Cuts the cable in mid-training and asserts what both ends do about it."""
    running = trial.start("cut")
    trial.until("cut", BEFORE, running)
    trial.hosts.cable("down")
    began, ended = time.monotonic(), dict[str, float]()
    while len(ended) < len(running) and time.monotonic() - began < trial.timeout + 120:
        for host, process in running.items():
            if host not in ended and process.poll() is not None:
                ended[host] = time.monotonic() - began
        time.sleep(0.05)
    run = trial.out / "cut" / "run"
    for host, other in zip(HOSTS, reversed(HOSTS), strict=True):
        text = trial.said("cut", host).read_text()
        told = [line for line in text.splitlines() if line.startswith("error: ")]
        assert host in ended, f"{host} has not ended: {trial.said('cut', host)}"
        assert running[host].returncode == ENDS[host], f"{host} ended with {running[host].returncode}"
        assert [f"nothing has been heard of host {other} for" in line for line in told] == [True], (host, told)
        yield f"{host} ended {ended[host]:.1f} s after the cut, host_timeout {trial.timeout:g}: {told[0]}"
    late = {host: took for host, took in ended.items() if not trial.timeout - 2 <= took <= trial.timeout + GRACE}
    assert not late, f"too soon or too late, seconds: {late}"
    assert not list(run.glob("policy/*")), "the policy is not finished"
    whole = [verify(path) for path in run.glob("[!.]*/*") if path.is_dir()]
    left = sorted(path.parent.name for path in run.glob(".work/policy-*/scratch/checkpoint-*/checksums.json"))
    assert left, "there is nothing to go on from"
    yield f"{len(whole)} artifacts pass their checksums; the policy is none of them, and left {', '.join(left)}"


def resumed(trial: Trial) -> str:
    """Asserts that the command goes on, through a short cut, to the bits of the run that was not interrupted."""
    trial.hosts.cable("up")
    running = trial.start("cut", "-again")
    trial.until("cut", BEFORE + 20, running)
    trial.hosts.cable("down")
    time.sleep(BLINK)
    trial.hosts.cable("up")
    trial.end("cut", running)
    whole, again = (trial.out / name / "run" for name in ("whole", "cut"))
    assert json.loads((policy(again) / "artifact.json").read_text())["cost"]["resumed"], "it began anew"
    found = differences(whole, again)
    assert not found, "\n".join(found)
    return (
        f"the same command went on, over a cut of {BLINK:g} s, and all {len(files_of(again))} files are those of the "
        "run without a cut"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what was seen; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.two_hosts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="where the runs go, an empty folder; a temporary one by default")
    parser.add_argument("--host-timeout", type=float, default=20.0, help="seconds, at least three times 5")
    options = parser.parse_args(arguments)
    if options.host_timeout < 3 * BLINK:
        parser.error(f"--host-timeout must be at least {3 * BLINK:g}, got {options.host_timeout:g}")
    if (reason := lacks()) is not None:
        print(f"not applicable: {reason}")
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        out = (options.out or Path(temporary)).resolve()
        out.mkdir(parents=True, exist_ok=True)
        with Hosts(out) as hosts:
            trial = Trial(out, hosts, options.host_timeout)
            alone = trial.alone()
            trial.end("whole", trial.start("whole"))
            try:
                print(parity(alone, out / "whole" / "run"), flush=True)
                for line in cut(trial):
                    print(line, flush=True)
                print(resumed(trial), flush=True)
            except AssertionError as error:
                print(f"FAIL: {error}")
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
