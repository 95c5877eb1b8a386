"""The commands outside lm: help with examples that parse, mistakes in a line, exit statuses; how any command ends."""

from __future__ import annotations

import importlib
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).parents[1]
WORK = {
    "theory": ("theory.__main__", "run"),
    "theory.fates": ("theory.fates", "table"),
    "theory.mutation": ("theory.mutation", "mutants"),
    "bandits.transitive": ("bandits.transitive", "records"),
    "bandits.pessimism": ("bandits.pessimism", "compute"),
    "bandits.degeneration": ("bandits.degeneration", "compute"),
    "bandits.bench": ("bandits.bench", "batched"),
    "bandits.certify": ("bandits.certify", "table"),
    "figures": ("figures.__main__", "redraw"),
}
"""Where each command is, and the function there that works once the options have been read."""
of_every_command = pytest.mark.parametrize("command", WORK)


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the commands set for a process of their own ends with the test."""
    monkeypatch.chdir(ROOT)
    profile = settings.get_current_profile_name()
    yield
    settings.load_profile(profile)


def status(command: str, *arguments: str, fails: BaseException | None = None) -> int:
    """Exit status, however the command leaves, if its work fails like this."""

    def work(*_: object, **__: object) -> None:
        assert fails is not None, "there is work to do"
        raise fails

    module, name = WORK[command]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module(module), name, work)
        try:
            left: int = importlib.import_module(module).main(arguments)
        except SystemExit as end:
            left = int(end.code or 0)
    return left


def test_these_are_all_commands() -> None:
    found = {
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__main__")
        for package in ("theory", "bandits", "figures")
        for path in (ROOT / package).rglob("*.py")
        if "__name__ ==" in path.read_text()
    }
    assert found == set(WORK)


@of_every_command
def test_help_has_examples_that_are_understood(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(command, "--help") == 0
    shown = capsys.readouterr().out
    examples = re.findall(rf"(?m)^  python -m {re.escape(command)}(?: (.*))?$", shown)
    assert len(examples) >= 2
    assert "exit status: 0 done; 1 failed" in shown
    assert "2 a mistake in the options" in shown
    assert "130 interrupted" in shown
    for example in examples:
        assert status(command, *shlex.split(example), fails=KeyboardInterrupt()) == 130, "it came as far as the work"
        assert capsys.readouterr().err == "interrupted\n"


@of_every_command
def test_an_unknown_option_is_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(command, "--no-such-option") == 2
    shown = capsys.readouterr()
    assert "--no-such-option" in shown.err
    assert "Traceback" not in shown.err
    assert not shown.out


@of_every_command
@pytest.mark.parametrize(
    ("error", "left"),
    [
        (NotADirectoryError(20, "Not a directory", "there"), 2),
        (PermissionError(13, "Permission denied", "there"), 1),
        (OSError(28, "No space left on device", "there"), 1),
    ],
    ids=["not a folder", "not allowed", "full"],
)
def test_an_error_is_a_line_and_a_traceback_with_debug_only(
    command: str, error: OSError, left: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(command, fails=error) == left
    assert capsys.readouterr().err == f"error: {error}\n"
    assert status(command, "--debug", fails=error) == left
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.endswith(f"error: {error}\n")


@of_every_command
def test_our_own_faults_keep_their_traceback(command: str) -> None:
    with pytest.raises(AssertionError, match="ours"):
        status(command, fails=AssertionError("ours"))


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("theory", ["--only", "thm9"], "--only thm9: no such statement; there are prop1, "),
        ("theory", ["--only", "cor1,thm9"], "--only thm9: no such statement; there are prop1, "),
        ("theory.mutation", ["--only", "dqo"], "--only dqo: theory.losses has no such function; it has "),
        ("bandits.transitive", ["--beta", "0"], "beta must be a finite number > 0, got 0.0"),
        ("bandits.bench", ["--seed", "-1"], "expected non-negative integer"),
        ("figures", ["figure_9"], "no figure named figure_9; there are "),
    ],
)
def test_a_mistake_is_one_line(
    command: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.import_module(WORK[command][0])
    assert real.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")
    assert real.main([*arguments, "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_problem_beyond_double_precision_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    from bandits.solve import NotConverged

    assert status("bandits.transitive", fails=NotConverged("residual 1e-3")) == 1
    assert capsys.readouterr().err == "error: residual 1e-3\n"


@pytest.mark.parametrize("command", ["theory", "bandits.bench"])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.json"
    assert status(command, "--json", str(tmp_path)) == 2
    assert "is a folder; a file is needed" in capsys.readouterr().err
    assert status(command, "--json", str(tmp_path / "no" / "out.json")) == 2
    assert f"there is no folder {tmp_path / 'no'}" in capsys.readouterr().err
    assert status(command, "--json", str(file), fails=KeyboardInterrupt()) == 130, "as it stands it can be"
    monkeypatch.setattr("os.access", lambda *_: False)  # whoever runs the tests may be root
    assert status(command, "--json", str(file)) == 2
    assert f"the folder {tmp_path} may not be written to" in capsys.readouterr().err


COUNTS = """
import signal, sys, time
from {} import as_command

signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs are started deaf to it

@as_command
def main(arguments):
    try:
        for number in range(10**5):
            print(number, flush=True)
            time.sleep("slow" in arguments)
    finally:
        print("put away", file=sys.stderr)

sys.exit(main())
"""
PROGRAMS = {
    "theory": COUNTS.format("theory.shell"),
    "lm": COUNTS.format("lm.base.command"),
    "figures": """
import signal, sys, time
import figures.__main__ as command

signal.signal(signal.SIGINT, signal.default_int_handler)
slow, sys.argv = "slow" in sys.argv, sys.argv[:1]

def redraw(name, out, **_):
    try:
        for number in range(10**5):
            print(number, flush=True)
            time.sleep(slow)
    finally:
        print("put away", file=sys.stderr)

command.redraw = redraw
sys.exit(command.main())
""",
}


INTERRUPTED, CLOSED, TERMINATED = (
    (signal.SIGINT, 130, "interrupted"),
    (None, 141, ""),
    (signal.SIGTERM, 143, "terminated"),
)


@pytest.mark.parametrize(
    ("program", "sent", "left", "said"),
    [*((program, *end) for program in PROGRAMS for end in (INTERRUPTED, CLOSED)), ("lm", *TERMINATED)],
)
def test_what_ends_a_command_from_outside(program: str, sent: int | None, left: int, said: str) -> None:
    command = [sys.executable, "-c", PROGRAMS[program], *(["slow"] if sent else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == "0\n"
        if sent:
            process.send_signal(sent)
        else:
            process.stdout.close()
        shown = process.stderr.read()
    assert process.returncode == left
    ends = ["put away\n", *([f"{said}\n"] if said else [])]
    assert sorted(shown.splitlines(keepends=True)) == sorted(ends)
