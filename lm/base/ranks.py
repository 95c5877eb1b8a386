"""Several processes at one command, as torchrun and accelerate launch start them: ranks, that run the same lines.

They share out training and scoring. What is to be done once, the first rank does, and the others wait for it. Outside
`together` every process is on its own here, whoever started it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

from lm.base import hosts

T = TypeVar("T")
PATIENCE = timedelta(days=7)
"""How long ranks wait for one that is alive. One that ends takes its connections along, which is noticed at once; of
those on a machine that falls silent see `lm.base.hosts`."""

_group: Any = None


def _dist() -> Any:
    """torch.distributed, which takes seconds to import: only where there are ranks."""
    import torch.distributed

    return torch.distributed


def count() -> int:
    """How many ranks work together here."""
    return 1 if _group is None else _dist().get_world_size(_group)


def index() -> int:
    """This rank's number, from 0."""
    return 0 if _group is None else _dist().get_rank(_group)


def is_first() -> bool:
    """Whether this rank writes files and prints."""
    return index() == 0


def launched() -> int:
    """How many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def sharding() -> bool:
    """Whether `accelerate launch` was asked for FSDP."""
    return _flag("ACCELERATE_USE_FSDP")


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true")


def check_launch() -> None:
    """Raises ValueError, in the terms of accelerate's config file, for what it asks for and is not done here."""
    if _flag("ACCELERATE_USE_DEEPSPEED") or _flag("ACCELERATE_USE_MEGATRON_LM"):
        asked = "DEEPSPEED" if _flag("ACCELERATE_USE_DEEPSPEED") else "MEGATRON_LM"
        raise ValueError(f"distributed_type must be FSDP, or MULTI_GPU for DDP, got {asked}")
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        raise ValueError(
            f'mixed_precision must be "no", got {precision!r}: our option logprobs.autocast says it, for training and '
            "scoring alike"
        )
    if not sharding():
        return
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ValueError(f"fsdp_config.fsdp_version must be 2, got {version}")
    kind = os.environ.get("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
    if kind != "SHARDED_STATE_DICT":
        raise ValueError(
            f"fsdp_config.fsdp_state_dict_type must be SHARDED_STATE_DICT, got {kind}: ranks that resume from another "
            "wait for each other for good; it is about checkpoints, models are saved whole all the same"
        )
    if _flag("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise ValueError(
            "fsdp_config.fsdp_cpu_ram_efficient_loading must be false, got true: it loads models on the first rank "
            "only, and every rank scores with a whole one"
        )


@contextlib.contextmanager
def together(device: str, host_timeout: float = hosts.TIMEOUT) -> Iterator[None]:
    """Connects the launched processes. Inside, only the first prints.

    Args:
        device: what they compute on, "auto" or "cpu".
        host_timeout: seconds for which another host may be silent before this process ends.

    Raises ValueError for what the launcher was asked for in vain, see `check_launch`.
    """
    global _group  # noqa: PLW0603
    check_launch()
    if launched() == 1:
        yield
        return
    import torch
    from accelerate import PartialState

    PartialState(cpu=device == "cpu" or not torch.accelerator.is_available(), timeout=timedelta(minutes=30))
    # Gloo, as its waiting has a limit of its own: that of training (NCCL) is far shorter than the scoring of a set.
    _group = _dist().new_group(backend="gloo", timeout=PATIENCE)
    try:
        with contextlib.ExitStack() as stack:
            if not is_first():
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            with hosts.heard(index(), from_all, host_timeout):
                yield
                wait()  # one that left before the others would be silent
        # Not after an error: others may be in the middle of it, and are ended by the launcher.
        _dist().destroy_process_group()
    finally:
        _group = None


def wait() -> None:
    """Returns when every rank has come here."""
    if _group is not None:
        _dist().barrier(_group)


def from_first(compute: Callable[[], T]) -> T:
    """What the first rank computes, by itself, on every rank."""
    global _group  # noqa: PLW0603
    if _group is None:
        return compute()
    group, answer = _group, list[T | None]([None])
    if is_first():
        _group = None
        try:
            answer = [compute()]
        finally:
            _group = group
    _dist().broadcast_object_list(answer, src=0, group=group)
    return answer[0]  # type: ignore[return-value]


def from_all(value: T) -> list[T]:
    """Every rank's value, in the order of the ranks, on every rank."""
    if _group is None:
        return [value]
    values = list[T | None]([None] * count())
    _dist().all_gather_object(values, value, group=_group)
    return values  # type: ignore[return-value]


def last_words(text: str) -> None:
    """Says on stderr why the command ends, once: the first rank to come here speaks, the others return when it has."""
    if launched() == 1:
        print(text, file=sys.stderr)
        return
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, _ = next(rendezvous("env://"))
        if store.compare_set("last words/speaker", "", str(rank)).decode() == str(rank):
            print(text, file=sys.stderr, flush=True)
            store.set("last words/spoken", "")
        else:  # leaving before the speaker would make the launcher end it, and name this rank as the cause
            store.wait(["last words/spoken"], timedelta(minutes=1))
            time.sleep(5)
    except RuntimeError:  # the launcher's store is out of reach
        print(text, file=sys.stderr, flush=True)
