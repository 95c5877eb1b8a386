"""Every committed result redraws; names, files and failures of `python -m figures`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from figures.__main__ import main
from figures.captions import WHERE, latex
from figures.paths import RESULTS, write_atomically
from figures.registry import modules, redraw
from figures.style import STYLES, style

BANDITS = ("figure_1", "figure_b2", "degeneration")
COMMITTED = [name for name, module in modules().items() if (RESULTS / module.RESULTS).exists()]


def test_bandit_results_are_committed_with_provenance() -> None:
    assert set(BANDITS) <= set(COMMITTED)
    for name in BANDITS:
        provenance = json.loads((RESULTS / modules()[name].RESULTS).read_text())["provenance"]
        assert {"config", "seed", "versions", "commit", "machine", "date"} <= set(provenance)
        assert provenance["commit"] is not None


of_committed = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in BANDITS else [pytest.mark.thorough]) for name in COMMITTED]
)


@of_committed
def test_redraws(name: str, tmp_path: Path) -> None:
    written = redraw(name, tmp_path)
    png, pdf, svg, caption, *more = written
    assert png.read_bytes().startswith(b"\x89PNG")
    assert pdf.read_bytes().startswith(b"%PDF")
    assert "<svg " in svg.read_text()
    said_well(caption.read_text())
    assert sorted(tmp_path.iterdir()) == sorted(written)
    assert [path.suffix for path in more] == ([".tex", ".csv"] if name == "table_1" else [])


@of_committed
def test_what_is_written_into_a_figure(name: str) -> None:
    module, path = modules()[name], RESULTS / modules()[name].RESULTS
    results = module.READ(path) if hasattr(module, "READ") else json.loads(path.read_text())
    with style():
        figure = module.draw(results)
    written = [text.get_text() for text in figure.findobj(Text)]
    assert len(" ".join(written)) > 50
    for text in written:
        said_well(text.replace("\N{MINUS SIGN}", "-"))
    caption = module.caption(results)
    assert not [text for text in written if len(text) > 40 and text in caption], "it is beside the figure"


def said_well(text: str) -> None:
    """What every caption keeps to."""
    assert text.isascii(), "Greek is mathematics"
    outside = re.sub(r"\$[^$]+\$", "", text)
    assert "$" not in outside
    assert not re.search(r"pi_|_ref|\balpha\b|\bbeta\b|\brho\b|\btau\b", outside), "symbols are typeset"
    assert not re.search(r"\b(lost|our copy|copy)\b", outside), "of what a copy of a paper lacks nothing is said"


@pytest.mark.parametrize("name", STYLES)
def test_same_results_same_files(name: str, tmp_path: Path) -> None:
    first, second = (redraw("figure_1", tmp_path / folder, style=name) for folder in "ab")
    assert [path.suffix for path in first] == [".png", ".pdf", ".svg", ".md"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_a_style_is_as_wide_as_it_says(tmp_path: Path) -> None:
    for name, this in STYLES.items():
        assert width_of(redraw("figure_b2", tmp_path / name, style=name)[2]) == pytest.approx(72 * this.double)
        assert width_of(redraw("figure_1", tmp_path / name, style=name)[2]) == pytest.approx(72 * this.single)
    assert STYLES["slides"].small > 1.5 * STYLES["paper"].font
    with pytest.raises(ValueError, match="no style named poster; there are paper, slides"):
        redraw("figure_1", tmp_path, style="poster")


def width_of(svg: Path) -> float:
    found = re.search(r'<svg [^>]*?width="([\d.]+)pt"', svg.read_text())
    assert found is not None
    return float(found[1])


def test_fonts_are_embedded_as_outlines_of_their_own(tmp_path: Path) -> None:
    pdf = redraw("figure_1", tmp_path)[1].read_bytes()
    assert b"/FontFile2" in pdf
    assert b"/Type3" not in pdf
    assert b"/CreationDate" not in pdf


def test_captions_are_beside_the_figure_and_in_it_where_asked(tmp_path: Path) -> None:
    module, results = modules()["figure_1"], json.loads((RESULTS / "figure_1.json").read_text())
    text = module.caption(results)
    drawn: list[str] = []

    def kept(self: Figure, *_: object, **__: object) -> None:
        drawn.append(" ".join(found.get_text() for found in self.findobj(Text)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", kept)
        written = {where: redraw("figure_1", tmp_path / where, captions=where)[3:] for where in WHERE}
    assert [len(files) for files in written.values()] == [1, 1, 0, 0]
    assert written["md"][0].read_text() == text + "\n"
    assert written["tex"][0].read_text() == latex(text) + "\n"
    by_place = dict(zip(WHERE, drawn[::3], strict=True))
    assert {where for where, words in by_place.items() if "sketch of the same" in words} == {"inside"}
    with pytest.raises(ValueError, match="no captions below; there are md, tex, inside, none"):
        redraw("figure_1", tmp_path, captions="below")


def test_every_figure_has_a_caption() -> None:
    assert {"frontier", "real_text"} <= set(modules())
    for name, module in modules().items():
        assert callable(getattr(module, "caption", None)), name


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["figure_1", "--out", str(tmp_path)]) == 0
    assert str(tmp_path / "figure_1.pdf") in capsys.readouterr().out
    assert main(["figure_9", "figure_1", "--out", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: no figure named figure_9; there are")
    assert not shown.out, "nothing is drawn where a name is wrong"
    with pytest.raises(ValueError, match=r"no figure named 'figure_9'; there are .*figure_1"):
        redraw("figure_9", tmp_path)
    for option, given, said in (
        ("--style", "poster", "error: no style named poster; there are paper, slides"),
        ("--captions", "below", "error: no captions below; there are md, tex, inside, none"),
    ):
        assert main(["figure_1", option, given, "--out", str(tmp_path / given)]) == 2
        assert capsys.readouterr().err == f"{said}\n"
        assert not (tmp_path / given).exists()


def test_without_names_what_has_results_is_drawn_and_the_rest_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("figures.registry.RESULTS", tmp_path)
    assert main(["--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == f"error: there are no results in {tmp_path}\n"
    (tmp_path / "figure_b2.json").write_bytes((RESULTS / "figure_b2.json").read_bytes())
    assert main(["--out", str(tmp_path / "out"), "--style", "slides", "--captions", "none"]) == 0
    shown = capsys.readouterr()
    assert f"frontier is not drawn: there is no {tmp_path / 'study.json'} yet" in shown.err.splitlines()
    assert len(shown.err.splitlines()) == len(modules()) - 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"figure_b2.{s}" for s in ("pdf", "png", "svg")
    ]


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
    assert sorted(path.name for path in out.iterdir()) == [
        f"figure_b2.{s}" for s in ("caption.md", "pdf", "png", "svg")
    ]
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
