"""The pages of the site, as plain files that any generator builds: `python -m docs.pages [--figures]`.

Pages lie all over the repository (docs/, the READMEs, CHANGELOG.md) and link to each other as GitHub wants it. This
lays them out in docs/plain/, one folder, with links that work there. `mkdocs build` does it by itself (mkdocs.yml has
this file as a hook); a generator without hooks, as zensical, finds the same files after the command.

docs/figures/ holds the pictures that pages embed, drawn by --figures; they are committed, so that GitHub has them too.

docs/assets/ is from elsewhere but for site.*: KaTeX 0.19.1 (npm katex: minified files, woff2 fonts) and the shim of
iframe-worker 1.0.4, which Material's search needs where there is no server. Both are MIT, their licences beside them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import posixpath
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PLAIN = ROOT / "docs" / "plain"
SOURCES = {
    "index.md": "README.md",
    "theory.md": "theory/README.md",
    "bandits.md": "bandits/README.md",
    "grid.md": "lm/workflow/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
"""Page of the site -> file of the repository, where that is not docs/<the same>."""
LINK = re.compile(
    r"^```.*?^```$|(?<!`)`[^`\n]+`(?!`)"  # code, which is left alone
    r"|(?P<image>!?)\[(?P<words>[^\]]*)\]\((?![a-z]+:|#)(?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)",
    re.MULTILINE | re.DOTALL,
)

FIGURES = ROOT / "docs" / "figures"
DRAWN = FIGURES / "drawn.json"
COLOURS = 64
"""Of the pictures' palettes: a third of the bytes, and no difference that one sees."""


# ---------------------------------------------------------------- pages


def pages(root: Path = ROOT) -> dict[str, Path]:
    """File of the site -> file of the repository, for all that the site is made of."""
    docs = root / "docs"
    found = {page: root / source for page, source in SOURCES.items()}
    for path in sorted(docs.rglob("*")):
        name = path.relative_to(docs)
        if path.is_file() and name.parts[0] not in ("plain", "__pycache__") and path.suffix not in (".py", ".json"):
            found[name.as_posix()] = path
    return found


def as_a_page(page: str, text: str, root: Path = ROOT) -> str:
    """The text of a page with the links that it needs on the site.

    A relative link leads to the page that shows its target; one to a file of the repository without a page keeps its
    text only.

    Raises:
        ValueError: the target does not exist, or is a picture that is not on the site.
    """
    known = pages(root)
    shown = {path.relative_to(root).as_posix(): name for name, path in known.items()}
    shown |= {posixpath.dirname(source): name for name, source in SOURCES.items() if "/" in source}
    source = known[page].relative_to(root).as_posix()

    def link(match: re.Match[str]) -> str:
        image, words, target, anchor = match["image"], match["words"], match["target"], match["anchor"]
        if target is None:
            return match[0]
        wanted = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if wanted in shown:
            there = posixpath.relpath(shown[wanted], posixpath.dirname(page) or ".")
            return f"{image}[{words}]({there}{anchor or ''})"
        if wanted.startswith("..") or not (root / wanted).exists():
            raise ValueError(f"{source}: the link to {target} leads nowhere; there is no {wanted}")
        if image:
            raise ValueError(f"{source}: the picture {target} is not on the site; pictures lie in docs/")
        return words

    return LINK.sub(link, text)


def lay_out(plain: Path = PLAIN, root: Path = ROOT) -> list[str]:
    """Makes `plain` the site's pages, and returns the names of the files that it wrote or removed.

    A file that is right is not touched, so that a server which watches the folder is not woken.
    """
    changed, wanted = [], pages(root)
    for name, source in wanted.items():
        content = source.read_bytes()
        if name.endswith(".md"):
            content = as_a_page(name, content.decode(), root).encode()
        path = plain / name
        if not path.exists() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            changed.append(name)
    for path in sorted(plain.rglob("*")) if plain.exists() else ():
        name = path.relative_to(plain).as_posix()
        if path.is_file() and name not in wanted and name != ".gitignore":
            path.unlink()
            changed.append(name)
    return changed


def on_config(config: Any, **_: Any) -> Any:
    """MkDocs' hook: its build, and its server at every change, start from pages that are up to date."""
    lay_out()
    return config


# ---------------------------------------------------------------- figures


def embedded() -> Iterator[str]:
    """The names of the figures that pages embed."""
    for name, source in pages().items():
        if name.endswith(".md"):
            for match in LINK.finditer(source.read_text(encoding="utf-8")):
                target = Path(match["target"] or "")
                if match["image"] and target.parent.name == "figures":
                    yield target.stem


def made_from(name: str) -> str:
    """A digest of what a figure is drawn from: its results, and the package that draws them."""
    from figures.paths import RESULTS
    from figures.registry import modules

    digest = hashlib.sha256((RESULTS / modules()[name].RESULTS).read_bytes())
    for path in sorted((ROOT / "figures").glob("*.py")):
        if not path.stem.endswith("_test") and path.stem != "conftest":
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def stale() -> list[str]:
    """Figures that are embedded and not drawn from what is there now, or drawn and not embedded."""
    drawn = json.loads(DRAWN.read_text(encoding="utf-8")) if DRAWN.exists() else {}
    wanted = {name: made_from(name) for name in sorted(set(embedded()))}
    return sorted(name for name in wanted.keys() | drawn.keys() if wanted.get(name) != drawn.get(name))


def draw() -> list[str]:
    """Draws what is stale, removes what no page embeds, and returns the names."""
    from PIL import Image

    from figures.registry import redraw

    names, wanted = stale(), sorted(set(embedded()))
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            path = FIGURES / f"{name}.png"
            if name not in wanted:
                path.unlink(missing_ok=True)
                continue
            picture = next(made for made in redraw(name, Path(folder)) if made.suffix == ".png")
            path.parent.mkdir(exist_ok=True)
            with Image.open(picture) as image:
                image.convert("RGB").quantize(COLOURS).save(path, optimize=True)
    drawn = {name: made_from(name) for name in wanted}
    DRAWN.write_text(json.dumps(drawn, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m docs.pages", description="Lay out the site's pages as plain files."
    )
    parser.add_argument(
        "--figures", action="store_true", help="draw embedded figures again whose results or code changed"
    )
    options = parser.parse_args(arguments)
    try:
        names = [f"docs/figures/{name}.png" for name in draw()] if options.figures else []
        names += [f"docs/plain/{name}" for name in lay_out()]
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(names) or "nothing to do")
    return 0


if __name__ == "__main__":
    sys.exit(main())
