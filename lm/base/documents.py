"""Files of options: YAML that is read strictly, each option with the line where it stands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

DEEPEST = 20
"""Levels of lists and mappings in options."""
RETIRED: dict[str, tuple[Any, str]] = {
    "data.subset": (None, "name the folder in data.path, as owner/name/folder"),
    "lora.dropout": (0.0, "there is none: completions share their prompt's forward pass, and would share its noise"),
    "drdo_oracle_alpha": (None, "it is drdo.oracle_alpha now"),
}
"""Options of earlier versions -> the value at which they did nothing, and what to do about another one."""
NOTHING = {"train": "nothing", "epochs": None, "max_steps": None}
"""What `sft: null` stands for: the model is pi_ref as it is."""
_jsonargparse_load = get_loader("yaml")


@dataclass(frozen=True)
class Document:
    """Options of a file."""

    path: Path
    values: dict[str, Any]
    lines: dict[str, int]
    """Where each option stands, by its dotted name, from 1; groups too."""

    def where(self, name: str) -> str | None:
        """File and line of an option, or of what it is in; None where it is not here."""
        while name not in self.lines:
            name, dot, _ = name.rpartition(".")
            if not dot:
                return None
        return f"{self.path}, line {self.lines[name]}"

    def value(self, name: str) -> Any:
        """What the file says of an option; `...` where it says nothing."""
        group: Any = self.values
        for part in name.split("."):
            if not isinstance(group, dict) or part not in group:
                return ...
            group = group[part]
        return group


def read_document(path: Path) -> Document:
    """Raises ValueError with the file, and the line where there is one, for what is no mapping of options."""
    if path.is_dir():
        there = ", ".join(sorted(file.name for file in path.glob("*.y*ml"))) or "none"
        raise ValueError(f"--config: {path} is a folder, and a YAML file is needed; those in it: {there}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--config: {path} is not text in UTF-8 ({error})") from None
    lines: dict[str, int] = {}
    try:
        values = _strictly(text)
        lines = {name: mark.line + 1 for name, mark in _keys(_node(text))}
        values = _spelled_out(without_retired(values))
    except Retired as error:
        raise ValueError(f"{path}, line {lines[error.name]}: {error}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}{told(error)}") from None
    if not isinstance(values, dict):
        got = "nothing" if values is None else f"{type(values).__name__}: {text.strip()[:60]!r}"
        raise ValueError(f"--config: {path} must hold a mapping of options, as `seed: 1`, got {got}")
    return Document(path, values, lines)


def told(error: yaml.YAMLError) -> str:
    """A YAML error in one line, after what it is of: its place and what is wrong."""
    mark = getattr(error, "problem_mark", None)
    context = getattr(error, "context", None)
    what = getattr(error, "problem", None) or str(error)
    words = " ".join(f"{what}{f' ({context})' if context else ''}".split())
    return f"{'' if mark is None else f', line {mark.line + 1}'}: {words}"


# ---------------------------------------------------------------- YAML


class Retired(yaml.YAMLError):  # type: ignore[misc]
    """An option of an earlier version that did something."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


def load_yaml(text: str) -> Any:
    """jsonargparse's loader, kept from what it hangs on, falls over, or passes over. Raises yaml.YAMLError.

    An alias to what it stands in sends it round for ever, others can stand for billions of values: none is read. Of a
    name that stands twice it would take the last.
    """
    return _spelled_out(without_retired(_strictly(text)))


def _strictly(text: str) -> Any:
    depth = 0
    try:
        for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            if isinstance(event, yaml.AliasEvent):
                raise _error("aliases (*name) are not read; write out what they stand for", event.start_mark)
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise _error(f"it is nested more than {DEEPEST} deep", event.start_mark)
        if any(mark in text for mark in "{:"):  # else there is no mapping
            _refuse_twice(_node(text))
        return _jsonargparse_load(text)
    except (ValueError, TypeError) as error:  # numbers of thousands of digits, lists as names
        raise yaml.YAMLError(f"not YAML that can be read ({error})") from None


def _spelled_out(options: Any) -> Any:
    """With what `sft: null` stands for."""
    if isinstance(options, dict) and "sft" in options and options["sft"] is None:
        options["sft"] = dict(NOTHING)
    return options


def _error(problem: str, mark: Any) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _node(text: str) -> Any:
    return yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _refuse_twice(node: Any) -> None:
    if isinstance(node, yaml.MappingNode):
        first: dict[str, Any] = {}
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in first:
                line = first[key.value].line + 1
                raise _error(f"{key.value!r} stands twice, first in line {line}; leave one", key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                first[key.value] = key.start_mark
            _refuse_twice(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_twice(item)


def _keys(node: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, mark) of all names in nested mappings."""
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        name = f"{above}{key.value}"
        yield name, key.start_mark
        yield from _keys(value, f"{name}.")


def without_retired(options: Any) -> Any:
    """Options of an earlier version's file without those that did nothing there. Raises Retired for one that did."""
    for name, (value, cure) in RETIRED.items():
        *above, last = name.split(".")
        group = options
        for part in above:
            group = group.get(part) if isinstance(group, dict) else None
        if isinstance(group, dict) and last in group:
            if group[last] != value:
                raise Retired(name, f"option {name} is no more, got {group[last]!r}: {cure}")
            del group[last]
    return options


set_loader("yaml", load_yaml, (yaml.YAMLError,))


def flat(options: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested options as dotted names and values; what a key says of a dataclass beside its fields is left out."""
    rows: list[tuple[str, Any]] = []
    for name, value in options.items():
        if isinstance(value, Mapping):
            rows += flat(value, f"{prefix}{name}.")
        elif name != "__class__":
            rows.append((prefix + name, value))
    return rows
