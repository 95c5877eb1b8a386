"""Files are written whole or not at all, and only files are: no device, pipe or link is replaced."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from theory.records import replacing, write_text
from theory.shell import check_free, output_file

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("force", [True, False])
def test_a_pipe_is_refused_before_the_work_and_stays(tmp_path: Path, force: bool) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match=r"--out .*pipe is a device or a pipe; a file is needed"):
        check_free("--out", pipe, force=force)
    with pytest.raises(ValueError, match="is a device or a pipe"):
        write_text(pipe, "text")
    assert pipe.is_fifo()
    with pytest.raises(ValueError, match=r"--json /dev/null is a device or a pipe"):
        check_free("--json", Path("/dev/null"), force=force)
    with pytest.raises(argparse.ArgumentTypeError, match="/dev/null is a device or a pipe; a file is needed"):
        output_file("/dev/null")


def test_a_link_stays_and_what_it_names_is_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder" / "target.txt", tmp_path / "link.txt"
    target.write_text("old", encoding="utf-8")
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text(encoding="utf-8") == "new"


def test_a_file_keeps_its_mode_and_a_new_one_has_the_users(tmp_path: Path) -> None:
    private, new = tmp_path / "private", tmp_path / "new"
    private.write_text("old", encoding="utf-8")
    private.chmod(0o600)
    write_text(private, "new")
    assert private.stat().st_mode & 0o777 == 0o600
    code = f"from pathlib import Path; from theory.records import write_text; write_text(Path({str(new)!r}), '')"
    subprocess.run(["sh", "-c", 'umask 027; exec "$@"', "sh", sys.executable, "-c", code], check=True, cwd=ROOT)
    assert new.stat().st_mode & 0o777 == 0o640


def test_what_breaks_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old", encoding="utf-8")

    def broken() -> None:
        with replacing(file) as temporary:
            temporary.write_text("half", encoding="utf-8")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        broken()
    assert [path.read_text(encoding="utf-8") for path in tmp_path.iterdir()] == ["old"]


def test_a_table_that_nobody_reads_ends_as_any_output_does() -> None:
    """Of rich, which ends with 1, the status of what failed, by itself."""
    line = [sys.executable, "-m", "theory", "--only", "prop1-scc", "--examples", "1", "--jobs", "1"]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        told = process.stderr.read()
    assert (process.returncode, b"Traceback" in told) == (128 + signal.SIGPIPE, False)


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_a_command_whose_output_is_closed_ends_well(closed: str) -> None:
    line = f'"$0" -m theory --only prop1-scc --examples 1 --jobs 1 {closed}'
    done = subprocess.run(["sh", "-c", line, sys.executable], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
