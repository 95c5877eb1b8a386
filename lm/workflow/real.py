"""Runs the studies on real text, as far as the hours given go, and sums up what is finished.

Each study is the grid's workflow with axes of its own, `lm/workflow/real/NAME.yaml`; the next call goes on where the
last one stopped. What is finished of them all is in real_text.json, which figures are drawn from.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lm.base import progress
from lm.base.command import argument_parser, as_command, path
from lm.workflow.record import read
from lm.workflow.summary import as_text, summary, whole_seeds, with_study
from theory.records import write_text

HERE = Path(__file__).parent
STUDIES = tuple(sorted(file.stem for file in (HERE / "real").glob("*.yaml")))
PATIENCE = 600
"""Seconds that a study may take to stop: its jobs leave what they have finished."""


def go_on(study: str, folder: Path, cores: int, options: str, seconds: float) -> bool:
    """Runs a study for so long at most; whether it is finished.

    Args:
        study: its name.
        folder: of all studies.
        cores: jobs at a time, of one thread each.
        options: of lm.train, for every job, as of a local copy of the data.
        seconds: > 0.

    Raises:
        ChildProcessError: a job failed; its log is said.
    """
    workflow = ["-s", str(HERE / "Snakefile"), "--configfile", str(HERE / "real" / f"{study}.yaml")]
    where = ["--directory", str(folder / study), "--cores", str(cores), "--rerun-incomplete", "--keep-going"]
    command = [sys.executable, "-m", "snakemake", *workflow, *where]
    subprocess.run([*command, "--unlock"], capture_output=True, check=False)  # after a power cut
    command += ["--config", f"options={options}"] if options else []
    running = subprocess.Popen(command, start_new_session=True)  # a group, which is interrupted as by Ctrl-C
    try:
        if running.wait(seconds) == 0:
            return True
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as stop:
        os.killpg(running.pid, signal.SIGINT)
        running.wait(PATIENCE)
        if isinstance(stop, KeyboardInterrupt):
            raise
        return False
    raise ChildProcessError(f"{study}: a job failed; its log is in {folder / study / 'logs'}")


def sum_up(study: str, folder: Path, others: Sequence[Path] = ()) -> None:
    """Writes what is finished of a study, in whole seeds, into real_text.json; says so where none is.

    Args:
        study: its name.
        folder: of all studies.
        others: folders like it, with the records of seeds that were run elsewhere.
    """
    jobs = (place / study / kind for place in (folder, *others) for kind in ("base", "scores", "cells", "alpha"))
    records = whole_seeds([read(file) for job in jobs for file in sorted(job.glob("*.json"))])
    out = folder / "real_text.json"
    try:
        document = summary(records)
    except ValueError as error:
        progress.say(f"{study}: nothing to sum up yet ({error})")
        return
    write_text(out, as_text(with_study(out, study, document)))
    progress.say(f"{study}: summed up in {out}")


@as_command
def main(arguments: Sequence[str]) -> None:
    """The command."""
    parser = argument_parser("lm.workflow.real", __doc__, "helpfulness --hours 8")
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"any of {', '.join(STUDIES)} (default: all)")
    parser.add_argument("--hours", type=float, default=48.0, help="stop after so many (default: %(default)g)")
    parser.add_argument("--cores", type=int, default=2, help="jobs at a time (default: %(default)s)")
    parser.add_argument("--folder", type=path, default=Path("runs/real"), help="of all that is made (%(default)s)")
    parser.add_argument(
        "--options",
        action="append",
        default=[],
        metavar="STUDY=OPTIONS",
        help="options of lm.train for a study, as helpfulness='--data.path FILE', with the whole path",
    )
    parser.add_argument(
        "--records",
        action="append",
        type=path,
        default=[],
        metavar="FOLDER",
        help="laid out as --folder, with records of other seeds that were run elsewhere: summed up with these",
    )
    given = parser.parse_args(arguments)
    options = dict(_pair(parser, one) for one in given.options)
    for study in (*given.studies, *options):
        if study not in STUDIES:
            parser.error(f"no study named {study}; there are {', '.join(STUDIES)}")
    for place in given.records:
        if not place.is_dir():
            parser.error(f"--records {place} is no folder; name one that has a study's records, as STUDY/cells/*.json")
    if given.hours <= 0 or given.cores < 1:
        parser.error(f"--hours must be > 0 and --cores at least 1, got {given.hours:g} and {given.cores}")
    end = time.monotonic() + given.hours * 3600
    for study in given.studies or STUDIES:
        left = end - time.monotonic()
        if left <= 0:
            progress.say(f"{study}: no time is left; the same command goes on")
            continue
        try:
            done = go_on(study, given.folder, given.cores, options.get(study, ""), left)
        finally:
            sum_up(study, given.folder, given.records)
        progress.say(f"{study}: {'finished' if done else 'stopped after its time; the same command goes on'}")


def _pair(parser: argparse.ArgumentParser, text: str) -> tuple[str, str]:
    study, equals, options = text.partition("=")
    if not equals:
        parser.error(f"--options must be STUDY=OPTIONS, got {text!r}")
    return study, options


if __name__ == "__main__":
    sys.exit(main())
