"""Commands begin at once: what they import before there is work for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lm.__main__ import commands

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "datasets", "trl", "peft", "accelerate")
LIGHT = ("numpy", "scipy", "matplotlib", "sympy", "rich", "jsonargparse", "pandas")
"""What `lm.report --help` does without besides."""
EVERY = [*commands(), "lm", "lm.workflow.job", "lm.workflow.summary", "lm.workflow.tables", "theory", "figures"]

RUN = """
import runpy, sys
sys.argv = [{name!r}, *{arguments!r}]
try:
    runpy.run_module({name!r}, run_name="__main__", alter_sys=True)
except SystemExit as end:
    print("status", end.code or 0, file=sys.stderr)
print("loaded", *sorted(set({watched!r}) & set(sys.modules)), file=sys.stderr)
"""


def loaded(name: str, *arguments: str, watched: tuple[str, ...] = HEAVY, status: int = 0) -> list[str]:
    """Which of these packages a command has imported when it ends."""
    code = RUN.format(name=name, arguments=list(arguments), watched=watched)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    lines = done.stderr.splitlines()
    assert f"status {status}" in lines, done.stderr
    return lines[-1].split()[1:]


@pytest.mark.parametrize("name", [*EVERY, "bandits.transitive", "bandits.bench"])
def test_help_imports_no_torch(name: str) -> None:
    assert loaded(name, "--help") == []


def test_the_help_of_a_report_imports_nothing_to_speak_of() -> None:
    assert loaded("lm.report", "--help", watched=(*HEAVY, *LIGHT)) == []


def test_a_mistake_in_the_options_is_told_before_torch_is_there(tmp_path: Path) -> None:
    assert loaded("lm.train", "--dpo.beta", "-1", status=2) == []
    assert loaded("lm.report", str(tmp_path), status=2) == []


def test_what_a_command_imports_is_noticed() -> None:
    """Control: this one has to have torch for what it was asked."""
    assert "torch" in loaded("lm.train", "--model", "/no/where", "--output_dir", "/tmp/no-such-run", status=2)
