"""What the C library does with memory that is free again: kept for the next tensors, and given back between stages."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from pathlib import Path
from typing import Any

ALIGNED = "THP_MEM_ALLOC_ENABLE"
"""torch's switch: in the environment, 1 or 0."""

MOST_KEPT = 2**30
"""Bytes of it that are kept; where there are more, all are given back: to take a page anew costs more than to keep it.
[set]"""


class _Info(ctypes.Structure):
    """`struct mallinfo2`; uordblks and hblkhd are in use. What is free counts pages too that were given back."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def _glibc() -> Any:
    """The library; None where it is another one."""
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return None
    return ctypes.CDLL("libc.so.6")


def align_large_tensors() -> None:
    """Has torch begin tensors of 2 MiB or more at a page, and ask for huge ones; what the environment says already
    stands. It has to be said before torch makes its first tensor.

    Else they begin at multiples of 64 bytes. For these glibc takes a piece that is some bytes longer, and keeps what it
    cuts off among its small pieces, so that the piece, once free, is too short for the next tensor of its size. With
    the large gradients of Gemma's vocabulary the heap then grew at every step (docs/performance.md).
    """
    os.environ.setdefault(ALIGNED, "1")


def forget_alignment() -> None:
    """Has a process whose torch made no tensor yet ask for memory as torch does by itself."""
    os.environ.pop(ALIGNED, None)


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed blocks: else every step's large tensors are mapped and page-faulted anew.

    Returns whether it was done; other C libraries are left as they are.
    """
    if (library := _glibc()) is None:
        return False
    threshold, trim, pad = -3, -1, -2  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD of malloc.h
    most = 2**31 - 1
    return all(library.mallopt(name, value) == 1 for name, value in ((threshold, most), (trim, most), (pad, 2**26)))


def give_back_freed_memory() -> bool:
    """Has glibc give the pages that are free back to the system where more than MOST_KEPT are in memory: what one stage
    leaves in pieces would lie beside what the next one needs. Returns whether it did."""
    library = _glibc()
    if library is None or not hasattr(library, "mallinfo2"):  # which glibc has since 2.33
        return False
    library.mallinfo2.restype = _Info
    now = library.mallinfo2()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    free = int(status["RssAnon"].split()[0]) * 1024 - now.uordblks - now.hblkhd
    return bool(free > MOST_KEPT and library.malloc_trim(0) == 1)
