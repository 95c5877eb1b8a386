"""What is seen of a long stage through a pipe, on a terminal, and with --quiet."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest

from lm.base import progress
from lm.base.options import CONFIGS
from lm.stages import trainings
from lm.stages.run import command

ROOT = Path(__file__).parents[2]
STAGE = """
import sys, time
from lm.base import progress
progress.be_quiet("--quiet" in sys.argv)
if "--often" in sys.argv:
    progress.EVERY = 0.01
progress.say("[stage] name")
with progress.bar("scoring", total=40) as bar:
    for _ in range(20):
        time.sleep(0.005)
        bar.update(2)
for _ in progress.bar("tokenising", range(20), unit="batch"):
    time.sleep(0.005)
print("result")
"""


def through_a_pipe(*command: str) -> tuple[str, str]:
    """(stdout, stderr)."""
    done = subprocess.run([sys.executable, *command], capture_output=True, cwd=ROOT, check=True)
    return done.stdout.decode(), done.stderr.decode()


@contextlib.contextmanager
def terminal() -> Iterator[tuple[TextIO, list[bytes]]]:
    """(a terminal to write to, what has been seen on it in the end)."""
    screen, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    seen: list[bytes] = []

    def look() -> None:
        with contextlib.suppress(OSError):  # Linux's way to say that the other end is closed
            while part := os.read(screen, 1 << 16):
                seen.append(part)

    person = threading.Thread(target=look)
    person.start()
    with os.fdopen(theirs, "w", encoding="utf-8") as file:
        yield file, seen
    person.join()
    os.close(screen)


def on_a_terminal(*command: str) -> str:
    """What a person sees."""
    with terminal() as (file, seen):
        subprocess.run([sys.executable, *command], stdout=file, stderr=file, cwd=ROOT, check=True)
    return b"".join(seen).decode()


def test_through_a_pipe_a_short_stage_is_one_line() -> None:
    assert through_a_pipe("-c", STAGE) == ("result\n", "[stage] name\n")


def test_through_a_pipe_a_long_stage_is_plain_lines_with_the_time_left() -> None:
    out, err = through_a_pipe("-c", STAGE, "--often")
    assert out == "result\n"
    first, *lines = err.split("\n")[:-1]
    assert first == "[stage] name"
    assert len(lines) > 4
    for line in lines:
        assert re.fullmatch(
            r"(scoring: \d+ of 40 \(row\)|tokenising: \d+ of 20 \(batch\)), [\d:]+ gone, [\d:?]+ left", line
        ), line
    counts = [int(line.split()[1]) for line in lines if line.startswith("scoring")]
    assert counts == sorted(counts)


def test_on_a_terminal_there_are_bars_which_are_cleared() -> None:
    seen = on_a_terminal("-c", STAGE)
    assert "[stage] name" in seen
    assert re.search(r"\rscoring: +\d+%\|.*\| \d+/40 \[[\d:]+<[\d:?]+, .*row/s\]", seen)
    assert re.search(r"\rtokenising: +\d+%\|.*batch/s\]", seen)
    assert seen.endswith("result\r\n")
    last = seen.removesuffix("result\r\n").split("\r")[-1]
    assert not last.strip(), "nothing of a bar is left on the line of the result"


def test_quiet_leaves_the_result() -> None:
    assert through_a_pipe("-c", STAGE, "--often", "--quiet") == ("result\n", "")
    assert on_a_terminal("-c", STAGE, "--quiet") == "result\r\n"


def test_quiet_is_of_this_process_and_can_be_ended(capsys: pytest.CaptureFixture[str]) -> None:
    progress.be_quiet()
    progress.say("not this")
    assert progress.is_quiet()
    assert list(progress.bar("nor this", range(3))) == [0, 1, 2]
    progress.be_quiet(False)
    progress.say("this")
    assert capsys.readouterr().err == "this\n"


def test_a_commands_stages_are_seen_as_its_stderr_allows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--config", str(CONFIGS / "demo.yaml"), "--data.world.posts", "30", "--device", "cpu"]
    options += ["--sft.epochs", "null", "--sft.max_steps", "3", "--sft.batch_size", "4", "--sft.logging_steps", "1"]

    def sft(folder: str, *more: str) -> None:
        given = [*options, "--output_dir", str(tmp_path / folder), *more]
        assert command("lm.sft", trainings.sft, arguments=given) == 0

    with terminal() as (file, seen), monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", file)
        sft("terminal")
    screen = b"".join(seen).decode()
    steps = r"training sft-policy-[0-9a-f]{12}: +\d+%\|.*/3 .*loss [\d.]+, [\d,]+ tokens/s\]"
    for what in (r"tokenising: +\d+%", steps):
        assert re.search(rf"\r{what}", screen), what
    assert capsys.readouterr().out == ""
    for folder, more, expected in (("pipe", [], "[data] world\n[sft] policy\n"), ("quiet", ["--quiet"], "")):
        sft(folder, *more)
        shown = capsys.readouterr()
        assert (shown.out, shown.err) == ("", expected)
