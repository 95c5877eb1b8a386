"""Artifact folders: each stage's result is keyed by everything it was made from, written whole, and reused.

An artifact is `<root>/<stage>/<name>-<key>/` with an `artifact.json` (inputs, metrics, checksums, provenance). The key
is a digest of the stage's inputs, upstream keys among them: another configuration gets another folder, nothing is
overwritten, and what is unchanged is not computed again. It is made in a hidden folder and renamed when complete. Of
several ranks, all compute and the first one's result is kept.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lm import ranks
from lm.io import sha256_of, write_json

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "numpy", "scipy")
FORMAT = 2
"""Raised when a stage's meaning changes, so that older artifacts are not taken for new ones."""


class CorruptArtifact(RuntimeError):
    """A file of a finished artifact is missing or has changed."""


class MissingArtifact(RuntimeError):
    """An artifact is asked for by a command that does not make it."""


@dataclass(frozen=True)
class Artifact:
    """A finished stage."""

    path: Path
    key: str
    """Digest of everything it was made from, 12 hex digits."""
    metrics: dict[str, Any]
    """What the stage reported."""


def provenance(seed: int) -> dict[str, Any]:
    """Versions, commit, machine, ranks, date, seed and command of this process."""
    return {
        "versions": {
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in PACKAGES},
        },
        "commit": _commit(),
        "machine": {
            "platform": platform.platform(),
            "processor": _processor(),
            "cores": os.cpu_count(),
        },
        "ranks": ranks.count(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def _commit() -> str | None:
    """This checkout's commit, marked where files differ from it; None outside a checkout."""
    folder = Path(__file__).parent
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


class Store:
    """All artifacts of a run's folder.

    Args:
        root: the run's `output_dir`.
        seed: written into the provenance.
        read_only: stages that must exist already; asking for one that does not raises MissingArtifact.
    """

    def __init__(self, root: Path, *, seed: int, read_only: frozenset[str] = frozenset()) -> None:
        self.root, self.seed, self.read_only = root, seed, read_only

    def get(
        self,
        stage: str,
        name: str,
        inputs: Mapping[str, Any],
        make: Callable[[Path, Path], dict[str, Any]],
        *,
        alone: bool = False,
    ) -> Artifact:
        """The artifact made from these inputs, now or earlier. All ranks call this.

        Args:
            stage: e.g. "reward".
            name: which one of the stage, e.g. "b0.2".
            inputs: everything that decides the result: JSON values, dataclasses, or artifacts (their keys count).
            make: called with the folder to fill and a scratch folder that survives a crash (checkpoints go there);
                returns the metrics. Every rank calls it, with a folder of its own and the same scratch folder.
            alone: only the first rank calls `make`, the others wait.
        """
        described = {"stage": stage, "name": name, "format": FORMAT, "inputs": _plain(inputs)}
        key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:12]
        final = self.root / stage / f"{name}-{key}"
        metrics = ranks.from_first(lambda: verify(final)["metrics"] if final.exists() else None)
        if metrics is not None:
            return Artifact(final, key, metrics)
        if stage in self.read_only:
            raise MissingArtifact(f"there is no finished {stage} {name} in {self.root}; run `python -m lm.train` first")
        work = self.root / ".work" / f"{stage}-{name}-{key}"
        result, scratch = work / ("result" if ranks.is_first() else f"rank-{ranks.index()}"), work / "scratch"
        shutil.rmtree(result, ignore_errors=True)
        result.mkdir(parents=True)
        scratch.mkdir(exist_ok=True)
        print(f"[{stage}] {name}", file=sys.stderr, flush=True)
        made = ranks.from_first(lambda: make(result, scratch)) if alone else make(result, scratch)
        whole = {**described, "metrics": made, "provenance": provenance(self.seed)}

        def finish() -> dict[str, Any]:
            files = {str(p.relative_to(result)): sha256_of(p) for p in sorted(result.rglob("*")) if p.is_file()}
            write_json(result / "artifact.json", {**whole, "files": files})
            final.parent.mkdir(parents=True, exist_ok=True)
            os.replace(result, final)
            shutil.rmtree(work, ignore_errors=True)
            return made

        ranks.wait()  # until none works in that folder any more
        return Artifact(final, key, ranks.from_first(finish))


def policy_folder(run: Path, model: str) -> Path:
    """The policy's artifact in a run whose results.json names the model's folder: the artifact, or a snapshot in it.

    The run may have been moved since it was written.
    """
    *_, above, name = Path(model).parts
    return run / "policy" / (above if name.startswith("step-") else name)


def verify(folder: Path) -> dict[str, Any]:
    """The `artifact.json` of a finished artifact; CorruptArtifact where a file is missing or fails its checksum."""
    try:
        record: dict[str, Any] = json.loads((folder / "artifact.json").read_text(encoding="utf-8"))
        files = record["files"]
    except (OSError, ValueError, KeyError) as error:
        raise CorruptArtifact(
            f"{folder}/artifact.json cannot be read ({error}); delete the folder to rebuild it"
        ) from None
    for name, digest in files.items():
        path = folder / name
        if not path.is_file() or sha256_of(path) != digest:
            state = "has changed" if path.is_file() else "is missing"
            raise CorruptArtifact(f"{path} {state} since it was written; delete {folder} to rebuild it")
    return record


def _plain(value: Any) -> Any:
    """Inputs as JSON values that describe content, not place."""
    if isinstance(value, Artifact):
        return {"artifact": value.key}
    if is_dataclass(value) and not isinstance(value, type):
        return _plain({"__class__": type(value).__name__, **asdict(value)})
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"an artifact cannot be keyed by a {type(value).__name__}: {value!r}")
