"""What a name stands for on the Hugging Face hub, or in its cache here: asked once, and for seconds at most."""

from __future__ import annotations

import difflib
import functools
import os
import re
import threading
from pathlib import Path
from typing import Any, Literal, NamedTuple

Kind = Literal["model", "dataset"]
NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
"""Of a repository; the oldest ones have no owner."""
PATIENCE = 5.0
"""Seconds to wait for the hub's answer, its address included."""


class Answer(NamedTuple):
    """Of the hub about a name."""

    commit: str | None
    """What the name stands for now."""
    trouble: str | None
    """Why there is no commit, in words."""


def commit_of(name: str, kind: Kind, revision: str | None = None) -> str | None:
    """The commit that would be loaded for a name, by the hub or else by its cache here; None where neither tells."""
    answer = _ask(name, kind, revision) if not is_offline() else Answer(None, None)
    return answer.commit or _cached(name, kind, revision)


def missing(name: str, kind: Kind, revision: str | None = None) -> str | None:
    """Why a name that is no path here can be loaded from nowhere, found within PATIENCE; None where it may be loaded.

    Args:
        name: owner/name.
        kind: of repository.
        revision: branch, tag or commit.
    """
    absent = f"there is no such {'folder' if kind == 'model' else 'file or folder'}{meant(name)}"
    if not NAME.fullmatch(name) or ".." in name:
        return f"{absent}, and it is no name on the hub (owner/name)"
    if _cached(name, kind, revision) is not None:
        return None
    if is_offline():
        return f"{absent}, and the hub's cache here has no {kind} of this name (HF_HUB_OFFLINE is set)"
    trouble = _ask(name, kind, revision).trouble
    return trouble and f"{absent}, and {trouble}"


def meant(path: str) -> str:
    """A hint at what is there and is called most like a path that is not; empty where nothing is."""
    found = Path("/") if Path(path).is_absolute() else Path()
    try:
        for part in Path(path).parts[found.is_absolute() :]:
            if not (found / part).exists():
                close = difflib.get_close_matches(part, os.listdir(found), n=1, cutoff=0.7)
                if not close:
                    return ""
                part = close[0]
            found /= part
    except OSError:
        return ""
    return f" (is {str(found)!r} meant?)" if found.parts else ""


def is_offline() -> bool:
    """Whether the user's environment, or a command, keeps the hub's client from asking."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE) or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _cached(name: str, kind: Kind, revision: str | None) -> str | None:
    """The commit in the hub's cache, of which some file is there."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}"
    reference = folder / "refs" / (revision or "main")
    commit = reference.read_text(encoding="ascii").strip() if reference.is_file() else revision
    return commit if commit and (folder / "snapshots" / commit).is_dir() else None


@functools.cache
def _ask(name: str, kind: Kind, revision: str | None) -> Answer:
    """In a thread of its own, as the search for an address knows no time limit."""
    answers: list[Answer] = []
    asking = threading.Thread(target=lambda: answers.append(_asked(name, kind, revision)), daemon=True)
    asking.start()
    asking.join(PATIENCE)
    return answers[0] if answers else Answer(None, f"the hub gave no answer within {PATIENCE:g} s")


def _asked(name: str, kind: Kind, revision: str | None) -> Answer:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        found: Any = HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=PATIENCE)
    except RevisionNotFoundError:
        return Answer(None, f"the hub's {kind} of this name has no revision {revision!r}")
    except RepositoryNotFoundError:
        return Answer(None, f"the hub has no {kind} of this name, or none that it shows to this machine's token")
    except Exception as error:  # whatever the client's own client raises
        return Answer(None, f"the hub cannot be asked ({type(error).__name__}: {error})")
    return Answer(found.sha, None)
