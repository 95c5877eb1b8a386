"""The ledger command: what it writes, when it fails, what it refuses; and that the README shows the present ledger."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rich.console import Console

import theory.__main__ as ledger
from theory import records
from theory.claim import CheckFailed, Claim, all_claims, complete, loss_names, require, run, verdict
from theory.testing import claim_tests, is_thorough

pytestmark = pytest.mark.slow

README = Path(__file__).with_name("README.md")
IDS = """prop1 prop1-scc cor1 thm1 thm1-connected thm2 thm2-hull prop2 prop3 prop4 prop4-pdpo prop5 prop6 prop7
prop7-graph mass-transfer drdo-prop drdo-sampling drdo-lemma1a drdo-lemma1b drdo-lemma1c drdo-lemma2 drdo-focal"""


@given(st.integers(0, 10**6))
def squares(n: int) -> None:
    assume(n % 2)
    assert n * n % 8 == 1


@given(st.integers(0, 10**6))
def wrong(n: int) -> None:
    assert n * n % 8 == 1


def reject() -> None:
    raise CheckFailed("as it should")


def without_torch() -> Any:
    """As `import torch` ends where it is not installed."""
    raise ModuleNotFoundError("No module named 'torch'", name="torch")


@given(st.integers())
def on_tensors(n: int) -> None:
    without_torch()


def claim(**changes: Any) -> Claim:
    """A claim that holds, with changes."""
    parts: dict[str, Any] = {
        "id": "odd-squares",
        "source": "[F] A.1 | a test",
        "statement": "Odd squares are 1 modulo 8.",
        "formula": r"(2k+1)^2\equiv 1",
        "domain": "whole numbers",
        "no_losses": "it is about numbers",
        "assumptions": {"odd": "n is odd"},
        "prove": lambda: require(True, "proof"),
        "counterexamples": {"odd": lambda: "4"},
        "controls": {"modulo 7": reject, "without odd": reject},
        "enumerate": lambda thorough: "n < 9" if not thorough else "n < 99",
    }
    return Claim(**(parts | changes))


@pytest.fixture
def claims(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Claim]]:
    """The claims that the command finds; the profile that it loads ends with the test."""
    found = [claim()]
    monkeypatch.setattr(ledger, "all_claims", lambda: iter(found))
    profile = settings.get_current_profile_name()
    yield found
    settings.load_profile(profile)


# ---------------------------------------------------------------- the rows


def test_row_of_a_claim_that_holds() -> None:
    row = run(claim(properties=(squares,)), thorough=False)
    assert (row.verdict, row.symbolic, row.enumerated, row.counterexample) == ("holds", True, "n < 9", None)
    assert row.examples == settings().max_examples
    assert run(claim(), thorough=True).enumerated == "n < 99"
    assert run(claim(sharpens=True), thorough=False).verdict == "holds as sharpened"
    broken = run(claim(sharpens=True, printed=lambda: "n = 2"), thorough=False)
    assert (broken.verdict, broken.counterexample) == ("fails as printed", "n = 2")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"prove": reject}, "proof: CheckFailed: as it should"),
        ({"prove": lambda: 1 / 0}, "proof: ZeroDivisionError"),
        ({"enumerate": lambda thorough: reject()}, "enumeration: CheckFailed"),
        ({"counterexamples": {"odd": reject}}, "counterexample without odd: CheckFailed"),
        ({"counterexamples": {}}, "counterexamples [] are not those of the assumptions ['odd']"),
        (
            {"controls": {"without odd": lambda: None}},
            "control without odd: AssertionError: the wrong variant was accepted",
        ),
        ({"controls": {"without odd": lambda: 1 / 0}}, "control without odd: ZeroDivisionError"),
        ({"properties": (wrong,)}, "property wrong: AssertionError"),
        ({"printed": reject}, "search for a counterexample to the printed form: CheckFailed"),
    ],
)
def test_any_failing_check_takes_the_verdict_away(changes: dict[str, Any], error: str) -> None:
    row = run(claim(**changes), thorough=False)
    assert row.verdict is None
    assert row.errors[0].startswith(error)
    assert row.symbolic == ("prove" not in changes)


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        ({}, []),
        ({"formula": " "}, ["it has no formula"]),
        ({"formula": "\text"}, ["its formula has a control character: a raw string?"]),
        ({"domain": ""}, ["it has no domain"]),
        ({"no_losses": ""}, ["it names no losses, and `no_losses` does not say why"]),
        ({"losses": ("dpo",)}, ["it names losses, but `no_losses` says why it has none: it is about numbers"]),
        ({"losses": ("dpo", "ipo"), "no_losses": ""}, []),
        (
            {"losses": ("dqo", "_ensemble", "shape_of"), "no_losses": ""},
            ["theory.losses has no function _ensemble, dqo, shape_of"],
        ),
        (
            {"assumptions": {"odd": "n is odd", "positive": "n > 0"}},
            [
                "counterexamples ['odd'] are not those of the assumptions ['odd', 'positive']",
                "no control `without positive`: its check on an instance that violates only that",
            ],
        ),
        (
            {"assumptions": {}, "counterexamples": {}, "controls": {}},
            ["it has no wrong variant that its checks reject"],
        ),
    ],
)
def test_what_a_row_must_have(changes: dict[str, Any], problems: list[str]) -> None:
    assert complete(claim(**changes)) == problems
    row = run(claim(**changes), thorough=False)
    assert row.errors == problems
    assert row.verdict == (None if problems else "holds")


def test_the_losses_that_a_row_may_name() -> None:
    names = loss_names()
    assert names[0] == "logratio_margin"
    assert {"dpo", "ipo", "hull_weights", "drdo_oracle"} <= set(names)
    assert not {"shape_of", "_ensemble", "Any", "Scalar"} & set(names)


@pytest.mark.parametrize(
    ("changes", "not_run", "left"),
    [
        ({"properties": (squares, on_tensors)}, "property on_tensors", "holds"),
        ({"controls": {"without odd": reject, "a": without_torch}}, "control a", "holds"),
        ({"counterexamples": {"odd": without_torch}}, "counterexample without odd", "holds"),
        ({"enumerate": lambda thorough: without_torch()}, "enumeration", "holds"),
        ({"prove": without_torch}, "proof", None),
        ({"printed": without_torch}, "search for a counterexample to the printed form", None),
    ],
)
def test_without_torch_a_check_is_not_run_which_is_no_failure(
    changes: dict[str, Any], not_run: str, left: str | None
) -> None:
    row = run(claim(**changes), thorough=False)
    assert row.not_run == [f"{not_run}: not run: torch is not installed"]
    assert row.errors == []
    assert row.verdict == left
    assert ledger.verdict_of(row, "{}") == f"{left or 'undecided'}; 1 check not run: torch is not installed"


def test_another_missing_library_is_a_failure() -> None:
    def check() -> None:
        raise ModuleNotFoundError("No module named 'sympy'", name="sympy")

    row = run(claim(prove=check), thorough=False)
    assert row.errors == ["proof: ModuleNotFoundError: No module named 'sympy'"]
    assert row.not_run == []


@pytest.mark.parametrize(
    "changes",
    [
        {"statement": " "},
        {"domain": ""},
        {"formula": "\text"},
        {"controls": {}},
        {"prove": reject},
        {"counterexamples": {"odd": reject}},
        {"controls": {"without odd": lambda: None}},
        {"properties": (wrong,)},
        {"printed": lambda: None},
        {"enumerate": lambda thorough: ""},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_pytest_fails_where_the_ledger_does(changes: dict[str, Any]) -> None:
    failures = 0
    for test in claim_tests([claim(**changes)]).values():
        try:
            test()
        except (AssertionError, CheckFailed):
            failures += 1
    assert failures == 1


def test_pytest_passes_where_the_ledger_does() -> None:
    for test in claim_tests([claim(properties=(squares,))]).values():
        test()


def test_two_checks_of_one_name() -> None:
    with pytest.raises(
        ValueError, match="two checks are called test_odd_squares_rejects_a_b: rename one of odd-squares's"
    ):
        claim_tests([claim(controls={"a b": reject, "a-b": reject})])


@pytest.mark.parametrize("undecided", [False, None, 1, "yes", st.nothing()])
def test_require_takes_nothing_but_true(undecided: object) -> None:
    with pytest.raises(CheckFailed, match="not shown"):
        require(undecided, "not shown")


# ---------------------------------------------------------------- the command


def test_files_and_exit_status(claims: list[Claim], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong_variant = {"without odd": reject, "modulo 7": lambda: None}
    claims[:] = [claim(properties=(squares,))]
    claims.append(claim(id="broken", source="[N] eq 1", properties=(on_tensors,), controls=wrong_variant))
    files = tmp_path / "ledger.json", tmp_path / "ledger.md"
    assert ledger.main(["--json", str(files[0]), "--markdown", str(files[1])]) == 1
    output = capsys.readouterr()
    told = " ".join(output.err.split())
    assert "1 check failed; 1 check not run: torch is not installed" in " ".join(output.out.split())
    assert "broken: control modulo 7: AssertionError: the wrong variant was accepted" in told
    assert "broken: property on_tensors: not run: torch is not installed" in told
    assert sorted(tmp_path.iterdir()) == sorted(files), "nothing else is left behind"

    good, bad = json.loads(files[0].read_text())
    seconds = good.pop("seconds")
    assert isinstance(seconds, float)
    assert good == {
        "id": "odd-squares",
        "source": "[F] A.1 | a test",
        "assumptions": ["odd"],
        "domain": "whole numbers",
        "losses": [],
        "symbolic": True,
        "enumerated": "n < 9",
        "examples": settings().max_examples,
        "verdict": "holds",
        "counterexample": None,
        "not_run": [],
    }
    assert bad["verdict"] is None
    assert bad["not_run"] == ["property on_tensors: not run: torch is not installed"]
    text = files[1].read_text()
    assert r"| [odd-squares](#odd-squares) | [F] A.1 \| a test | yes | n < 9 |" in text
    assert "| **1 check failed**; 1 check not run: torch is not installed |" in text
    end = "Needs *odd*: n is odd.\nDomain: whole numbers. Proved of no loss: it is about numbers.\n"
    assert f"$$(2k+1)^2\\equiv 1$$\n\n{end}" in text

    del claims[1]
    assert ledger.main([]) == 0


@pytest.mark.parametrize("jobs", ["1", "2", "3"])
def test_rows_are_in_order_and_the_same_from_any_number_of_processes(
    claims: list[Claim], jobs: str, tmp_path: Path
) -> None:
    def where(thorough: bool) -> str:
        time.sleep(0.2)
        return str(os.getpid())

    file = tmp_path / "ledger.json"
    claims[:] = [claim(id=name, source="ours", enumerate=where) for name in "abcd"]
    claims.append(claim(id="e", source="ours"))
    assert ledger.main(["--jobs", jobs, "--json", str(file)]) == 0
    *slow, last = json.loads(file.read_text())
    assert [row["id"] for row in (*slow, last)] == list("abcde")
    assert {row["verdict"] for row in (*slow, last)} == {"holds"}
    assert last["enumerated"] == "n < 9", "the profile and what the option says reach the forks"
    processes = {row["enumerated"] for row in slow}
    assert processes == {str(os.getpid())} if jobs == "1" else str(os.getpid()) not in processes


def test_a_fork_that_dies_is_a_failure_in_a_line(claims: list[Claim], capsys: pytest.CaptureFixture[str]) -> None:
    claims.append(claim(id="killed", prove=lambda: os._exit(3)))
    assert ledger.main(["--jobs", "2"]) == 1
    assert "error: killed: its process ended with status 3" in capsys.readouterr().err
    assert not multiprocessing.active_children()


def test_an_interrupt_ends_all_forks(claims: list[Claim], capsys: pytest.CaptureFixture[str]) -> None:
    """As by Ctrl-C, which every process of a terminal hears."""

    def interrupt() -> None:
        for process in (os.getpid(), os.getppid()):
            os.kill(process, signal.SIGINT)
        time.sleep(60)

    claims[:] = [claim(id="slow", prove=lambda: time.sleep(60)), claim(id="interrupts", prove=interrupt)]
    assert ledger.main(["--jobs", "2"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_says_what_is_done_and_what_is_being_checked(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "LINE_SECONDS", 0)
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    with ledger.bar(console, 9) as checking:
        checking(7, ["prop1", "thm2"])
        shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert ("7/9" if terminal else "7 of 9 done; ") in shown
    assert "checking prop1, thm2" in shown


def test_only_and_thorough(claims: list[Claim], tmp_path: Path) -> None:
    claims.append(claim(id="other"))
    file = tmp_path / "ledger.json"
    assert ledger.main(["--only", "other", "--thorough", "--json", str(file)]) == 0
    [row] = json.loads(file.read_text())
    assert (row["id"], row["enumerated"]) == ("other", "n < 99")
    assert settings().max_examples >= 10_000
    ledger.main(["--only", "other", "--examples", "7"])
    assert settings().max_examples == 7
    claims.append(claim(id="third"))
    for names in (["--only", "other,third"], ["--only", "other", "--only", "third"]):
        assert ledger.main([*names, "--json", str(file), "--force"]) == 0
        assert [row["id"] for row in json.loads(file.read_text())] == ["other", "third"]


def test_markdown_goes_between_markers(claims: list[Claim], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "README.md"
    file.write_text(f"before\n{ledger.START}\nstale\n{ledger.END}\nafter\n")
    assert ledger.main(["--markdown", str(file)]) == 0
    text = file.read_text()
    assert text.startswith(f"before\n{ledger.START}\n| statement |")
    assert text.endswith(f"{ledger.END}\nafter\n")
    assert "stale" not in text
    assert ledger.main(["--only", "odd-squares", "--markdown", str(file)]) == 2
    assert f"would leave statements out of the ledger in {file}" in capsys.readouterr().err
    assert file.read_text() == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--examples", "0"], "argument --examples: '0' is no positive whole number"),
        (["--examples", "many"], "argument --examples: 'many' is no positive whole number"),
        (["--json", "no/such/ledger.json"], "argument --json: no/such/ledger.json: there is no folder no/such"),
        (["--markdown", "/"], "argument --markdown: / is a folder; a file is needed"),
        (["--force"], "--force goes with --json or --markdown"),
    ],
)
def test_bad_arguments(
    claims: list[Claim], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        ledger.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--json", "--markdown"])
def test_a_file_that_is_there_is_overwritten_by_force_alone(
    claims: list[Claim], option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "ledger"
    file.write_text("kept")
    claims[:] = [claim(prove=lambda: file.write_text("computed"))]
    said = f"error: {option} {file} exists; name another file, or remove it, or overwrite it by --force\n"
    assert ledger.main([option, str(file)]) == 2
    assert (capsys.readouterr().err, file.read_text()) == (said, "kept")
    assert ledger.main([option, str(file), "--force"]) == 0
    assert "odd-squares" in file.read_text()


def test_an_unknown_statement(claims: list[Claim], capsys: pytest.CaptureFixture[str]) -> None:
    assert ledger.main(["--only", "prop99"]) == 2
    assert capsys.readouterr().err == "error: --only prop99: no such statement; there are odd-squares\n"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "ledger.json"
    file.write_text("old")

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="disk full"):
        records.write_text(file, "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_the_command_as_users_run_it(tmp_path: Path) -> None:
    file = tmp_path / "ledger.json"
    command = [sys.executable, "-m", "theory", "--only", "drdo-prop", "--examples", "5", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=README.parents[1], check=True)
    [row] = json.loads(file.read_text())
    assert list(row) == list(ledger.FIELDS)
    assert (row["id"], row["verdict"], row["symbolic"]) == ("drdo-prop", "holds", True)
    assert row["examples"] == 5 * len(next(c for c in all_claims() if c.id == "drdo-prop").properties)
    assert "drdo-prop" in done.stdout


# ---------------------------------------------------------------- the statements


def test_every_statement_of_both_papers_is_there_once() -> None:
    ids = [claim.id for claim in all_claims()]
    assert len(set(ids)) == len(ids)
    assert set(IDS.split()) <= set(ids)


def test_readme_shows_the_present_ledger() -> None:
    """Ids, sources, statements and verdicts; the verdicts by running all checks where there is time for it.

    Else as they follow when every check passes, which the test files of the propositions establish.
    """
    shown = re.search(f"{ledger.START}\n(.*){ledger.END}", README.read_text(), flags=re.DOTALL)
    assert shown is not None
    claims = sorted(all_claims(), key=ledger.paper_order)
    rows = {
        claim.id: run(claim, thorough=True).verdict if is_thorough() else verdict(claim, claim.printed and "found")
        for claim in claims
    }
    in_readme = dict(re.findall(r"^\| \[([\w-]+)\].*\| (holds as sharpened|holds|fails as printed)\b", shown[1], re.M))
    assert in_readme == rows
    assert list(in_readme) == list(rows)
    statements = shown[1][shown[1].index("\n#### ") + 1 :]
    assert statements == ledger.markdown(claims, []).split("\n\n", 1)[1]
