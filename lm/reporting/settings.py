"""A method in the setting that results.json names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, get_type_hints

from lm.objectives import METHODS, Method


def method_of(name: str, setting: Mapping[str, Any]) -> Method:
    """The method in a setting that results.json has; ValueError where this version has no such method or setting."""
    if name not in METHODS:
        raise ValueError(f"methods must be among {', '.join(METHODS)}, which this version has; got {name}")
    try:
        method: Method = _built(METHODS[name], setting)
    except TypeError:
        raise ValueError(f"methods.{name}.setting does not fit this version's {name}: {dict(setting)}") from None
    return method


def _built(kind: Any, options: Mapping[str, Any]) -> Any:
    """A dataclass of its fields' values, those of dataclasses among them as mappings."""
    hints = get_type_hints(kind)
    return kind(**{n: _built(hints[n], v) if is_dataclass(hints.get(n)) else v for n, v in options.items()})
