"""The grid through the SLURM profile on a real Slurm: a controller and a node of this machine, in a temporary folder.

    python -m tests.slurm [--out FOLDER]

Two tiny cells go through it. One of them is ended by scancel in mid-training, and again when the profile has it tried
anew: Snakemake must end with the other cell done. The same command must go on with what is left, and all records and
artifacts must be those of a run without Slurm. Prints what was seen; the exit status is 1 where something else was.
slurmctld, slurmd and munged are needed (Debian: slurm-wlm), root to run them, and a package index for
Snakemake's plugin, which goes into an environment of its own that sees this one's packages.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from lm.base.store import verify
from lm.workflow.workflow_test import TINY
from tests.kill import differences, files_of

ROOT = Path(__file__).parents[1]
WORKFLOW = ROOT / "lm" / "workflow"
PROFILE = WORKFLOW / "profiles" / "slurm" / "config.yaml"
PLUGIN = "snakemake-executor-plugin-slurm"
DAEMONS = ("munged", "slurmctld", "slurmd")
ACCOUNT, PARTITION = "tests", "short"
KILLED, OTHER = "cells/seed0-rho0.2-p-dpo.json", "cells/seed0-rho0.2-dpo.json"
AXES = ["seeds=[0]", "rhos=[0.2]", "methods=[dpo,p-dpo]", "constant_alpha={values: []}"]
PATIENCE = 3600.0
"""Seconds after which something hangs, also on a busy machine."""
CONF = """
ClusterName={cluster}
SlurmctldHost=localhost
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=100000
NodeName=localhost NodeAddr=127.0.0.1 CPUs=2 RealMemory=16000
PartitionName={partition} Nodes=ALL Default=YES State=UP
"""
"""No accounting: a cluster that has it answers sacct, this one squeue."""


def lacks() -> str | None:
    """What this machine has not that is needed here, in words; None where it has all."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
    if absent := [name for name in (*DAEMONS, "sbatch", "squeue", "scancel") if shutil.which(name, path=path) is None]:
        return f"{absent[0]} is not installed (Debian: apt-get install slurm-wlm)"
    if not Path("/etc/slurm").is_dir():
        return "there is no /etc/slurm, where the node finds its configuration"
    if os.geteuid() != 0:
        return "the daemons are run as root"
    return None


def environment(folder: Path) -> Path:
    """Python of an environment that has the plugin, and sees the packages of this one."""
    venv.create(folder, with_pip=True)
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    Path(paths["purelib"], "project.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", PLUGIN], check=True)
    return python


class Slurm:
    """Controller and node, ended with the context, and all jobs before them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.daemons = folder, list[subprocess.Popen[bytes]]()
        self.environ = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}
        self.environ["PATH"] += f"{os.pathsep}/usr/sbin"

    def __enter__(self) -> Slurm:
        for name in ("munge", "state", "spool"):
            (self.folder / name).mkdir(parents=True)
        munge = self.folder / "munge"
        (munge / "key").write_bytes(secrets.token_bytes(128))
        (munge / "key").chmod(0o400)
        with contextlib.ExitStack() as stack:
            probes = [stack.enter_context(socket.socket()) for _ in range(2)]
            for probe in probes:
                probe.bind(("127.0.0.1", 0))
            ports = [probe.getsockname()[1] for probe in probes]
        conf = CONF.format(folder=self.folder, ports=ports, partition=PARTITION, cluster="tests")
        (self.folder / "slurm.conf").write_text(conf)
        places = [f"--{what}={munge / name}" for what, name in (("key-file", "key"), ("socket", "socket"))]
        places += [f"--{what}-file={munge / what}" for what in ("pid", "log", "seed")]
        try:
            self._start("munged", "--foreground", *places)
            until((munge / "socket").exists, "munged")
            self._start("slurmctld", "-D", "-c")
            # As the plugin's srun has no SLURM_CONF: in the node's eyes, the configuration is where it is on a cluster.
            seen = f'mount --bind "{self.folder}" /etc/slurm && exec "$@"'
            self._start("slurmd", "-D", "-c", within=["unshare", "--mount", "sh", "-c", seen, "sh"])
            until(lambda: "idle" in self.ask("sinfo", "--noheader", "--format=%T"), "an idle node")
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self, *command: str, within: Sequence[str] = ()) -> None:
        with (self.folder / f"{command[0]}.out").open("w") as out:
            self.daemons.append(subprocess.Popen([*within, *command], env=self.environ, stdout=out, stderr=out))

    def __exit__(self, *_: object) -> None:
        if len(self.daemons) == len(DAEMONS):
            with contextlib.suppress(subprocess.SubprocessError, TimeoutError):
                self.ask("scancel", "--user=root")
                until(lambda: not self.ask("squeue", "--noheader"), "the end of all jobs", 60)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            daemon.wait(60)

    def ask(self, *command: str) -> str:
        """What a command of Slurm's says."""
        return subprocess.run(command, env=self.environ, capture_output=True, text=True, check=False, timeout=60).stdout

    def jobs(self) -> list[tuple[str, str, str]]:
        """Number, state, and what it is of (rule and wildcards), of every job so far."""
        lines = self.ask("squeue", "--noheader", "--states=all", "--format=%i|%T|%k").splitlines()
        return [tuple(line.split("|", 2)) for line in sorted(lines, key=lambda line: int(line.split("|")[0]))]  # type: ignore[misc]


def until(holds: Callable[[], Any], what: str, seconds: float = PATIENCE) -> None:
    """Waits until it holds; TimeoutError where it does not in time."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not come within {seconds:g} seconds")
        time.sleep(0.05)


class Grid:
    """The workflow's command, in a folder, on this machine or through the profile."""

    def __init__(self, python: Path, out: Path) -> None:
        self.out, self.preset = out, out / "tiny.yaml"
        training = {**TINY["policy"], "max_steps": 200, "learning_rate": 1e-3, "save_steps": 10}
        self.preset.write_text(json.dumps({**TINY, "policy": training, "sweep": {}}))
        profile = yaml.safe_load(PROFILE.read_text())
        profile["default-resources"] |= {"slurm_account": ACCOUNT, "slurm_partition": PARTITION}
        (out / "profile").mkdir()
        (out / "profile" / "config.yaml").write_text(yaml.safe_dump(profile))
        self.local = [str(python), "-m", "snakemake", "-s", str(WORKFLOW / "Snakefile")]
        self.slurm = [*self.local, "--profile", str(out / "profile"), "--slurm-status-command", "squeue"]
        self.slurm += ["--slurm-init-seconds-before-status-checks", "5"]

    def start(self, command: Sequence[str], name: str, turn: str, environ: dict[str, str]) -> subprocess.Popen[bytes]:
        """One run of it; what it says goes to <name><turn>.log."""
        axes = ["--directory", str(self.out / name), "--config", f"preset={self.preset}", *AXES]
        with self.said(name, turn).open("w") as out:
            return subprocess.Popen([*command, *axes], env=environ, stdout=out, stderr=out)

    def said(self, name: str, turn: str = "") -> Path:
        """What a run said."""
        return self.out / f"{name}{turn}.log"


def tried(grid: Grid, slurm: Slurm) -> Iterator[str]:
    """Runs it through Slurm, ends a cell's job twice, and runs it again."""
    folder = grid.out / "slurm"
    running = grid.start(grid.slurm, "slurm", "", slurm.environ)

    def steps() -> int:
        """Of the policy's latest whole checkpoint."""
        found = folder.glob("store/.work/policy-p-dpo-*/scratch/checkpoint-*/checksums.json")
        return max((int(path.parent.name.split("-")[1]) for path in found), default=0)

    def job() -> str | None:
        """The number of the job that makes the cell now."""
        own = [number for number, state, of in slurm.jobs() if "cell" in of and "p-dpo" in of and state == "RUNNING"]
        return own[0] if own else None

    def training() -> str:
        """The number of the cell's job, a new one, once it has written a checkpoint of its own."""
        until(lambda: running.poll() is not None or job() not in (None, *ended), "the cell's job")
        done = steps()
        until(lambda: running.poll() is not None or steps() > done, "a checkpoint")
        number = job()
        assert running.poll() is None, f"Snakemake ended with {running.returncode}: {grid.said('slurm')}"
        assert number is not None
        return number

    ended = list[str]()
    try:
        for _ in range(2):
            number = training()
            yield f"job {number}, in the training of {KILLED} with a checkpoint of step {steps()}, is cancelled"
            slurm.ask("scancel", number)
            ended.append(number)
        status = running.wait(PATIENCE)
    finally:
        if running.poll() is None:
            running.terminate()
            running.wait(60)
    states = {number: state for number, state, _ in slurm.jobs()}
    assert status == 1, f"Snakemake ended with {status}: {grid.said('slurm')}"
    assert {states[number] for number in ended} == {"CANCELLED"}, states
    assert (folder / OTHER).exists(), "the other cell is done"
    assert not (folder / KILLED).exists()
    assert not (folder / "grid.json").exists()
    whole = [verify(path) for path in folder.glob("store/[!.]*/*") if path.is_dir()]
    yield f"Snakemake ended with status 1, {OTHER} is there, {len(whole)} artifacts pass their checksums"

    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.json")}
    assert len(before) == 3
    known = {number for number, *_ in slurm.jobs()}
    status = grid.start(grid.slurm, "slurm", "-again", slurm.environ).wait(PATIENCE)
    assert status == 0, f"Snakemake ended with {status}: {grid.said('slurm', '-again')}"
    new = [of for number, _, of in slurm.jobs() if number not in known]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items()), "records that were there are kept"
    assert len(new) == 2, new
    (policy,) = (one for one in json.loads((folder / KILLED).read_text())["stages"] if one["stage"] == "policy")
    assert policy["resumed"], "the policy was trained anew"
    yield f"the same command ended with status 0, with {len(new)} more jobs: {', '.join(new)}"


def same(grid: Grid) -> str:
    """Asserts that Slurm's records and artifacts are those of this machine's."""
    local, slurm = (grid.out / name for name in ("local", "slurm"))
    records = sorted(str(path.relative_to(local)) for path in [*local.glob("*/seed*.json"), local / "grid.json"])
    assert len(records) == 5, records
    for name in records:
        one, other = (json.loads((folder / name).read_text()) for folder in (local, slurm))
        assert one.keys() == other.keys()
        unlike = [key for key in one if key not in ("stages", "provenance") and one[key] != other[key]]
        assert not unlike, f"{name}: {', '.join(unlike)}"
    found = differences(local / "store", slurm / "store")
    assert not found, "\n".join(found)
    files = len(files_of(local / "store"))
    return f"{len(records)} records and {files} files of artifacts are those of a run without Slurm, but for times"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what was seen; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.slurm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="where all goes, an empty folder; a temporary one by default")
    options = parser.parse_args(arguments)
    if (reason := lacks()) is not None:
        print(f"not applicable: {reason}")
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        out = (options.out or Path(temporary)).resolve()
        out.mkdir(parents=True, exist_ok=True)
        try:
            grid = Grid(environment(out / "venv"), out)
        except subprocess.CalledProcessError:
            print(f"not applicable: pip could not install {PLUGIN}")
            return 0
        try:
            with Slurm(out / "cluster") as slurm:
                version = slurm.ask("sinfo", "--version").strip()
                print(f"{version}, {PLUGIN} {_version(out / 'venv')}", flush=True)
                for line in tried(grid, slurm):
                    print(line, flush=True)
            alone = {**os.environ, "OMP_NUM_THREADS": "1"}
            status = grid.start([*grid.local, "--cores", "2"], "local", "", alone).wait(PATIENCE)
            assert status == 0, f"Snakemake ended with {status}: {grid.said('local')}"
            print(same(grid))
        except (AssertionError, TimeoutError) as error:
            print(f"FAIL: {error}")
            return 1
    return 0


def _version(environment: Path) -> str:
    (found,) = environment.glob(f"lib/*/site-packages/{PLUGIN.replace('-', '_')}-*.dist-info")
    return found.name.removesuffix(".dist-info").rpartition("-")[2]


if __name__ == "__main__":
    sys.exit(main())
