"""Where the options of a run come from: presets and files, of which later ones win, then the command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lm.base import progress
from lm.base.documents import Document, load_yaml, read_document, told
from lm.base.files import expanded

if TYPE_CHECKING:
    from lm.base.options import Parser

CONFIGS = Path(__file__).parents[1] / "configs"

# ---------------------------------------------------------------- presets


def presets() -> dict[str, Path]:
    """The presets by name."""
    return {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}


def config_file(given: str) -> Path:
    """What --config names: a file, or else the preset of that name, with or without .yaml, from whatever folder.

    A file wins over a preset, which is said; a folder does not. Raises ValueError for what is neither.
    """
    path, known = Path(expanded(given)), presets()
    preset = known.get(given.removesuffix(".yaml"))
    if preset is not None and not path.is_file():
        return preset
    if path.exists():
        if preset is not None and not path.samefile(preset):
            progress.say(f"--config {given} is the file {path.absolute()}, and not the preset {preset}")
        return path
    close = [path.stem] if path.stem in known else difflib.get_close_matches(path.stem, known, n=1, cutoff=0.7)
    hint = f"; did you mean --config {close[0]}?" if close else ""
    named = ", ".join(one.name for one in known.values())
    raise ValueError(
        f"--config: there is no file {given!r}; the presets in {CONFIGS} are {named}, each known by its name as well"
        f"{hint}"
    )


# ---------------------------------------------------------------- sources


@dataclass
class Sources:
    """Where options come from: files, of which later ones win, then the command line, wherever --config stands in it.

    Args:
        documents: the files.
        rest: the command line without --config.
    """

    documents: list[Document]
    rest: list[str]
    given: dict[str, str | None] = field(init=False)
    """Options of the command line, by name, with their text."""

    def __post_init__(self) -> None:
        self.given = dict(named(self.rest))

    def last(self, name: str) -> Any:
        """What an option is set to; `...` where it is not."""
        if name in self.given:
            return self.given[name]
        group, _, own = name.rpartition(".")
        if group in self.given and isinstance(value := loaded(self.given[group]), dict) and own in value:
            return value[own]
        values = (document.value(name) for document in reversed(self.documents))
        return next((value for value in values if value is not ...), ...)


def named(arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """(name, text) of each option of a command line; None where nothing follows it."""
    for number, argument in enumerate(arguments):
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            after = arguments[number + 1] if number + 1 < len(arguments) else "--"
            yield name, value if equals else None if after.startswith("--") else after


def loaded(text: str | None) -> Any:
    """What an option's text stands for; the text where that is no YAML."""
    try:
        return load_yaml(text or "")
    except yaml.YAMLError:
        return text


def in_group_too(groups: Sequence[str], arguments: Sequence[str]) -> str | None:
    """What is wrong where an option stands alone and in its group's mapping too, in a line; None where none does."""
    seen: dict[str, str] = {}
    for name, text in named(arguments):
        value = loaded(text) if name in groups else None
        for leaf in _leaves(name, value) if isinstance(value, Mapping) else [name]:
            if leaf in seen and seen[leaf] != name:
                return f"--{leaf} stands twice, in --{seen[leaf]} and in --{name}; leave one"
            seen[leaf] = name
    return None


def _leaves(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, Mapping) and value:
        for own, inner in value.items():
            yield from _leaves(f"{name}.{own}", inner)
    else:
        yield name


def sources_of(parser: Parser, arguments: Sequence[str]) -> Sources:
    """Reads the files. Leaves with a message for one that is no file of options, and for a name that stands twice."""
    names, rest, waiting = [], [], False
    for argument in arguments:
        if waiting or argument.startswith("--config="):
            names.append(argument if waiting else argument.partition("=")[2])
            waiting = False
        elif argument == "--config":
            waiting = True
        else:
            rest.append(argument)
    if waiting or "" in names:
        parser.error("--config needs a file")
    parser.check_once(rest)
    documents = []
    try:
        for path in map(config_file, names):
            documents.append(document := read_document(path))
            for name in ("config", "debug", "quiet"):
                if document.values.get(name):  # --print_config writes the last two
                    raise ValueError(f"{document.where(name)}: {name} is an option of the command line alone")
        for name, value in named(rest):
            if value is not None and value.lstrip()[:1] in ("{", "["):
                try:
                    load_yaml(value)
                except yaml.YAMLError as error:
                    if not isinstance(error, yaml.scanner.ScannerError | yaml.parser.ParserError):
                        raise ValueError(f"--{name}{told(error)}") from None
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return Sources(documents, rest)
