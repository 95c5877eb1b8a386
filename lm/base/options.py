"""Options of a run from YAML files and the command line, and the help on them."""

from __future__ import annotations

import difflib
import json
import re
import reprlib
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace

from lm.base import effects
from lm.base.command import Help, add_common, epilog
from lm.base.documents import NOTHING, Document, read_document
from lm.base.files import expanded
from lm.base.sources import CONFIGS as CONFIGS
from lm.base.sources import Sources, in_group_too, loaded, presets, sources_of
from lm.config import KINDS, OWN_SET, Config, ExactConfig, TrainingConfig
from lm.objectives import METHODS, option_of
from theory.shell import MISTAKEN, said_twice

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

    def check_once(self, words: Sequence[str]) -> None:
        """Leaves with a message for an option that stands twice, of which jsonargparse would take the last."""
        if twice := said_twice(self._actions, words) or in_group_too([*(self.groups or ())], words):
            self.error(twice)

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
        examples = ("", "--config helpfulness --output_dir runs/helpfulness", "--print_config")
    parser = Parser(
        prog=f"python -m {command}",
        usage="%(prog)s [--config NAME] [--OPTION VALUE ...]",  # the generated one hides an error under 90 lines
        description=f"{description} Without --config, the preset {preset} (the embedded world) is used, for a set of "
        f"your own (--data.kind) scratch.yaml, or {PRETRAINED} with a --model of yours. Presets go by their names: "
        f"{', '.join(presets())}; they are files in {CONFIGS}. A set that is read keeps its own labels and all its "
        "pairs, and its lengths are the limits, where nothing else is said.",
        epilog=epilog(command, examples),
        formatter_class=ConfigHelp,
    )
    add_config(parser, Config)
    return parser


def add_config(parser: ArgumentParser, kind: type[Config] | type[ExactConfig]) -> None:
    """--config, the fields of a config, a group of options for each method, and what every command has."""
    says = "Preset by name, or YAML file; later ones win, options over all."
    parser.add_argument("--config", action="config", help=says)
    add_common(parser)
    parser.add_class_arguments(kind, skip={"options"}, fail_untyped=True)
    for name, method in kind.KNOWN.items():
        parser.add_class_arguments(method, option_of(name), fail_untyped=True)


# ---------------------------------------------------------------- options


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
    return _parsed(parser, command, arguments, preset, shared=shared)


def parse_values(configs: Sequence[str], values: Mapping[str, Any]) -> tuple[Config, str]:
    """As `parse`, from Python: raises ValueError for whatever is wrong.

    Args:
        configs: presets by name, or files; without any, those of a command without --config.
        values: options as a file has them, groups of them as mappings; they win over configs.
    """
    parser = parser_of("lm.train", "")
    parser.exit_on_error = False
    try:
        words = [f"--config={config}" for config in configs] + list(_words(parser, values))
        return _parsed(parser, "lm.train", words, "demo.yaml", shared=False)
    except (ArgumentError, ValueError) as error:
        raise ValueError(re.sub(r"--(?=\w)(?!config )", "", parser.plain(str(error)))) from None


def _words(parser: Parser, values: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """Values as a command line has them, where whatever is written is a text."""
    kinds = {action.dest: getattr(action, "_typehint", None) for action in parser._actions}
    for name, value in values.items():
        option = f"{above}{name}"
        if option in ("debug", "quiet", "print_config", "help"):
            raise ValueError(f"{option} is an option of commands alone; lm.be_quiet is there for Python")
        if isinstance(value, Mapping) and option in (parser.groups or ()):
            yield from _words(parser, value, f"{option}.")
            continue
        hint = kinds.get(option)
        either = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        if str in either and not isinstance(value, str | PurePath) and type(value) not in either:
            raise ValueError(f"{option} must be {in_words(hint)}, got {value!r}")
        try:
            text = str(value) if isinstance(value, str | PurePath) else json.dumps(value)
        except (TypeError, ValueError):
            kind = type(value).__name__
            raise ValueError(
                f"{option} must be text, a number, true or false, null, or a list or mapping of these, "
                f"got {kind}: {value!r}"
            ) from None
        yield f"--{option}={text}"


def _parsed(parser: Parser, command: str, arguments: Sequence[str], preset: str, *, shared: bool) -> tuple[Config, str]:
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
        given = {name: loaded(value) for name, value in sources.given.items()}
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
    said = _with_one_length(parser, _nested({name: loaded(value) for name, value in sources.given.items()}))
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
    an earlier source may have given, is null. So are both where a head is solved for, and nothing is said of them."""
    changed = dict(values)
    for stage in _trainings(parser):
        group = values.get(stage)
        if not isinstance(group, dict):
            continue
        said = [name for name in LENGTHS if group.get(name) is not None]
        if len(said) == 1 or (group.get("train") == "head" and not said):
            changed[stage] = {**dict.fromkeys(LENGTHS), **group}
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
