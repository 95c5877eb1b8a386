"""Uploads a policy of a finished run to the Hugging Face hub, with its model card as README.md.

One commit with what `transformers` reads, without snapshots of other steps and without artifact.json, which names this
machine. The token is the environment's HF_TOKEN, or that of `hf auth login`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from lm.base import progress
from lm.reporting.card import HUB_NAME, card, chosen


def push(run: Path, method: str, repo_id: str, *, private: bool = False) -> str:
    """The address of the commit. Makes the repository where there is none.

    Args:
        run: output_dir of a finished run.
        method: whose policy, the one that validation chose.
        repo_id: owner/name.
        private: make the repository private, and refuse one that is there and is not.

    Raises:
        FileNotFoundError, MissingArtifact, CorruptArtifact: see `lm.reporting.card.card`.
        ValueError: another name than owner/name, no such method, no token, or a public repository for a private policy.
        OSError: the hub cannot be reached, or refuses.
    """
    _check_name(repo_id)
    text = card(run, method, name=repo_id)  # before anything leaves this machine: it checks the run's files
    if get_token() is None:
        raise ValueError("the hub needs a token: set HF_TOKEN, or log in with `hf auth login`")
    progress.say(f"uploading to {repo_id}")
    api = HfApi()
    api.create_repo(repo_id, private=True if private else None, exist_ok=True)
    if private and not api.model_info(repo_id).private:
        raise ValueError(f"--private: {repo_id} is there and is public; make it private on the hub, or name another")
    with tempfile.TemporaryDirectory() as folder:
        _gather(chosen(run, method), Path(folder))
        (Path(folder) / "README.md").write_text(text + "\n", encoding="utf-8")
        return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=f"A {method} policy").commit_url


def _check_name(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
        good = HUB_NAME.fullmatch(repo_id) is not None
    except HFValidationError:
        good = False
    if not good:
        raise ValueError(f"--repo-id must be owner/name, of letters, digits, '-', '_' and '.'; got {repo_id!r}")


def _gather(model: Path, folder: Path) -> None:
    """Links to a policy's files: those of its folder, and its adapter."""
    for path in model.rglob("*"):
        inside = path.relative_to(model)
        if path.is_file() and inside.name != "artifact.json" and not inside.parts[0].startswith("step-"):
            (folder / inside).parent.mkdir(parents=True, exist_ok=True)
            (folder / inside).symlink_to(path.resolve())
