"""Freed memory is kept for the next tensors, and given back where a stage leaves much of it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from lm.base.memory import (
    ALIGNED,
    align_large_tensors,
    forget_alignment,
    give_back_freed_memory,
    keep_freed_memory,
)

GLIBC = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"


def test_the_allocator_setting_is_taken_by_glibc_and_left_alone_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        assert keep_freed_memory()
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1.2"))
    assert not keep_freed_memory()


HELD = """
import numpy
from lm.base import memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

assert memory.keep_freed_memory()
memory.MOST_KEPT = {most}
before = resident()
blocks = [numpy.ones(2**21) for _ in range(8)]  # 16 MiB each
last = numpy.ones(2**20)  # above them: the heap's end does not shrink
del blocks
kept = resident() - before
done = memory.give_back_freed_memory()
print(done, kept > 2**27, resident() - before < 2**25, memory.give_back_freed_memory())
"""


@pytest.mark.skipif(not GLIBC, reason="the C library is another one")
@pytest.mark.parametrize(("most", "told"), [(2**26, "True True True False"), (2**30, "False True False False")])
def test_pages_that_are_free_are_given_back_where_they_are_many(most: int, told: str) -> None:
    """In a process of its own, of which the heap is known. What was given back is not given back again."""
    code = HELD.format(most=most)
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == told


WHERE = """
from lm.base import memory
memory.{said}()
import torch
print(torch.ones(2**20).data_ptr() % 4096 == 0)  # 4 MiB
"""


@pytest.mark.skipif(sys.platform != "linux", reason="torch knows the switch on Linux")
@pytest.mark.parametrize(("said", "aligned"), [("align_large_tensors", True), ("forget_alignment", False)])
def test_large_tensors_begin_at_a_page(said: str, aligned: bool) -> None:
    """In a process of its own, as torch looks once."""
    done = subprocess.run([sys.executable, "-c", WHERE.format(said=said)], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == str(aligned)


def test_what_the_environment_says_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALIGNED, "0")
    align_large_tensors()
    assert os.environ[ALIGNED] == "0"
    forget_alignment()
    assert ALIGNED not in os.environ
    align_large_tensors()
    assert os.environ[ALIGNED] == "1"


def test_elsewhere_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1.2"))
    assert not give_back_freed_memory()
