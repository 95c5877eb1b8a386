"""Searches for inputs that break the loaders or the config parser, guided by coverage; by atheris, the extra `fuzz`.

    python tests/fuzz_atheris.py data -max_total_time=300
    python tests/fuzz_atheris.py config -max_total_time=300 [FOLDER]

Options after the first are libFuzzer's; an input that breaks something is left as crash-*. FOLDER keeps the inputs that
found new paths, for the next run; without one the search starts from the good rows and configs of `fuzz_test.py`.
"""

from __future__ import annotations

import contextlib
import gzip
import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))
with atheris.instrument_imports(include=["lm", "jsonargparse", "yaml"]):
    from lm.base.options import CONFIGS
    from tests import fuzz_test
    from tests.fuzz_test import GOOD_FILES, read_config, read_data

SUFFIXES = list(GOOD_FILES)
fuzz_test.in_time = contextlib.nullcontext  # libFuzzer has the alarm, and its own limit: -timeout


def seeds(what: str) -> list[bytes]:
    """Good inputs, as `fuzz` takes them apart."""
    if what == "config":
        return [path.read_bytes() for path in sorted(CONFIGS.glob("*.yaml"))]
    plain = {
        suffix: [gzip.decompress(d) if suffix.endswith(".gz") else d for d in GOOD_FILES[suffix]] for suffix in SUFFIXES
    }
    files = [(suffix, content) for suffix in SUFFIXES for content in plain[suffix]]
    return [bytes([SUFFIXES.index(suffix)]) + content for suffix, content in files] + [
        bytes([SUFFIXES.index(".jsonl.gz") + len(SUFFIXES)]) + content for content in GOOD_FILES[".jsonl.gz"]
    ]


def fuzz(what: str, folder: Path, data: bytes) -> None:
    """One input: of a config its text; of data the type of file, then its bytes, which are compressed first for gz with
    a small number."""
    if what == "config":
        (folder / "config.yaml").write_bytes(data)
        read_config(folder / "config.yaml")
    elif data:
        kind, suffix = divmod(data[0], len(SUFFIXES))
        path = folder / f"pairs{SUFFIXES[suffix]}"
        pack = path.suffix == ".gz" and kind == 0
        path.write_bytes(gzip.compress(data[1:], mtime=0) if pack else data[1:])
        read_data(path, folder)


def main() -> None:
    """Runs until libFuzzer has had enough."""
    if len(sys.argv) < 2 or sys.argv[1] not in ("data", "config"):
        sys.exit(__doc__)
    what = sys.argv.pop(1)
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    if all(argument.startswith("-") for argument in sys.argv[1:]):
        (folder / "seeds").mkdir()
        for number, seed in enumerate(seeds(what)):
            (folder / "seeds" / str(number)).write_bytes(seed)
        sys.argv.append(str(folder / "seeds"))
    atheris.Setup(sys.argv, lambda data: fuzz(what, folder, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
