"""Command lines that tests put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def over(defaults: Mapping[str, str], options: Sequence[str]) -> list[str]:
    """Options, and of the defaults those that they do not name: no option stands twice."""
    named = {word.partition("=")[0] for word in options}
    kept = [word for name, value in defaults.items() if name not in named for word in (name, value)]
    return [*kept, *options]
