"""Commands begin at once: what they import before there is work for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from signal import SIGPIPE

import pytest

from lm.__main__ import commands

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "datasets", "trl", "peft", "accelerate")
LIGHT = ("numpy", "scipy", "matplotlib", "sympy", "rich", "jsonargparse", "pandas")
"""What `lm.report --help` does without besides."""
EVERY = [
    *commands(),
    "lm",
    "lm.workflow.job",
    "lm.workflow.regimes",
    "lm.workflow.summary",
    "lm.workflow.tables",
    "lm.workflow.verdicts",
    "figures",
]
HELPED = [*EVERY, *commands("theory"), *commands("bandits")]
UNREAD = 128 + SIGPIPE, 0
"""Exit statuses of a help text that nobody reads to its end, as `| head` does; argparse passes over what cannot be
written of a long one."""

RUN = """
import json, os, runpy, sys
asked, before = json.loads(sys.argv[1]), sys.argv[2:]
for module in before:
    __import__(module)
for name, *arguments in asked:
    if (child := os.fork()) == 0:
        read, write = os.pipe()
        os.close(read)
        os.dup2(write, 1)
        sys.argv = [name, *arguments]
        try:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            print("status", end.code or 0, file=sys.stderr)
        sys.stdout.flush()
        print("loaded", *sorted({module.split(".")[0] for module in sys.modules}), file=sys.stderr, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def loaded(*asked: tuple[str, ...], before: tuple[str, ...] = (), status: tuple[int, ...] = (0,)) -> list[set[str]]:
    """The packages that each of these commands has imported when it ends, in forks of one interpreter, whose stdout
    nobody reads.

    Args:
        before: modules that it has imported, to save time: they count as imported by each command.
        status: with one of which each command must end.
    """
    words = [sys.executable, "-c", RUN, json.dumps(asked), *before]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}  # as users have it
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=True, env=buffered)
    lines = done.stderr.splitlines()
    assert sum(lines.count(f"status {one}") for one in set(status)) == len(asked), done.stderr
    found = [set(line.split()[1:]) for line in lines if line.startswith("loaded ")]
    if status == UNREAD:
        assert len(lines) == 2 * len(asked), f"it ends without a word: {done.stderr}"
    assert len(found) == len(asked), done.stderr
    return found


@pytest.fixture(scope="module")
def helped() -> dict[str, set[str]]:
    asked = [(name, "--help") for name in HELPED]
    return dict(zip(HELPED, loaded(*asked, before=("lm.base.options",), status=UNREAD), strict=True))


@pytest.mark.parametrize("name", HELPED)
def test_help_imports_no_torch(name: str, helped: dict[str, set[str]]) -> None:
    assert not helped[name] & set(HEAVY)


def test_the_help_of_a_report_imports_nothing_to_speak_of() -> None:
    (packages,) = loaded(("lm.report", "--help"), status=UNREAD)
    assert not packages & {*HEAVY, *LIGHT}


def test_a_mistake_in_the_options_is_told_before_torch_is_there(tmp_path: Path) -> None:
    for packages in loaded(("lm.train", "--dpo.beta", "-1"), ("lm.report", str(tmp_path)), status=(2,)):
        assert not packages & set(HEAVY)


def test_what_a_command_imports_is_noticed() -> None:
    """Control: this one has to have torch for what it was asked."""
    asked = ("lm.train", "--model", "/no/where", "--output_dir", "/tmp/no-such-run")
    assert "torch" in loaded(asked, status=(2,))[0]
