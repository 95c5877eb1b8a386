"""Audits the built site in a browser, from its folder and without a network: `python -m tests.site_axe site`.

Run by hand, after a change of the theme, of docs/assets/ or of a page's kind; all pages take about twenty minutes,
--pages a part. It wants a browser and two packages that the project does not: `pip install playwright
axe-playwright-python`, and Chromium (Debian: `apt install chromium`). axe-core knows rules of WCAG and good practice;
what it finds is printed by page, width and colours, with the first elements. On top of axe: every formula is typeset, a
search finds something, no page is wider than the window, and nothing is asked of the network.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WIDTHS = {"phone": (390, 844), "desktop": (1280, 900)}
SCHEMES = ("light", "dark")
AXE = """async () => (await axe.run({resultTypes: ["violations"]})).violations.map(found => [
    found.id, found.nodes.length,
    found.nodes.slice(0, 2).map(node => node.target.join(" ") + ": " + node.failureSummary.split("\\n")[1].trim())])"""
BARE = "() => [...document.querySelectorAll('.arithmatex')].filter(it => !it.querySelector('.katex-html')).length"
WRONG = "() => document.querySelectorAll('.katex-error').length"
WIDER = "() => document.documentElement.scrollWidth > window.innerWidth"
SEARCH = "input.md-search__input"
HITS = ".md-search-result__item"


def faults(tab: Any, page: Path, axe: str) -> Iterator[tuple[str, int, list[str]]]:
    """(rule, elements, examples) of what is wrong with a page."""
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url) if request.url.startswith("http") else None)
    tab.goto(page.as_uri())
    tab.wait_for_timeout(300)  # the theme wraps tables once they are laid out
    for rule, script in (("formula-not-typeset", BARE), ("formula-wrong", WRONG), ("page-wider-than-window", WIDER)):
        if count := int(tab.evaluate(script)):
            yield rule, count, []
    if asked:
        yield "asks-the-network", len(asked), sorted(set(asked))[:2]
    tab.evaluate(axe)
    yield from tab.evaluate(AXE)


def finds(tab: Any, page: Path, words: str) -> bool:
    """Whether the site's search knows the words."""
    tab.goto(page.as_uri())
    tab.evaluate("document.querySelector('#__search').click()")
    tab.wait_for_timeout(500)  # the drawer opens
    tab.click(SEARCH)
    tab.keyboard.type(words)
    try:
        tab.wait_for_selector(HITS, state="attached", timeout=20_000)
    except Exception as error:  # playwright's own class, which is not there without it
        print(error, file=sys.stderr)
        return False
    return True


def main() -> int:
    """The command; exit status 1 if anything is wrong."""
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(prog="python -m tests.site_axe", description=__doc__)
    parser.add_argument("site", type=Path, help="folder that `make docs` writes")
    parser.add_argument("--pages", nargs="*", default=[], help="e.g. results.html (default: all)")
    parser.add_argument("--axe", type=Path, help="axe.min.js (default: that of axe-playwright-python)")
    parser.add_argument("--browser", default="/usr/bin/chromium")
    parser.add_argument("--shots", type=Path, help="folder for a screenshot of each page")
    options = parser.parse_args()
    site = options.site.resolve()
    if options.axe is None:
        import axe_playwright_python

        options.axe = Path(axe_playwright_python.__file__).parent / "axe.min.js"
    axe = options.axe.read_text(encoding="utf-8")
    pages = [site / name for name in options.pages] or sorted(set(site.rglob("*.html")) - {site / "404.html"})
    total: Counter[str] = Counter()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=options.browser, args=["--no-sandbox"])
        for kind, (width, height) in WIDTHS.items():
            for scheme in SCHEMES:
                context = browser.new_context(
                    viewport={"width": width, "height": height}, color_scheme=scheme, offline=True
                )
                for page in pages:
                    tab, name = context.new_page(), page.relative_to(site).as_posix()
                    for rule, count, examples in faults(tab, page, axe):
                        total[rule] += count
                        print(f"{kind:8}{scheme:6}{name:28}{rule} ({count})", *examples, sep="\n    ", flush=True)
                    if options.shots:
                        options.shots.mkdir(parents=True, exist_ok=True)
                        shot = options.shots / f"{name.replace('/', '-').removesuffix('.html')}-{kind}-{scheme}.png"
                        tab.screenshot(path=shot, full_page=True)
                    tab.close()
                tab = context.new_page()
                if not finds(tab, pages[0], "pessimism"):
                    total["search"] += 1
                context.close()
        browser.close()
    print(f"{len(pages)} pages, {len(WIDTHS) * len(SCHEMES)} times: {dict(total) or 'nothing found'}")
    return int(bool(total))


if __name__ == "__main__":
    sys.exit(main())
