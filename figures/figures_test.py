"""Every committed result redraws; names, files and failures of `python -m figures`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from figures.__main__ import main
from figures.paths import RESULTS, write_atomically
from figures.registry import modules, redraw

BANDITS = ("figure_1", "figure_b2", "degeneration")
COMMITTED = [name for name, module in modules().items() if (RESULTS / module.RESULTS).exists()]


def test_bandit_results_are_committed_with_provenance() -> None:
    assert set(BANDITS) <= set(COMMITTED)
    for name in BANDITS:
        provenance = json.loads((RESULTS / modules()[name].RESULTS).read_text())["provenance"]
        assert {"config", "seed", "versions", "commit", "machine", "date"} <= set(provenance)
        assert provenance["commit"] is not None


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in BANDITS else [pytest.mark.thorough]) for name in COMMITTED]
)
def test_redraws(name: str, tmp_path: Path) -> None:
    png, pdf = redraw(name, tmp_path)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert pdf.read_bytes().startswith(b"%PDF")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.pdf", f"{name}.png"]


def test_same_results_same_files(tmp_path: Path) -> None:
    first, second = redraw("figure_1", tmp_path / "a"), redraw("figure_1", tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["figure_1", "--out", str(tmp_path)]) == 0
    assert str(tmp_path / "figure_1.pdf") in capsys.readouterr().out
    assert main(["figure_9", "figure_1", "--out", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: no figure named figure_9; there are")
    assert not shown.out, "nothing is drawn where a name is wrong"
    with pytest.raises(ValueError, match=r"no figure named 'figure_9'; there are .*figure_1"):
        redraw("figure_9", tmp_path)


def test_missing_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("figures.registry.RESULTS", tmp_path)
    assert main(["figure_1", "--out", str(tmp_path)]) == 1
    assert "figure_1.json, which does not exist: run its experiment first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("{", "JSONDecodeError: "),
        ("[]", "TypeError: "),
        ('{"results": {}}', "KeyError: "),
    ],
)
def test_broken_results(
    broken: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("figures.registry.RESULTS", tmp_path)
    (tmp_path / "figure_1.json").write_text(broken)
    (tmp_path / "figure_b2.json").write_bytes((RESULTS / "figure_b2.json").read_bytes())
    out = tmp_path / "drawn"
    assert main(["figure_1", "figure_b2", "--out", str(out)]) == 1
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert line.startswith(f"error: figure figure_1 is drawn from {tmp_path / 'figure_1.json'}, which is not what")
    assert said in line
    assert sorted(path.name for path in out.iterdir()) == ["figure_b2.pdf", "figure_b2.png"], "the others are drawn"
    assert main(["figure_1", "--out", str(out), "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_out_must_be_a_folder_that_can_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    assert main(["figure_1", "figure_b2", "--out", str(file)]) == 2
    assert main(["figure_1", "--out", str(file / "inner")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert file.read_text() == "kept"

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "there")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    assert main(["figure_1", "figure_b2", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "error: [Errno 13] Permission denied: 'there'\n", "said once"


def test_nothing_half_written(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError("full disk")

    with pytest.raises(RuntimeError, match="full disk"):
        write_atomically(tmp_path / "a.json", fail)
    assert not list(tmp_path.iterdir())
