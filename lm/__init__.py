"""Reward-distillation preference optimisation of language models, trained on the losses of `theory.losses`."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm.base.memory import align_large_tensors

if TYPE_CHECKING:
    from lm.base.progress import be_quiet as be_quiet
    from lm.integrations.python import load as load
    from lm.integrations.python import show as show

OFFERED = {"be_quiet": "lm.base.progress", "load": "lm.integrations.python", "show": "lm.integrations.python"}
"""What Python programs and notebooks begin with -> the module that has it, which is imported when it is asked for."""
__all__ = ["be_quiet", "load", "show"]


def __getattr__(name: str) -> Any:
    if name not in OFFERED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(OFFERED)}")
    return getattr(importlib.import_module(OFFERED[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *OFFERED})


def _check_neighbours() -> None:
    """ImportError, told in a line under `python -m`, where what the user calls theory hides the package beside ours."""
    for name in ("theory", "figures"):
        ours, spec = Path(__file__).resolve().parents[1] / name / "__init__.py", find_spec(name)
        if spec is not None and (place := Path(spec.origin or name).resolve()) != ours:
            raise ImportError(
                f"{place} hides the package {name!r} that `lm` stands on; rename it, or run elsewhere, or by the "
                "command `lm` (as in: lm train) or `python -P -m`, which do not import from the folder they run in",
                name=__name__,
            )


_check_neighbours()
align_large_tensors()  # here, as torch looks once, at its first tensor
