"""What the site adds to MkDocs: READMEs of the repository as pages, and links that work on GitHub and here."""

from __future__ import annotations

import posixpath
import re
from typing import Any

from mkdocs.structure.files import File, Files

SOURCES = {
    "index.md": "README.md",
    "theory.md": "theory/README.md",
    "bandits.md": "bandits/README.md",
    "grid.md": "lm/workflow/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "figures/demo.png": "figures/demo.png",
}
"""File of the site -> file of the repository, where that is not docs/<the same>."""
PLACES = {source: page for page, source in SOURCES.items()} | {posixpath.dirname(s): p for p, s in SOURCES.items()}
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds SOURCES."""
    root = posixpath.dirname(config.config_file_path)
    for page, source in SOURCES.items():
        files.append(File.generated(config, page, abs_src_path=posixpath.join(root, source)))
    return files


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    """A relative link leads to the page that shows its target; one to a file without a page keeps its text only."""
    here = page.file.src_uri
    folder = posixpath.dirname(SOURCES.get(here, f"docs/{here}"))

    def site_link(match: re.Match[str]) -> str:
        image, text, target, anchor = match.groups()
        wanted = posixpath.normpath(posixpath.join(folder, target))
        place = PLACES.get(wanted) or wanted.removeprefix("docs/")
        if files.get_file_from_path(place):
            return f"{image}[{text}]({posixpath.relpath(place, posixpath.dirname(here) or '.')}{anchor or ''})"
        # Inside docs/ a missing page is a mistake, which MkDocs reports; the rest of the repository is not on the site.
        return match.group() if wanted.startswith("docs/") else text

    return LINK.sub(site_link, markdown)
