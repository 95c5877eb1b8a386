"""The command writes the table where it belongs; what the page shows is checked beside the claim."""

from __future__ import annotations

from pathlib import Path

import pytest

from theory import fates
from theory.propositions import loss_fates

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cells() -> list[loss_fates.Cell]:
    """Of a table that nobody has checked."""
    return [
        loss_fates.Cell(loss=subject.name, fate=fate, answer=shown_by.answer, found="", evidence=shown_by)
        for subject in loss_fates.subjects()
        for fate, shown_by in zip(loss_fates.FATES, subject.cells, strict=True)
    ]


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
