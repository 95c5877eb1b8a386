"""Exact optima of preference objectives on bandits, with certificates."""

from importlib.util import find_spec
from pathlib import Path


def _check_neighbour() -> None:
    """As of `lm`: ImportError where what the user calls theory hides the package beside this one."""
    ours, spec = Path(__file__).resolve().parents[1] / "theory" / "__init__.py", find_spec("theory")
    if spec is not None and (place := Path(spec.origin or "theory").resolve()) != ours:
        raise ImportError(
            f"{place} hides the package 'theory' that `bandits` stands on; rename it, or run elsewhere, or by the "
            "command `lm` (as in: lm bandits.transitive) or `python -P -m`",
            name=__name__,
        )


_check_neighbour()
