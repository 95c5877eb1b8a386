"""The page of the losses shows the table as the checks fill it now, and the command writes it where it belongs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from theory import fates
from theory.propositions import loss_fates

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[1] / "docs" / "losses.md"


@pytest.fixture(scope="module")
def cells() -> list[loss_fates.Cell]:
    return loss_fates.table()


def test_the_page_shows_what_is_checked_now(cells: list[loss_fates.Cell]) -> None:
    shown = re.search(f"{fates.START}\n(.*){fates.END}", PAGE.read_text(), flags=re.DOTALL)
    assert shown is not None
    assert shown[1] == fates.markdown(cells), "run: python -m theory.fates --markdown docs/losses.md"


def test_every_cell_links_to_a_paragraph(cells: list[loss_fates.Cell]) -> None:
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


def test_the_command(
    tmp_path: Path, cells: list[loss_fates.Cell], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fates, "table", lambda: cells)
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    page.write_text(f"before\n{fates.START}\nold\n{fates.END}\nafter\n")
    assert fates.main(["--markdown", str(page)]) == fates.main(["--markdown", str(other)]) == fates.main([]) == 0
    assert page.read_text() == f"before\n{fates.START}\n{fates.markdown(cells)}{fates.END}\nafter\n"
    assert other.read_text() == fates.markdown(cells) == capsys.readouterr().out
    for mistaken in (["--markdown", str(tmp_path / "none" / "page.md")], ["--force"]):
        with pytest.raises(SystemExit, match="2"):
            fates.main(mistaken)


def test_a_file_without_markers_is_overwritten_by_force_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fates, "table", list)
    monkeypatch.setattr(fates, "markdown", lambda cells: "new")
    file = tmp_path / "page.md"
    file.write_text("kept")
    assert fates.main(["--markdown", str(file)]) == 2
    assert f"--markdown {file} exists; name another file, or remove it" in capsys.readouterr().err
    assert file.read_text() == "kept"
    assert fates.main(["--markdown", str(file), "--force"]) == 0
    assert file.read_text() == "new"
