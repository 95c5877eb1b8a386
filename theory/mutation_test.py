"""The mutation check works: its mutants differ from the losses, and it tells a wrong loss from the right one."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from theory import losses
from theory.mutation import ROOT, SOURCE, Mutant, main, mutants


@pytest.fixture(scope="module")
def found() -> list[Mutant]:
    return list(mutants(SOURCE.read_text()))


def test_every_function_of_the_losses_has_mutants_and_none_is_the_original(found: list[Mutant]) -> None:
    original = ast.parse(SOURCE.read_text())
    functions = {node.name for node in original.body if isinstance(node, ast.FunctionDef)}
    delegating = {"member_weights", "hull_weights"}  # one line that calls a primitive: nothing there to change
    assert {mutant.function for mutant in found} == functions - delegating
    assert ast.dump(original) not in {ast.dump(mutant.tree) for mutant in found}
    assert len(found) > 100


def test_a_mutant_computes_something_else(found: list[Mutant]) -> None:
    [mutant] = [mutant for mutant in found if mutant.function == "forward_kl"]
    assert mutant.change == "-logratios -> logratios"
    assert mutant.module().forward_kl(2.0) == -losses.forward_kl(2.0) == 2.0


def test_the_tests_reject_a_mutant_and_accept_the_losses() -> None:
    code = """
import theory, sys, cvxpy, sympy
from theory.mutation import SOURCE, in_fork, mutants, run_tests
def status(module):
    if module is not None:
        sys.modules["theory.losses"] = theory.losses = module
    return run_tests("test_ipo_distils_a_constant_margin")
mutant = next(m for m in mutants(SOURCE.read_text()) if m.function == "ipo")
print(in_fork(lambda: status(None)), in_fork(lambda: status(mutant.module())))
"""
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert got.stdout.split() == ["0", "1"]


def test_unknown_function(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "dqo"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --only dqo: theory.losses has no such function; it has logratio_margin, ")
