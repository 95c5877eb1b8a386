"""The mutation check works: its mutants differ from the losses, and it tells a wrong loss from the right one."""

from __future__ import annotations

import ast
import importlib
import os
import sys
from types import ModuleType

import pytest

import theory
from theory import losses, mutation
from theory.mutation import (
    DEFINITIONS,
    ROOT,
    SOURCE,
    TESTS,
    Mutant,
    Proof,
    in_fork,
    main,
    mutable,
    mutants,
    proofs_of,
    rejecting,
    run_tests,
    uncalled,
    users,
)

pytestmark = pytest.mark.slow

for name in ("cvxpy", "mpmath", "sympy", "scipy.optimize", "scipy.sparse.csgraph"):
    importlib.import_module(name)  # once, and not in each fork


@pytest.fixture(scope="module")
def found() -> list[Mutant]:
    return list(mutants(SOURCE.read_text()))


def test_every_function_of_the_losses_has_mutants_and_none_is_the_original(found: list[Mutant]) -> None:
    original = ast.parse(SOURCE.read_text())
    functions = [node.name for node in original.body if isinstance(node, ast.FunctionDef)]
    delegating = {"member_weights", "hull_weights"}  # one line that calls a primitive: nothing there to change
    assert mutable(SOURCE.read_text()) == [name for name in functions if name not in delegating]
    assert {mutant.function for mutant in found} == set(functions) - delegating
    dumps = [ast.dump(node) for node in original.body]
    others = {id(node): ast.dump(node) for node in found[0].tree.body}  # mutants share what they do not change
    for mutant in found:
        after = [others.get(id(node)) or ast.dump(node) for node in mutant.tree.body]
        assert [a.name for a, b, c in zip(original.body, dumps, after, strict=True) if b != c] == [mutant.function]  # type: ignore[attr-defined]
    assert len(found) > 100
    assert [m.change for m in mutants(SOURCE.read_text(), ["ipo"])] == [m.change for m in found if m.function == "ipo"]


def test_a_mutant_computes_something_else(found: list[Mutant]) -> None:
    [mutant] = [mutant for mutant in found if mutant.function == "forward_kl"]
    assert mutant.change == "-logratios -> logratios"
    assert mutant.module().forward_kl(2.0) == -losses.forward_kl(2.0) == 2.0


def test_the_tests_reject_a_mutant_and_accept_the_losses() -> None:
    def status(module: ModuleType | None) -> int:
        os.chdir(ROOT)
        for test in TESTS:  # one that is imported already has the losses as they are
            sys.modules.pop(test.removesuffix(".py").replace("/", "."), None)
        if module is not None:
            sys.modules["theory.losses"] = theory.losses = module
        return run_tests("test_ipo_distils_a_constant_margin")

    mutant = next(mutants(SOURCE.read_text(), ["ipo"]))
    assert [in_fork(lambda: status(None)), in_fork(lambda: status(mutant.module()))] == [0, 1]


def test_unknown_function(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "dqo"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --only dqo: theory.losses has no such function; it has logratio_margin, ")


# ---------------------------------------------------------------- proofs

LABELS = Proof("theory.propositions.deterministic_pairs", "drdo-lemma1b", ("dpo", "forward_kl"), 0)
"""It names forward_kl too, which it does not call."""
GRAPH = Proof("theory.propositions.ipo_spread", "prop7-graph", ("ipo",), 0)
SPREAD = Proof("theory.propositions.ipo_spread", "prop7", ("ipo",), 0)


def change(found: list[Mutant], function: str, what: str) -> Mutant:
    return next(mutant for mutant in found if mutant.function == function and mutant.change == what)


def test_whose_change_the_change_of_a_helper_is() -> None:
    of = users(SOURCE.read_text())
    assert of["dpo"] == {"dpo"}
    assert of["_ensemble_residuals"] == {"ensemble_gram"}
    assert of["_check_ensemble"] == {"ensemble_gram", "ensemble_min", "ensemble_hull"}
    assert users("def f(): g()\ndef _h(): f()\ndef g(): pass") == {"f": {"f"}, "_h": set(), "g": {"g"}}


def test_a_proof_rejects_what_it_is_about_and_nothing_else(found: list[Mutant]) -> None:
    unscaled = change(found, "dpo", "beta * margin -> margin")
    negated = change(found, "forward_kl", "-logratios -> logratios")
    assert rejecting(unscaled.put_into, [LABELS]) == LABELS
    assert rejecting(negated.put_into, [LABELS]) is None
    assert rejecting(unscaled.put_into, [GRAPH, LABELS]) == LABELS
    assert losses.dpo(0.0, beta=1.0) < 1, "nothing is left behind"


def test_a_change_reaches_what_a_module_computed_as_it_was_imported(found: list[Mutant]) -> None:
    """prop7 differentiates IPO once."""
    wider = change(found, "ipo", "1 / (2 * tau) -> 1")
    assert rejecting(wider.put_into, [SPREAD]) == SPREAD


def test_a_row_that_names_a_function_which_its_proof_does_not_call() -> None:
    assert list(uncalled([LABELS], ["dpo", "forward_kl", "ipo"])) == [("drdo-lemma1b", "forward_kl")]


@pytest.mark.thorough
def test_the_definitions_are_asked_last(found: list[Mutant]) -> None:
    proofs = proofs_of(["dpo"])
    assert proofs[-1].id == DEFINITIONS
    assert [proof.seconds for proof in proofs[:-1]] == sorted(proof.seconds for proof in proofs[:-1])
    assert all("dpo" in proof.losses for proof in proofs)


@pytest.mark.thorough
def test_every_mutant_of_two_functions_is_noticed_by_a_proof(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--proofs", "--only", "forward_kl", "--only", "dpo"]) == 0
    shown = capsys.readouterr().out
    assert "5 mutants in " in shown
    assert "s: proofs notice 5 (" in shown


@pytest.mark.parametrize("tests", ["tests only", "nothing"])
def test_a_mutant_that_no_proof_notices(
    tests: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mutation, "proofs_of", lambda functions: [LABELS])
    monkeypatch.setattr(mutation, "uncalled", lambda proofs, functions: [])
    monkeypatch.setattr(mutation, "prepare_tests", lambda: None)
    monkeypatch.setattr(mutation, "accepted", lambda module, function: tests == "nothing")
    assert main(["--proofs", "--only", "forward_kl"]) == 1
    line = next(mutant.line for mutant in mutants(SOURCE.read_text()) if mutant.function == "forward_kl")
    shown = capsys.readouterr().out
    assert f"accepted by 1 proofs, noticed by {tests}, line {line}: -logratios -> logratios" in shown
    assert f"proofs notice 0 (0 a theorem), tests {int(tests == 'tests only')} of the others" in shown


@pytest.mark.thorough
def test_a_row_that_names_too_much_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    definitions = proofs_of(["forward_kl"])[-1]
    monkeypatch.setattr(mutation, "proofs_of", lambda functions: [LABELS, definitions])
    assert main(["--proofs", "--only", "forward_kl"]) == 1
    assert "drdo-lemma1b names forward_kl, but its proof does not call it" in capsys.readouterr().out
