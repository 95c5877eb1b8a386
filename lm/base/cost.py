"""What making an artifact took: seconds, and the most memory at a time. No result, and in no key."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Meter:
    """A context that measures what is done in it, without what another meter inside it measures: stages ask for those
    below them."""

    _open: ClassVar[list[Meter]] = []

    def __init__(self) -> None:
        self._wall = self._cpu = 0.0
        self._peak = self._cuda = 0
        self._since = (0.0, 0.0)

    def __enter__(self) -> Self:
        if self._open:
            self._open[-1]._stop()
        self._open.append(self)
        self._start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._stop()
        self._open.pop()
        if self._open:
            self._open[-1]._start()

    def _start(self) -> None:
        _restart_peaks()
        self._since = time.perf_counter(), _cpu_seconds()

    def _stop(self) -> None:
        wall, cpu = self._since
        self._wall += time.perf_counter() - wall
        self._cpu += _cpu_seconds() - cpu
        self._peak = max(self._peak, _peak_bytes())
        self._cuda = max(self._cuda, _cuda_peak_bytes())

    def found(self) -> dict[str, Any]:
        """`wall_seconds`; `cpu_seconds` of all threads and of processes that ended in it; `peak_bytes` of resident
        memory, what was there before included; `cuda_peak_bytes` of the accelerator's, where there is CUDA.

        Where the system cannot start its count anew (any but Linux), the peak is the process's so far: an upper bound.
        """
        told: dict[str, Any] = {"wall_seconds": self._wall, "cpu_seconds": self._cpu, "peak_bytes": self._peak or None}
        return told | ({"cuda_peak_bytes": self._cuda} if _has_cuda() else {})


def together(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of all ranks: the CPU seconds of all, of the rest the most of one."""
    whole = dict(found[0])
    for name in whole:
        values = [one[name] for one in found if one.get(name) is not None]
        whole[name] = (sum(values) if name == "cpu_seconds" else max(values)) if values else None
    return whole


def share(found: dict[str, Any], count: int) -> dict[str, Any]:
    """Of one of so many artifacts that were made at once: an equal part of the seconds, and the whole memory."""
    return {name: value / count if name.endswith("_seconds") else value for name, value in found.items()}


def added(found: dict[str, Any], more: dict[str, Any] | None) -> dict[str, Any]:
    """What two pieces of work took, one after the other."""
    whole = dict(found)
    for name, value in (more or {}).items():
        if value is not None:
            mine = found.get(name) or 0
            whole[name] = mine + value if name.endswith("_seconds") else max(mine, value)
    return whole


def _cpu_seconds() -> float:
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def _restart_peaks() -> None:
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5", encoding="ascii")  # the peak of resident memory is what is resident now
    if _has_cuda():
        sys.modules["torch"].cuda.reset_peak_memory_stats()


def _peak_bytes() -> int:
    """Of resident memory; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _has_cuda() -> bool:
    """Whether this process computes on such a device; nothing is imported to know it."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_available() and torch.cuda.is_initialized())


def _cuda_peak_bytes() -> int:
    return int(sys.modules["torch"].cuda.max_memory_allocated()) if _has_cuda() else 0
