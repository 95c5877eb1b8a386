"""The wheel, where nothing of the checkout is: an environment of its own, commands run from an empty folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from lm.__main__ import BESIDE, commands

ROOT = Path(__file__).parents[1]
EVERY = [*commands(), *(name for package in BESIDE for name in commands(package))]
HELP = """
import json, os, runpy, sys
import lm.base.options
for name in json.loads(sys.argv[1]):
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        sys.argv = [name, "--help"]
        try:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            sys.stdout.flush()
            os._exit(int(end.code or 0))
        os._exit(9)
    _, status = os.waitpid(child, 0)
    print("status", name, os.waitstatus_to_exitcode(status), flush=True)
print(sys.modules['lm'].__file__)
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands are of an environment that has the wheel, and everybody else's packages from this one."""
    pytest.importorskip("hatchling", reason="the extra `dev` has hatchling, which builds the wheel")
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    home = folder / "environment"
    venv.create(home, symlinks=True)
    # A line of a .pth file names a folder, whose own .pth files, an editable install's among them, are not read.
    own = Path(sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)}))
    (own / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    install = ["-m", "pip", "--python", str(home / "bin" / "python"), "install", "--no-deps", "--no-index", "-q"]
    subprocess.run([sys.executable, *install, "--ignore-installed", str(wheel)], check=True, capture_output=True)
    return home / "bin"


def run(folder: Path, *command: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    """What a command does in a folder where nothing says where the checkout is."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stderr
    return done


def test_every_command_explains_itself(bin_folder: Path, tmp_path: Path) -> None:
    done = run(tmp_path, bin_folder / "python", "-c", HELP, json.dumps(EVERY))
    *lines, place = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("status ")] == [f"status {name} 0" for name in EVERY]
    assert Path(place).is_relative_to(bin_folder.parent), "the wheel's, not the checkout's"
    listed = run(tmp_path, bin_folder / "lm").stdout
    assert not [name for name in EVERY if f"  {name.removeprefix('lm.')} " not in listed]
    assert not list(tmp_path.iterdir())


def test_presets_go_by_their_names(bin_folder: Path, tmp_path: Path) -> None:
    printed = run(tmp_path, bin_folder / "lm", "train", "--config", "tldr", "--seed", "7", "--print_config").stdout
    assert "output_dir: runs/tldr" in printed
    assert "seed: 7" in printed


def test_a_folder_called_as_a_package(bin_folder: Path, tmp_path: Path) -> None:
    """Of the user's: the command does not see it, and `python -m` says what hides what."""
    for package in ("theory", "lm"):
        folder = tmp_path / package
        mine = folder / package
        mine.mkdir(parents=True)
        here = run(folder, bin_folder / "python", "-m", "lm.report", "--help").stdout
        assert "RUN" in here, "a folder that is no package hides none"
        (mine / "__init__.py").write_text("raise SystemExit('mine')\n")
        for command in (["report", "--help"], ["theory", "--help"]):
            assert "usage:" in run(folder, bin_folder / "lm", *command).stdout
        safe = run(folder, bin_folder / "python", "-P", "-m", "lm.report", "--help").stdout
        assert "RUN" in safe
    for module in ("lm.report", "lm.train", "bandits.transitive"):
        done = run(tmp_path / "theory", bin_folder / "python", "-m", module, "--help", status=1)
        (line,) = done.stderr.splitlines()
        assert f"{tmp_path}/theory/theory/__init__.py hides the package 'theory'" in line
        assert "rename it" in line
        assert "the command `lm`" in line


def test_what_is_no_command(bin_folder: Path, tmp_path: Path) -> None:
    done = run(tmp_path, bin_folder / "lm", "trian", status=2)
    assert done.stderr == "error: there is no command 'trian'; did you mean lm train?\n"
    done = run(tmp_path, bin_folder / "lm", "figures", "no-such-figure", status=2)
    assert "no figure named no-such-figure" in done.stderr


@pytest.mark.thorough
def test_theory_and_figures(bin_folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    run(tmp_path, bin_folder / "lm", "theory", "--only", "cor1", "--examples", "1", "--json", rows)
    assert json.loads(rows.read_text())[0]["verdict"] == "holds as sharpened"
    done = run(tmp_path, bin_folder / "lm", "figures", "figure_1", "--out", "drawn")
    assert (tmp_path / "drawn" / "figure_1.png").stat().st_size > 0, done.stdout


SMALL = {
    "data": {"world": {"posts": 60}},
    "bias": {"member_fractions": [0.2, 0.8]},
    "probe": {"pairs": 0},
    "evaluation": {"resamples": 100},
    **{stage: {"epochs": None, "max_steps": 2, "batch_size": 8} for stage in ("sft", "oracle", "reward", "policy")},
}


@pytest.mark.thorough
def test_a_tiny_run(bin_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(json.dumps(SMALL))  # which YAML is a superset of
    options = ["--config", "demo", "--config", "small.yaml", "--methods", "[dpo, e-dpo]", "--output_dir", "mine"]
    done = run(tmp_path, bin_folder / "lm", "train", *options)
    assert "e-dpo" in done.stdout
    record = json.loads((tmp_path / "mine" / "results.json").read_text())
    assert set(record["methods"]) == {"dpo", "e-dpo"}
    assert record["provenance"]["command"][:3] == ["python", "-m", "lm.train"]
    assert (tmp_path / "mine" / "report.html").exists()
