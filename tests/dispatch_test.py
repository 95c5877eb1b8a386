"""The command `lm`, and what is said where a package of the user's hides one of ours; installed, see `wheel_test`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lm.__main__ import BESIDE, commands, script

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "1")  # the command sets it, for its own process and those that it starts


def test_it_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert script([]) == 0
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert {"train", "theory", "figures", "bandits.transitive", "theory.mutation"} <= set(shown)
    assert len(shown) == len(commands()) + sum(len(commands(package)) for package in BESIDE)


@pytest.mark.parametrize(("name", "hint"), [("trian", "did you mean lm train?"), ("x", "`lm` lists them")])
def test_what_is_none_is_a_line(name: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert script([name, "--help"]) == 2
    assert capsys.readouterr().err == f"error: there is no command {name!r}; {hint}\n"


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("name", ["report", "lm.report", "bandits.certify"])
def test_it_runs_a_command(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.delenv("PYTHONSAFEPATH")
    with pytest.raises(SystemExit) as end:
        script([name, "--help"])
    assert end.value.code == 0
    module = name if "." in name else f"lm.{name}"
    assert os.environ["PYTHONSAFEPATH"] == "1"
    assert f"usage: python -m {module}" in capsys.readouterr().out


def ended(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """What a Python that can import this checkout does in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    del environment["PYTHONSAFEPATH"]
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("as_file", [True, False])
@pytest.mark.parametrize(
    ("module", "name"), [("lm.report", "theory"), ("lm.report", "figures"), ("bandits.bench", "theory")]
)
def test_what_hides_a_package_is_named_in_a_line(module: str, name: str, as_file: bool, tmp_path: Path) -> None:
    mine = tmp_path / (f"{name}.py" if as_file else f"{name}/__init__.py")
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("")
    done = ended(tmp_path, "-m", module, "--help")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"{mine} hides the package {name!r}" in line
    assert "the command `lm`" in line
    assert ended(tmp_path, "-P", "-m", module, "--help").returncode == 0
    imported = ended(tmp_path, "-c", f"import {module.partition('.')[0]}")
    assert f"ImportError: {mine} hides the package" in imported.stderr


def test_a_folder_that_is_no_package_hides_nothing(tmp_path: Path) -> None:
    for name in ("lm", "theory", "figures"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").touch()
    assert ended(tmp_path, "-m", "lm.report", "--help").returncode == 0
