"""Artifact folders: each stage's result is keyed by everything it was made from, written whole, and reused.

An artifact is `<root>/<stage>/<name>-<key>/` with an `artifact.json` (inputs, metrics, cost, checksums, provenance).
The key is a digest of the stage's inputs, upstream keys among them: another configuration gets another folder, nothing
is overwritten, and what is unchanged is not computed again. It is made in a hidden folder and renamed when complete. Of
several ranks, all compute and the first one's result is kept.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import Field, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from lm.base import cost, progress, ranks
from lm.base.files import inside, sha256_of
from lm.base.memory import give_back_freed_memory
from theory import records
from theory.records import write_json

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "numpy", "scipy")
FORMAT = 2
"""Raised when a stage's meaning changes, so that older artifacts are not taken for new ones."""


WORK = ".work"
"""In a run's folder: artifacts that are being made, a folder each."""
SEAL = "checksums.json"
"""Of a sealed folder: the digest of each of its files, by name."""


SHARE = "share.json"
"""In a scratch folder: what making several artifacts at once took, this one's part of it, and whether it `resumed`."""


class CorruptArtifact(RuntimeError):
    """A file of a finished artifact is missing or has changed."""


class Refused(OSError):
    """The machine refused a stage memory, space or access to files. It can be made again when there is."""


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


@dataclass(frozen=True)
class Planned:
    """An artifact that another's key counts, made or not."""

    key: str


def provenance(seed: int) -> dict[str, Any]:
    """Versions, commit, machine, ranks, date, seed and command of this process."""
    return records.provenance(seed, PACKAGES, ranks=ranks.count())


class Store:
    """All artifacts of a run's folder.

    Args:
        root: the run's `output_dir`.
        seed: written into the provenance.
        read_only: stages that must exist already; asking for one that does not raises MissingArtifact.
    """

    def __init__(self, root: Path, *, seed: int, read_only: frozenset[str] = frozenset()) -> None:
        self.root, self.seed, self.read_only = root, seed, read_only
        self._records: dict[str, Mapping[str, Any]] = {}
        self.begun = False
        """Whether something was to be made."""

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

        Raises:
            Refused: for want of memory, space or access; `scratch` is kept, and nothing else.
            CorruptArtifact: it was made, and a file of it has changed.
        """
        described, key = _described(stage, name, inputs)
        final = self.root / stage / f"{name}-{key}"
        work = self.root / WORK / f"{stage}-{name}-{key}"

        def finished() -> dict[str, Any] | None:
            if not final.exists():
                return None
            record = verify(final)
            shutil.rmtree(work, ignore_errors=True)  # a kill may have come before
            return record

        found = ranks.from_first(finished)
        if found is not None:
            self._records[key] = found
            return Artifact(final, key, found["metrics"])
        if stage in self.read_only:
            raise MissingArtifact(f"there is no finished {stage} {name} in {self.root}; run `python -m lm.train` first")
        result, scratch = work / ("result" if ranks.is_first() else f"rank-{ranks.index()}"), work / "scratch"
        shutil.rmtree(result, ignore_errors=True)
        result.mkdir(parents=True)
        scratch.mkdir(exist_ok=True)
        before = ranks.from_first(lambda: _share(scratch))
        resumed = before is None and ranks.from_first(lambda: any(scratch.iterdir()))
        self.begun = True
        progress.say(f"[{stage}] {name}")
        try:
            with cost.Meter() as meter:
                made = ranks.from_first(lambda: make(result, scratch)) if alone else make(result, scratch)
        except Exception as error:
            if (reason := refusal(error)) is None:
                raise
            raise Refused(f"[{stage}] {name} in {self.root}: {reason}") from error
        give_back_freed_memory()
        shared = ranks.from_first(lambda: _share(scratch)) or {}
        resumed = resumed or shared.pop("resumed", False)
        took = {**cost.added(cost.together(ranks.from_all(meter.found())), shared), "resumed": resumed}
        whole = {**described, "metrics": made, "cost": took, "provenance": provenance(self.seed)}

        def finish() -> dict[str, Any]:
            write_json(result / "artifact.json", {**whole, "files": _checksums(result)})
            final.parent.mkdir(parents=True, exist_ok=True)
            os.replace(result, final)
            shutil.rmtree(work, ignore_errors=True)
            return made

        ranks.wait()  # until none works in that folder any more
        self._records[key] = whole
        return Artifact(final, key, ranks.from_first(finish))

    def holds(self, stage: str, name: str, inputs: Mapping[str, Any]) -> bool:
        """Whether the artifact of these inputs is finished. It may be damaged, which `get` says."""
        return ranks.from_first((self.root / stage / f"{name}-{key_of(stage, name, inputs)}").exists)

    def scratch(self, stage: str, name: str, inputs: Mapping[str, Any]) -> Path:
        """The scratch folder that the `make` of these inputs will be called with; for what is made of several artifacts
        at once, before one of them is asked for. There may be none yet. In SHARE of it `lm.base.cost.Meter.found` has
        what of that is this artifact's."""
        return self.root / WORK / f"{stage}-{name}-{key_of(stage, name, inputs)}" / "scratch"

    def costs(self) -> list[dict[str, Any]]:
        """What making each artifact took that was asked for here, in the order in which they were finished: `stage`,
        `name`, `artifact` (its key), `finished` (ISO 8601), and what `lm.base.cost.Meter.found` has, of all ranks; and
        `resumed`, whether a process before the last worked on it too, whose share is not in the numbers. Those that an
        earlier version made have none."""
        told = {
            (record["provenance"]["date"], record["stage"], record["name"], key): record
            for key, record in self._records.items()
        }
        return [
            {"stage": stage, "name": name, "artifact": key, "finished": date, **record.get("cost", {})}
            for (date, stage, name, key), record in sorted(told.items(), key=lambda item: item[0])
        ]


def _share(scratch: Path) -> dict[str, Any] | None:
    file = scratch / SHARE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def key_of(stage: str, name: str, inputs: Mapping[str, Any]) -> str:
    """The key that `Store.get` gives an artifact of these inputs, whether it is made or not."""
    return _described(stage, name, inputs)[1]


def _described(stage: str, name: str, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    described = {"stage": stage, "name": name, "format": FORMAT, "inputs": _plain(inputs)}
    return described, hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:12]


def refusal(error: Exception) -> str | None:
    """What the machine refused and what may help, in words, as Python and the libraries tell it; else None."""
    text = str(error)
    torch = sys.modules.get("torch")  # whose error it can only be where it has been imported
    lacking = (MemoryError, *((torch.OutOfMemoryError,) if torch is not None else ()))
    if isinstance(error, lacking) or "can't allocate memory" in text:
        return (
            f"out of memory{f' ({text})' if text else ''}; lower micro_batch_tokens or set activation_checkpointing of "
            "that training, or lower logprobs.scoring_tokens"
        )
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    # safetensors tells of the system's error in words, torch.save of a stream that failed.
    if full or re.search(r"os error (28|122|27)\b|PytorchStreamWriter|inline_container\.cc", text):
        return f"no space to write ({text}); free some, and the same command goes on"
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"no access ({text})"
    return None


def policy_folder(run: Path, model: str) -> Path:
    """The policy's artifact in a run whose results.json names the model's folder: the artifact, or a snapshot in it.

    The run may have been moved since it was written.
    """
    *_, above, name = Path(model).parts
    return inside(run, f"policy/{above if name.startswith('step-') else name}")


def verify(folder: Path) -> dict[str, Any]:
    """The `artifact.json` of a finished artifact; CorruptArtifact where a file is missing or fails its checksum."""
    try:
        record: dict[str, Any] = json.loads((folder / "artifact.json").read_text(encoding="utf-8"))
        files = record["files"]
    except (OSError, ValueError, KeyError) as error:
        raise CorruptArtifact(
            f"{folder}/artifact.json cannot be read ({error}); delete the folder to rebuild it"
        ) from None
    found = _damage(folder, files)
    if found is not None:
        raise CorruptArtifact(f"{found} since it was written; delete {folder} to rebuild it")
    return record


def seal(folder: Path) -> None:
    """Writes the checksums of all files in a folder into it, last of all: it is whole now."""
    (folder / SEAL).unlink(missing_ok=True)
    write_json(folder / SEAL, _checksums(folder))


def damage(folder: Path) -> str | None:
    """Which file of a sealed folder has changed or is missing, in words; None where it is as it was sealed."""
    try:
        return _damage(folder, json.loads((folder / SEAL).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return f"{folder / SEAL} is missing"
    except (ValueError, AttributeError):
        return f"{folder / SEAL} has changed"


def last_checkpoint(folder: Path) -> str | None:
    """The latest that is whole. Later ones are deleted: those without a seal, which a kill has cut short, and those of
    which a file has changed since, which is said."""
    steps = {int(path.name.split("-")[1]): path for path in folder.glob("checkpoint-*")}
    for _, path in sorted(steps.items(), reverse=True):
        found = damage(path)
        if found is None:
            return str(path)
        if (path / SEAL).exists():
            print(f"warning: {found} since it was written; this checkpoint is not used", file=sys.stderr, flush=True)
        shutil.rmtree(path)
    return None


def _checksums(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_of(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _damage(folder: Path, files: Mapping[str, str]) -> str | None:
    for name, digest in files.items():
        path = folder / name
        if not path.is_file() or sha256_of(path) != digest:
            return f"{path} {'has changed' if path.is_file() else 'is missing'}"
    return None


def keyed(options: Any) -> dict[str, Any]:
    """What a dataclass of options counts as in a key: its fields, those of dataclasses in it likewise, and the one
    value of each that is RETIRED. Left out are fields whose metadata say `keyed: False`; those that say `keyed: "unless
    default"` and have their default, options that earlier keys do not have; and those that name there a field that is
    None, with which they go."""

    def counts(each: Field[Any]) -> bool:
        how = each.metadata.get("keyed", True)
        if how == "unless default":
            return bool(getattr(options, each.name) != each.default)
        return how if isinstance(how, bool) else getattr(options, how) is not None

    plain = asdict(options)
    values = {
        each.name: keyed(own) if is_dataclass(own := getattr(options, each.name)) else plain[each.name]
        for each in fields(options)
        if counts(each)
    }
    return {**getattr(options, "RETIRED", {}), **values}


def _plain(value: Any) -> Any:
    """Inputs as JSON values that describe content, not place."""
    if isinstance(value, Artifact | Planned):
        return {"artifact": value.key}
    if is_dataclass(value) and not isinstance(value, type):
        return {"__class__": type(value).__name__, **_plain(keyed(value))}
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"an artifact cannot be keyed by a {type(value).__name__}: {value!r}")
