"""What works where only the base dependencies are installed: theory, bandits, figures; and what the rest asks for.

The libraries of the extras are hidden from the processes that these tests start, as if nobody had installed them.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from theory.shell import as_command, extra_of, missing_library, require_libraries

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HIDE = """
import importlib.machinery
real = importlib.machinery.PathFinder.find_spec

def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in HIDDEN else real(name, path, target)

importlib.machinery.PathFinder.find_spec = classmethod(find_spec)
"""
HIDDEN = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "peft", "trl", "jsonargparse")


ACCURACY = {"accuracy": 0.5, "pairs": 2}
MEASURED = dict.fromkeys(
    ("oracle_reward", "length", "finished", "kl", "chosen_logratio", "rejected_logratio", "accuracy"), 0.5
)
ROWS = {"kept": {"train": 2}, "dropped": {}}
BASE = {
    "job": "base",
    "seed": 0,
    "sft": {**MEASURED, "n": 2},
    "oracle": dict.fromkeys(("all", "longer", "shorter", "neither"), ACCURACY),
    "labels": {"longer_preferred": 0.5},
    "data": {"preferences": ROWS, "references": ROWS, "vocabulary": 9},
    "config": {"evaluation": {"confidence": 0.9, "resamples": 10}, "bias": {}},
    "provenance": {"commit": None, "date": "2026-01-02", "machine": {"processor": "P", "cores": 2}},
}
"""A record of a grid's job."""


def without(folder: Path, *command: str, hidden: tuple[str, ...] = HIDDEN) -> subprocess.CompletedProcess[str]:
    """What a Python says in which some libraries cannot be found."""
    (folder / "sitecustomize.py").write_text(f"HIDDEN = {hidden}{HIDE}")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )


@pytest.mark.thorough
def test_the_ledger_without_torch(tmp_path: Path) -> None:
    """cor1 has a property on tensors: that alone is not run."""
    file = tmp_path / "ledger.json"
    command = ("-m", "theory", "--only", "cor1", "--only", "loss-definitions", "--examples", "3", "--json", str(file))
    done = without(tmp_path, *command)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stdout + done.stderr
    leak, definitions = sorted(json.loads(file.read_text()), key=lambda row: row["id"])
    assert leak["not_run"] == ["property nothing_holds_the_unseen: not run: torch is not installed"]
    assert leak["verdict"] == "holds as sharpened"
    assert leak["examples"] >= 6, "the properties on NumPy are drawn"
    assert (definitions["not_run"], definitions["verdict"]) == ([], "holds")
    # Cells are as wide as the terminal allows, and the columns beside them as the claims' texts are long.
    assert re.search(
        r"1\b.*\bcheck\b.*\bnot\b.*\brun:.*\btorch\b.*\bis\b.*\bnot\b.*\binstalled", done.stdout, re.DOTALL
    )
    assert "cor1: property nothing_holds_the_unseen: not run: torch is not installed" in " ".join(done.stderr.split())


def test_pytest_without_torch(tmp_path: Path) -> None:
    files = ("theory/propositions/dpo_leak_test.py", "theory/preferences_test.py")
    done = without(tmp_path, "-m", "pytest", "-p", "no:cacheprovider", *files)
    assert done.returncode == 0, done.stdout + done.stderr
    skipped = re.search(r"SKIPPED \[(\d+)\] .*: not run: torch is not installed", done.stdout)
    assert skipped is not None
    assert int(skipped[1]) >= 2, "a property of cor1 and the margins of tensors"
    assert re.search(rf"\n\d+ passed, {skipped[1]} skipped in", done.stdout)


def test_bandits_and_figures_without_torch(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = without(tmp_path, "-m", "bandits.transitive", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert (out / "figure_b2.png").stat().st_size > 0
    done = without(tmp_path, "-m", "figures", "figure_1", "--out", str(out))
    assert done.returncode == 0, done.stderr


def test_a_command_says_in_a_line_which_extra_it_wants(tmp_path: Path) -> None:
    done = without(tmp_path, "-m", "theory.mutation", "--only", "ipo")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: torch is not installed: it comes with the extra `lm`, pip install -e '.[lm]'\n"
    done = without(tmp_path, "-m", "theory.mutation", "--only", "ipo", "--debug")
    assert "Traceback" in done.stderr
    assert without(tmp_path, "-m", "theory.mutation", "--help").returncode == 0


@pytest.mark.parametrize("library", ["yaml", "jsonargparse"])
def test_so_do_those_of_lm_that_need_no_model(library: str, tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    record.write_text(json.dumps(BASE), encoding="utf-8")
    summed = ("-m", "lm.workflow.summary", str(record), "--out", str(tmp_path / "grid.json"))
    for command in (summed, ("-m", "lm.bench", "--startup")):
        done = without(tmp_path, *command, hidden=(library,))
        assert (done.returncode, done.stdout) == (1, ""), command
        assert re.fullmatch(rf"error: {library} is not installed: it comes with the extra .*\n", done.stderr), command
    assert without(tmp_path, *summed[:2], "--help", hidden=(library,)).returncode == 0


def test_any_other_import_error_is_a_fault_and_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    @as_command
    def main(arguments: list[str]) -> int:
        importlib.import_module("theory.no_such_module")
        return 0

    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        main([])
    assert capsys.readouterr().err == ""
    require_libraries("numpy", "json")
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_library'") as error:
        require_libraries("numpy", "no_such_library")
    assert missing_library(error.value) is None


def requirements() -> Iterator[str]:
    """As an installation has them: an extra that takes in others is written out, in the order of the alphabet."""
    yield from PROJECT["dependencies"]
    extras = PROJECT["optional-dependencies"]

    def written_out(extra: str) -> Iterator[str]:
        for line in extras[extra]:
            own = re.fullmatch(rf"{PROJECT['name']}\[(.+)\]", line)
            if own is None:
                yield line
            for other in own[1].split(",") if own else ():
                yield from written_out(other)

    for extra in sorted(extras):
        yield from (f'{line}; extra == "{extra}"' for line in sorted(set(written_out(extra))))


@pytest.mark.parametrize(
    ("library", "extra"),
    [
        ("numpy", ""),
        ("cvxpy", ""),
        ("torch", "lm"),
        ("yaml", "lm"),
        ("jsonargparse", "lm"),
        ("trl", "trl"),
        ("openai", "judge"),
        ("pytest", "test"),
        ("numpyro", None),
        ("reward", None),
    ],
)
def test_the_extra_of_a_library(library: str, extra: str | None) -> None:
    assert extra_of(library, requirements()) == extra


@pytest.mark.parametrize(("package", "extras"), [("theory", {""}), ("bandits", {""}), ("figures", {""}), ("lm", None)])
def test_every_library_that_a_package_imports_is_required(package: str, extras: set[str] | None) -> None:
    """By the base, or by an extra; theory, bandits and figures import nothing else as their modules are imported."""
    for path in (ROOT / package).rglob("*.py"):
        if path.stem.endswith("_test") or path.name == "conftest.py":
            continue
        tree = ast.parse(path.read_text())
        not_yet: list[ast.AST] = [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)]
        for branch in ast.walk(tree):
            if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING":
                not_yet += branch.body
        later = {id(n) for f in not_yet for n in ast.walk(f)}
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names):
                if name in ("theory", "bandits", "lm", "figures"):
                    continue
                extra = extra_of(name, requirements())
                assert extra is not None, f"{path}: nothing that pyproject.toml asks for brings {name}"
                assert extras is None or id(node) in later or extra in extras, f"{path} imports {name}"


def test_help_of_the_ledger_imports_next_to_nothing() -> None:
    code = "import sys, theory.__main__ as ledger\ntry: ledger.main(['--help'])\nexcept SystemExit: pass\n"
    code += "print(*sorted({'torch', 'sympy', 'scipy', 'hypothesis', 'numpy', 'cvxpy', 'rich'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert "--thorough" in shown
    assert shown.splitlines()[-1] == ""
