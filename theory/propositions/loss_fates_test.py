"""The claim, and the page of the losses, which shows the table as the checks fill it now."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from theory import fates, losses
from theory.claim import CheckFailed
from theory.propositions import loss_fates
from theory.propositions.loss_fates import CLAIMS
from theory.testing import claim_tests

pytestmark = pytest.mark.slow
globals().update(claim_tests(CLAIMS))

PAGE = Path(__file__).parents[2] / "docs" / "losses.md"


@pytest.fixture(scope="module")
def cells() -> Sequence[loss_fates.Cell]:
    return loss_fates.table()


def test_the_page_shows_what_is_checked_now(cells: Sequence[loss_fates.Cell]) -> None:
    shown = re.search(f"{fates.START}\n(.*){fates.END}", PAGE.read_text(), flags=re.DOTALL)
    assert shown is not None
    assert shown[1] == fates.markdown(cells), "run: python -m theory.fates --markdown docs/losses.md"


def test_every_cell_links_to_a_paragraph(cells: Sequence[loss_fates.Cell]) -> None:
    text = fates.markdown(cells)
    [_, _, *rows], paragraphs = text[: text.index("\n\n")].splitlines(), re.findall(r"^#### (.*)$", text, re.M)
    assert len(rows) == len(loss_fates.subjects())
    links = [re.findall(r"\]\(#([a-z-]+)\)", row) for row in rows]
    assert {len(of_row) for of_row in links} == {len(loss_fates.FATES)}
    assert {link for of_row in links for link in of_row} == set(paragraphs)
    assert len(set(paragraphs)) == len(paragraphs)


def test_all_evidence_is_used_and_every_loss_of_the_module_is_there() -> None:
    rows = loss_fates.subjects()
    assert {of_cell for row in rows for of_cell in row.cells} == set(loss_fates.EVIDENCE)
    of_pairs = {name for row in rows for name in row.functions}
    assert of_pairs >= set("dpo ipo distillation cdpo robust_dpo hinge dpo_nll dpop simpo rdpo sppo_hard nca".split())


def test_nothing_that_is_kept_outlives_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, true = loss_fates.subjects(), losses.hinge
    assert loss_fates.subjects() is rows
    monkeypatch.setattr(losses, "hinge", lambda margin, *, beta: true(2 * margin, beta=beta))
    [changed] = [row for row in loss_fates.subjects() if row.functions == ("hinge",)]
    [kept] = [row for row in rows if row.functions == ("hinge",)]
    assert changed is not kept
    assert loss_fates.named(changed.name) is changed
    with pytest.raises(CheckFailed, match=r"hinge \(SLiC\): dL/du_w is not"):
        loss_fates.check_slopes(changed)
    monkeypatch.undo()
    assert loss_fates.subjects() is rows


def test_an_optimum_on_a_bend_is_told_from_another_point() -> None:
    """Of DPOP, whose second winner keeps the reference's probability here: no root of the slopes, and a minimum."""
    example = loss_fates.Example(ref=(0.4, 0.3, 0.2, 0.1), alpha=3.0, weights=(0.5, 0.5)).closed
    subject, cone = loss_fates.named("DPOP"), loss_fates.CONES["DPOP"]
    with pytest.raises(CheckFailed, match="no optimum found"):
        loss_fates.fitted(subject, example)
    loss_fates._check_against_clarabel(subject, example, cone)
    u = np.array([0.2762059, 0.0, -0.9634385, -0.0362846])
    loss_fates._check_on_a_bend(subject, example, u, [1])
    with pytest.raises(CheckFailed, match="the optimum on a bend is off by"):
        loss_fates._check_on_a_bend(subject, example, u + np.array([0.0, 0.0, 0.01, -0.02]), [1])
