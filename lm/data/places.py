"""Where a set is: a path here or a name on the hub, checked before it is read, and told apart from its spelling."""

from __future__ import annotations

import re
from pathlib import Path

from lm.base import hub
from lm.data.formats import READ
from lm.data.rows import HUB_DATASET, shown

FILE = re.compile(f"({'|'.join(map(re.escape, READ))})$")
"""What a path to a file of rows ends with, which no hub name does."""


def check(path: str, *, option: str = "data path") -> None:
    """Raises FileNotFoundError for a path that is not here, and ValueError, within seconds, for a name that the hub
    does not know, or cannot be asked about."""
    named = _on_hub(path)
    if Path(path).exists():
        return
    if named is None:
        raise FileNotFoundError(
            f"{option} {shown(path)}: there is no such file or folder{hub.meant(path)}, and it is no hub name "
            "(owner/name)"
        )
    if not _is_prepared(named[1]) and (why := hub.missing(named[1], "dataset", named[3])):
        raise ValueError(f"{option} {shown(path)}: {why}")


def _is_prepared(name: str) -> bool:
    """Whether `datasets` has made its own files of a hub dataset, which it reads without the hub."""
    import datasets

    return (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir()


def placeless(path: str | None) -> str | None:
    """What a path says beside its content: its type, which says how it is read. A hub name is what it was, without a
    revision."""
    if path is None:
        return None
    if not Path(path).exists():
        named = _on_hub(path)
        return path if named is None else "/".join(part for part in named.group(1, 2) if part)
    if Path(path).is_dir():
        return "a folder"
    found = FILE.search(path)
    return f"a file{found[1] if found else Path(path).suffix}"


def commit_of(path: str) -> str | None:
    """The commit behind a hub name; None where it cannot be told, or the path is here."""
    named = _on_hub(path)
    return None if named is None or Path(path).exists() else hub.commit_of(named[1], "dataset", named[3])


def _on_hub(path: str) -> re.Match[str] | None:
    """A hub name's owner/name, folder and revision; None for what is none."""
    try:
        if Path(path).exists() or FILE.search(path):
            return None
    except OSError as error:
        raise ValueError(f"data path {shown(path)} cannot be looked up ({error.strerror})") from None
    return re.fullmatch(HUB_DATASET, path)
