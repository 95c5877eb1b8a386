"""The site's pages: plain files with links that work, nothing from elsewhere, figures drawn from what is there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs import pages as site
from figures.paths import RESULTS
from figures.registry import modules

ROOT = Path(__file__).parents[1]
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
PAGES = {name: path for name, path in site.pages().items() if name.endswith(".md")}
CODE = re.compile(r"^```.*?^```$|(?<!`)`[^`\n]+`(?!`)", re.MULTILINE | re.DOTALL)
of_every_page = pytest.mark.parametrize("name", PAGES)


def prose(name: str) -> str:
    """A page without its code: `x` in a line, nothing for a block."""
    return CODE.sub(lambda code: "" if "\n" in code[0] else "x", PAGES[name].read_text(encoding="utf-8"))


# ---------------------------------------------------------------- plain files


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A small repository with the pages that every one has."""
    for source in site.SOURCES.values():
        (tmp_path / source).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / source).write_text(f"# {source}\n")
    (tmp_path / "docs" / "api").mkdir(parents=True)
    (tmp_path / "docs" / "figures").mkdir()
    (tmp_path / "docs" / "figures" / "a.png").write_bytes(b"\x89PNG")
    (tmp_path / "docs" / "one.md").write_text("# One\n")
    (tmp_path / "docs" / "api" / "two.md").write_text("# Two\n")
    (tmp_path / "theory" / "losses.py").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("page", "text", "shown"),
    [
        ("index.md", "[a](docs/one.md#x)", "[a](one.md#x)"),
        ("one.md", "[a](../theory/README.md)", "[a](theory.md)"),
        ("one.md", "[the folder](../theory/)", "[the folder](theory.md)"),
        ("one.md", "[`code`](../theory/losses.py)", "`code`"),
        ("api/two.md", "[a](../../README.md)", "[a](../index.md)"),
        ("theory.md", "![a](../docs/figures/a.png)", "![a](figures/a.png)"),
        ("one.md", "[a](#x), [b](https://example.org)", "[a](#x), [b](https://example.org)"),
        ("one.md", "`[a](none.md)`", "`[a](none.md)`"),
        ("one.md", "```sh\n[a](none.md)\n```", "```sh\n[a](none.md)\n```"),
    ],
)
def test_links_lead_to_pages(repository: Path, page: str, text: str, shown: str) -> None:
    assert site.as_a_page(page, text, repository) == shown


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[a](none.md)", "docs/one.md: the link to none.md leads nowhere; there is no docs/none.md"),
        ("[a](../theory/none.py)", "there is no theory/none.py"),
        ("[a](../../elsewhere.md)", "leads nowhere"),
        ("![a](../theory/losses.py)", "the picture ../theory/losses.py is not on the site"),
    ],
)
def test_a_link_that_leads_nowhere_is_refused(repository: Path, text: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        site.as_a_page("one.md", text, repository)


def test_what_is_laid_out_is_what_is_there_now(repository: Path) -> None:
    plain = repository / "docs" / "plain"
    assert "api/two.md" in site.lay_out(plain, repository)
    (plain / ".gitignore").write_text("*\n")
    assert site.lay_out(plain, repository) == []
    (repository / "docs" / "one.md").rename(repository / "docs" / "three.md")
    (repository / "README.md").write_text("# Changed\n")
    assert site.lay_out(plain, repository) == ["index.md", "three.md", "one.md"]
    assert not (plain / "one.md").exists()
    assert (plain / ".gitignore").exists()


def test_the_command_says_which_link_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong() -> list[str]:
        raise ValueError("docs/one.md: the link to none.md leads nowhere")

    monkeypatch.setattr(site, "lay_out", wrong)
    assert site.main([]) == 1
    assert capsys.readouterr().err == "error: docs/one.md: the link to none.md leads nowhere\n"


@of_every_page
def test_every_link_of_the_repository_leads_somewhere(name: str) -> None:
    site.as_a_page(name, PAGES[name].read_text(encoding="utf-8"))


# ---------------------------------------------------------------- what readers find


def leaves(entries: Any) -> Iterator[str]:
    """The files of a navigation."""
    for entry in entries:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            yield from [value] if isinstance(value, str) else leaves(value)


def test_navigation_and_readme_hold_every_page() -> None:
    assert sorted(leaves(CONFIG["nav"])) == sorted(PAGES)
    listed = {match["target"] for match in site.LINK.finditer((ROOT / "README.md").read_text()) if match["target"]}
    shown = {path.relative_to(ROOT).as_posix() for name, path in PAGES.items() if "/" not in name}
    assert shown - listed == {"README.md"}


@of_every_page
def test_headings_do_not_skip_a_level(name: str) -> None:
    levels = [len(marks) for marks in re.findall(r"^(#+) ", prose(name), re.MULTILINE)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


BLOCK = re.compile(r"^(?!#|<!--|\s|[-|]|\d+\. )(\S.*)\n((?:- |\d+\. |\|).*)$", re.MULTILINE)


@of_every_page
def test_lists_and_tables_begin_after_an_empty_line(name: str) -> None:
    assert BLOCK.findall(prose(name)) == [], (
        "GitHub sees a list or a table there, Markdown's own definition running text"
    )


@of_every_page
def test_formulas_use_words_that_katex_has(name: str) -> None:
    katex = (ROOT / "docs" / "assets" / "katex" / "katex.min.js").read_text(encoding="utf-8")
    formulas = re.findall(r"\$\$(.+?)\$\$|\$([^$\n]+(?:\n[^$\n]+)?)\$", prose(name), re.DOTALL)
    words = {word for pair in formulas for word in re.findall(r"\\([A-Za-z]+)", "".join(pair))}
    assert [word for word in sorted(words) if f'"\\\\{word}"' not in katex] == []


def test_the_site_asks_nothing_of_the_network() -> None:
    named = [*CONFIG["extra_javascript"], *CONFIG["extra_css"], *CONFIG["extra"]["polyfills"]]
    assert any("iframe-worker" in name for name in named), "or the plugin `offline` fetches it"
    assert {"search", "offline"} <= {name for name in CONFIG["plugins"] if isinstance(name, str)}
    assert CONFIG["theme"]["font"] is False
    for name in named:
        assert (ROOT / "docs" / name).is_file(), name
    style = ROOT / "docs" / "assets" / "katex" / "katex.min.css"
    fonts = set(re.findall(r"url\(([^)]+\.woff2)\)", style.read_text(encoding="utf-8")))
    assert fonts == {f"fonts/{path.name}" for path in (style.parent / "fonts").iterdir()}
    for folder in ("katex", "iframe-worker"):
        assert "Permission is hereby granted, free of charge" in (
            ROOT / "docs" / "assets" / folder / "LICENSE"
        ).read_text(encoding="utf-8")


# ---------------------------------------------------------------- figures


def test_every_result_that_is_committed_is_in_a_page() -> None:
    drawable = {name for name, module in modules().items() if (RESULTS / module.RESULTS).exists()}
    assert set(site.embedded()) == drawable


def test_embedded_figures_are_drawn_from_what_is_there_now() -> None:
    assert site.stale() == [], "run `python -m docs.pages --figures`"
    assert {path.stem for path in site.FIGURES.glob("*.png")} == set(site.embedded())


def test_a_figure_is_stale_when_its_results_or_its_code_change(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("figures.paths.RESULTS", tmp_path)
    (tmp_path / "figure_1.json").write_text("{}")
    before = site.made_from("figure_1")
    (tmp_path / "figure_1.json").write_text('{"other": 1}')
    assert site.made_from("figure_1") != before
    (tmp_path / "figure_1.json").write_text("{}")
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "style.py").write_text("WIDTH = 1\n")
    monkeypatch.setattr(site, "ROOT", tmp_path)
    assert site.made_from("figure_1") != before
