"""Options of a run from YAML files and the command line, and the help on them."""

from __future__ import annotations

import difflib
import json
import re
import reprlib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from lm.base import effects
from lm.base.command import Help, add_common, epilog
from lm.base.documents import NOTHING, Document, load_yaml, read_document, told
from lm.base.files import expanded
from lm.config import KINDS, OWN_SET, Config, ExactConfig, TrainingConfig
from lm.objectives import METHODS, option_of
from theory.shell import MISTAKEN

CONFIGS = Path(__file__).parents[1] / "configs"
PATHS = (
    *("output_dir", "model", "oracle_model", "oracle_base", "reward_base"),
    *("data.path", "data.sft_path", "evaluation.out_of_domain.path"),
)
"""Options that may name a file or folder."""


class ConfigHelp(Help, DefaultHelpFormatter):
    """`Help`, of a parser with a config."""


class Parser(ArgumentParser):
    """Says a mistake in a line that names the option, what it was given and what would be right; takes whole names."""

    sources: Sources | None = None
    """What is parsed."""
    reading: Document | None = None
    """The file that is, now."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False, **options})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        self.exit(MISTAKEN, f"error: {self.plain(message)}\n")

    def plain(self, message: str) -> str:
        """jsonargparse's message in one line, in our words where it is about an option's name or value."""
        line = " ".join(message.split())
        if left := re.fullmatch("unrecognized arguments: (.*)", line):
            names = [word.partition("=")[0] for word in left[1].split() if word.startswith("-")]
            if not names and all(action.option_strings for action in self._actions):
                return f"{line}; all arguments are options, --OPTION VALUE"
            return line + "".join(map(self.meant, names))
        if key := re.fullmatch("Group '(.+?)' does not accept option '(.+?)'", line):
            name = f"{key[1]}.{key[2]}"
            return f"{self.at(name)}there is no option --{name}{self.meant(f'--{name}')}"
        if key := re.fullmatch("Option '(.+?)' is not accepted", line):
            return f"{self.at(key[1])}there is no option --{key[1]}{self.meant(f'--{key[1]}')}"
        if key := re.match(r'Parser key "([^"]+)":\s', message):
            return self.at(key[1].partition("[")[0]) + (self.about(key[1], message) or line)
        return line

    def at(self, name: str) -> str:
        """Where a file has an option, to begin a message with; empty where the command line has it."""
        if self.reading is not None:
            return f"{self.reading.where(name) or self.reading.path}: "
        if self.sources is None or name in self.sources.given:
            return ""
        places = (document.where(name) for document in reversed(self.sources.documents) if name in document.lines)
        return "".join(f"{place}: " for place in [*places][:1])

    def meant(self, name: str) -> str:
        """A hint at the options that are most like an unknown one; empty where none is."""
        known = [option[2:] for action in self._actions for option in action.option_strings if option.startswith("--")]
        wanted = name.lstrip("-").replace("-", "_")
        close = [option for option in known if option.endswith(f".{wanted}")]
        close = close or difflib.get_close_matches(wanted, known, n=1, cutoff=0.75)
        if not close:
            return ""
        return f"; did you mean {' or '.join(f'--{option}' for option in close[:3])}{' or ...' * (len(close) > 3)}?"

    def about(self, key: str, message: str) -> str | None:
        """What an option must be and what it got; None where jsonargparse says something else about it."""
        name = key.partition("[")[0]
        said = r"(?:Got value: |Given value: |Unable to load config ')(.*?)(?:'\s*\n  - .*)?\Z"
        given = re.search(said, message, flags=re.DOTALL)
        if not given:
            return None
        value = given[1] if re.fullmatch(r"[-+.\w]+", given[1]) else reprlib.repr(given[1])
        group = [action.dest for action in self._actions if action.dest.startswith(f"{name}.")]
        if group:
            return f"--{key} is a group of options, got {value}; name one of it, as --{group[0]}"
        hint = next((getattr(action, "_typehint", None) for action in self._actions if action.dest == name), None)
        if hint is None:
            return None
        example = f", as in --{name} '[{given[1]}]'" if "Expected a <class 'list'>" in message else ""
        return f"--{key} must be {in_words(hint)}{example}, got {value}"


def in_words(hint: Any) -> str:
    """What a value of this type is: "a whole number or null"."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return " or ".join(map(in_words, inner))
    if kind is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if kind is list:
        return f"a list, {in_words(inner[0])} each"
    if kind is tuple:
        return f"a list of {len(inner)}, {in_words(inner[0])} each"
    if kind is dict:
        return "a mapping"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return words.get(hint) or str(getattr(hint, "__name__", hint))


def parser_of(
    command: str, description: str, preset: str = "demo.yaml", examples: Sequence[str] | None = None
) -> Parser:
    """All fields of `lm.config.Config` as dotted options, plus --config, --print_config, --debug and --quiet."""
    if examples is None:
        examples = ("", "--config lm/configs/helpfulness.yaml --output_dir runs/helpfulness", "--print_config")
    parser = Parser(
        prog=f"python -m {command}",
        usage="%(prog)s [--config FILE] [--OPTION VALUE ...]",  # the generated one hides an error under 90 lines
        description=f"{description} Without --config, the preset {preset} (the embedded world) is used, for a set of "
        f"your own (--data.kind) scratch.yaml, or {PRETRAINED} with a --model of yours; others are in {CONFIGS}. A set "
        "that is read keeps its own labels and all its pairs, and its lengths are the limits, where nothing else is "
        "said.",
        epilog=epilog(command, examples),
        formatter_class=ConfigHelp,
    )
    add_config(parser, Config)
    return parser


def add_config(parser: ArgumentParser, kind: type[Config] | type[ExactConfig]) -> None:
    """--config, the fields of a config, a group of options for each method, and what every command has."""
    parser.add_argument("--config", action="config", help="YAML file with options; later ones win, options over all.")
    add_common(parser)
    parser.add_class_arguments(kind, skip={"options"}, fail_untyped=True)
    for name, method in kind.KNOWN.items():
        parser.add_class_arguments(method, option_of(name), fail_untyped=True)


# ---------------------------------------------------------------- options


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
        self.given = dict(_named(self.rest))

    def last(self, name: str) -> Any:
        """What an option is set to; `...` where it is not."""
        if name in self.given:
            return self.given[name]
        group, _, own = name.rpartition(".")
        if group in self.given and isinstance(value := _loaded(self.given[group]), dict) and own in value:
            return value[own]
        values = (document.value(name) for document in reversed(self.documents))
        return next((value for value in values if value is not ...), ...)


def _named(arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    for number, argument in enumerate(arguments):
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            after = arguments[number + 1] if number + 1 < len(arguments) else "--"
            yield name, value if equals else None if after.startswith("--") else after


def _loaded(text: str | None) -> Any:
    try:
        return load_yaml(text or "")
    except yaml.YAMLError:
        return text


def sources_of(parser: Parser, arguments: Sequence[str]) -> Sources:
    """Reads the files. Leaves with a message for one that is no file of options, and for a name that stands twice."""
    paths, rest, waiting = [], [], False
    for argument in arguments:
        if waiting or argument.startswith("--config="):
            paths.append(argument if waiting else argument.partition("=")[2])
            waiting = False
        elif argument == "--config":
            waiting = True
        else:
            rest.append(argument)
    if waiting or "" in paths:
        parser.error("--config needs a file")
    documents = []
    try:
        for path in map(expanded, paths):
            if not Path(path).exists():
                presets = ", ".join(sorted(file.name for file in CONFIGS.glob("*.yaml")))
                parser.error(f"--config: there is no file {path!r}; the presets in {CONFIGS} are {presets}")
            documents.append(document := read_document(Path(path)))
            for name in ("config", "debug", "quiet"):
                if document.values.get(name):  # --print_config writes the last two
                    raise ValueError(f"{document.where(name)}: {name} is an option of the command line alone")
        for name, value in _named(rest):
            if value is not None and value.lstrip()[:1] in ("{", "["):
                try:
                    load_yaml(value)
                except yaml.YAMLError as error:
                    if not isinstance(error, yaml.scanner.ScannerError | yaml.parser.ParserError):
                        raise ValueError(f"--{name}{told(error)}") from None
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return Sources(documents, rest)


def parse(
    command: str,
    description: str,
    arguments: Sequence[str],
    preset: str = "demo.yaml",
    examples: Sequence[str] | None = None,
    *,
    shared: bool = False,
) -> tuple[Config, str]:
    """(config, resolved YAML). Leaves with status 2 and a message where an option is unknown or of the wrong type;
    raises ValueError where its value is out of range, or where it has no effect (see `lm.base.effects`).

    Args:
        command: its module.
        description: for the help text.
        arguments: the command line.
        preset: the config that is used without --config, and where the data is no set of one's own.
        examples: for the help text.
        shared: the options are those of several runs, and may be about others than this one.
    """
    parser = parser_of(command, description, preset, examples)
    sources = sources_of(parser, _null_as_options(arguments))
    own = sources.last("data.kind") in KINDS
    if not sources.documents:
        if own:
            preset = "scratch.yaml" if str(sources.last("model")).startswith(("scratch:", "Ellipsis")) else PRETRAINED
        sources.documents = [read_document(CONFIGS / preset)]
    if own:
        sources.documents = [Document(CONFIGS / OWN, dict(OWN_SET), {}), *sources.documents]
    fields, resolved = _resolve(parser, sources)
    config = Config(**fields)
    if not shared:
        users = [one for one in sources.documents if one.path.resolve().parent != CONFIGS.resolve()]
        given = {name: _loaded(value) for name, value in sources.given.items()}
        effects.check(config, command, given, users, {action.dest: action.default for action in parser._actions})
    return config, resolved


PRETRAINED = "pretrained.yaml"
OWN = "(a set of one's own)"


def _null_as_options(arguments: Sequence[str]) -> list[str]:
    """`--sft null` as the options that it stands for."""
    found = list(arguments)
    for at, argument in reversed(list(enumerate(found))):
        size = 1 if argument == "--sft=null" else 2 if found[at : at + 2] == ["--sft", "null"] else 0
        if size:
            found[at : at + size] = [
                part for name, value in NOTHING.items() for part in (f"--sft.{name}", value or "null")
            ]
    return found


def resolve(parser: Parser, arguments: Sequence[str]) -> tuple[dict[str, Any], str]:
    """(fields of the config, YAML of them), without the options that are about the command and not the run."""
    return _resolve(parser, sources_of(parser, arguments))


def _resolve(parser: Parser, sources: Sources) -> tuple[dict[str, Any], str]:
    options, rest = None, sources.rest
    parser.sources = sources
    for document in sources.documents:
        parser.reading = document
        values = _with_one_length(parser, document.values)
        options = parser.parse_object(values, namespace=options, _skip_validation=True)
    parser.reading = None
    said = _with_one_length(parser, _nested({name: _loaded(value) for name, value in sources.given.items()}))
    unsaid = [
        f"--{stage}.{name}=null"
        for stage in _trainings(parser)
        for name in LENGTHS
        if f"{stage}.{name}" not in sources.given and said.get(stage, {}).get(name, ...) is None
    ]
    options = parser.parse_args([*unsaid, *rest], namespace=options)
    _check_kinds(parser, options)
    for name in PATHS:
        if isinstance(options.get(name), str):
            options[name] = expanded(options[name])
    try:
        fields = vars(parser.instantiate(options))
    except ValueError:
        _name_group(parser, options)
        raise
    for own in ("debug", "quiet"):
        del fields[own], options[own]
    resolved = parser.dump(options, skip_unset=False, skip_validation=True)
    fields.pop("config", None)
    fields["options"] = {name: fields.pop(option_of(name)) for name in METHODS if option_of(name) in fields}
    return fields, resolved


LENGTHS = ("epochs", "max_steps")


def _trainings(parser: Parser) -> list[str]:
    """Names of the groups that are a `TrainingConfig`."""
    return [name for name in parser.groups or () if f"{name}.max_steps" in (a.dest for a in parser._actions)]


def _with_one_length(parser: Parser, values: Mapping[str, Any]) -> dict[str, Any]:
    """Options of one source, in which a training that says how long says it alone: the length in the other unit, which
    an earlier source may have given, is null."""
    changed = dict(values)
    for stage in _trainings(parser):
        group = values.get(stage)
        if isinstance(group, dict) and len(said := [n for n in LENGTHS if group.get(n) is not None]) == 1:
            changed[stage] = {**dict.fromkeys(LENGTHS), **group} if said else group
    return changed


def _nested(options: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names as mappings in mappings."""
    nested: dict[str, Any] = {}
    for name, value in options.items():
        *above, last = name.split(".")
        group = nested
        for part in above:
            group = group.setdefault(part, {})
            if not isinstance(group, dict):
                break
        else:
            group[last] = value
    return nested


def _check_kinds(parser: Parser, options: Namespace) -> None:
    """ValueError where one value stands for a group of options, or null for what cannot be null: jsonargparse lets
    both through."""
    for group in parser.groups or ():
        value = options.get(group, {})
        if not isinstance(value, Namespace | dict):
            raise ValueError(f"--{group} must be a mapping of its options, got {json.dumps(value, default=str)}")
    for action in parser._actions:
        hint = getattr(action, "_typehint", None)
        if hint is not None and options.get(action.dest, ...) is None and type(None) not in get_args(hint):
            raise ValueError(f"--{action.dest} must not be null")


def _name_group(parser: Parser, options: Namespace) -> None:
    """ValueError for a group of options that cannot be, with the group where others are of the same kind."""
    for name in _trainings(parser):
        try:
            TrainingConfig(**options[name].as_dict())
        except ValueError as error:
            raise ValueError(f"{error} for {name}") from None
    for name, method in METHODS.items():
        group = option_of(name)
        if group not in (parser.groups or ()):
            continue
        try:
            parser.instantiate(Namespace({group: options[group]}))  # type: ignore[no-untyped-call]
        except ValueError as error:
            raise ValueError(str(error) if method.__name__ in str(error) else f"{error} for {group}") from None
