"""Options of a run from YAML files and the command line, and the help on them."""

from __future__ import annotations

import difflib
import json
import re
import reprlib
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, get_loader, set_loader

from lm.base.command import Help, add_common, epilog
from lm.config import Config, ExactConfig
from lm.objectives import METHODS, option_of
from theory.shell import MISTAKEN

CONFIGS = Path(__file__).parents[1] / "configs"
RETIRED: dict[str, tuple[Any, str]] = {
    "data.subset": (None, "name the folder in data.path, as owner/name/folder"),
    "lora.dropout": (0.0, "there is none: completions share their prompt's forward pass, and would share its noise"),
    "drdo_oracle_alpha": (None, "it is drdo.oracle_alpha now"),
}
"""Options of earlier versions -> the value at which they did nothing, and what to do about another one."""


class ConfigHelp(Help, DefaultHelpFormatter):
    """`Help`, of a parser with a config."""


class Parser(ArgumentParser):
    """Says a mistake in a line that names the option, what it was given and what would be right; takes whole names."""

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
            name = f"--{key[1]}.{key[2]}"
            return f"there is no option {name}{self.meant(name)}"
        if key := re.fullmatch("Option '(.+?)' is not accepted", line):
            return f"there is no option --{key[1]}{self.meant(f'--{key[1]}')}"
        if key := re.fullmatch('Parser key "config": File does not exist: (.*)', line):
            presets = ", ".join(sorted(path.name for path in CONFIGS.glob("*.yaml")))
            return f"--config: there is no file {key[1]}; the presets in {CONFIGS} are {presets}"
        if key := re.match(r'Parser key "([^"]+)":\s', message):
            return self.about(key[1], message) or line
        return line

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
) -> ArgumentParser:
    """All fields of `lm.config.Config` as dotted options, plus --config, --print_config, --debug and --quiet."""
    if examples is None:
        examples = ("", "--config lm/configs/helpfulness.yaml --output_dir runs/helpfulness", "--print_config")
    parser = Parser(
        prog=f"python -m {command}",
        usage="%(prog)s [--config FILE] [--OPTION VALUE ...]",  # the generated one hides an error under 90 lines
        description=f"{description} Without --config, the preset {preset} (the embedded world) is used; other presets "
        f"are in {CONFIGS}.",
        epilog=epilog(command, examples),
        formatter_class=ConfigHelp,
    )
    add_config(parser, Config)
    return parser


def add_config(parser: ArgumentParser, kind: type[Config] | type[ExactConfig]) -> None:
    """--config, the fields of a config, a group of options for each method, and what every command has."""
    parser.add_argument("--config", action="config", help="YAML file with options; later ones and options win.")
    add_common(parser)
    parser.add_class_arguments(kind, skip={"options"}, fail_untyped=True)
    for name, method in kind.KNOWN.items():
        parser.add_class_arguments(method, option_of(name), fail_untyped=True)


# ---------------------------------------------------------------- options

DEEPEST = 20
"""Levels of lists and mappings in options."""
NOTHING = {"train": "nothing", "epochs": None, "max_steps": None}
"""What `sft: null` stands for."""
_jsonargparse_load = get_loader("yaml")


def load_yaml(text: str) -> Any:
    """jsonargparse's loader, kept from what it hangs on or falls over. Raises yaml.YAMLError.

    An alias to what it stands in sends it round for ever, others can stand for billions of values: none is read.
    """
    depth = 0
    try:
        for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            if isinstance(event, yaml.AliasEvent):
                raise yaml.YAMLError("aliases (*name) are not read; write out what they stand for")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise yaml.YAMLError(f"it is nested more than {DEEPEST} deep")
        options = without_retired(_jsonargparse_load(text))
        if isinstance(options, dict) and "sft" in options and options["sft"] is None:
            options["sft"] = dict(NOTHING)
        return options
    except (ValueError, TypeError) as error:  # numbers of thousands of digits, lists as names
        raise yaml.YAMLError(f"not YAML that can be read ({error})") from None


def without_retired(options: Any) -> Any:
    """Options of an earlier version's file without those that did nothing there. yaml.YAMLError for one that did."""
    for name, (value, cure) in RETIRED.items():
        *above, last = name.split(".")
        group = options
        for part in above:
            group = group.get(part) if isinstance(group, dict) else None
        if isinstance(group, dict) and last in group:
            if group[last] != value:
                raise yaml.YAMLError(f"option {name} is no more, got {group[last]!r}: {cure}")
            del group[last]
    return options


set_loader("yaml", load_yaml, (yaml.YAMLError,))


def parse(
    command: str,
    description: str,
    arguments: Sequence[str],
    preset: str = "demo.yaml",
    examples: Sequence[str] | None = None,
) -> tuple[Config, str]:
    """(config, resolved YAML). Leaves with status 2 and a message where an option is unknown or of the wrong type;
    raises ValueError where its value is out of range."""
    parser = parser_of(command, description, preset, examples)
    arguments = _spelled_out(arguments)
    if not any(argument == "--config" or argument.startswith("--config=") for argument in arguments):
        arguments = ["--config", str(CONFIGS / preset), *arguments]
    fields, resolved = resolve(parser, arguments)
    return Config(**fields), resolved


def _spelled_out(arguments: Sequence[str]) -> list[str]:
    """`--sft null` as the options that it stands for."""
    found = list(arguments)
    for at, argument in reversed(list(enumerate(found))):
        size = 1 if argument == "--sft=null" else 2 if found[at : at + 2] == ["--sft", "null"] else 0
        if size:
            found[at : at + size] = [
                part for name, value in NOTHING.items() for part in (f"--sft.{name}", value or "null")
            ]
    return found


def resolve(parser: ArgumentParser, arguments: Sequence[str]) -> tuple[dict[str, Any], str]:
    """(fields of the config, YAML of them), without the options that are about the command and not the run."""
    try:
        options = parser.parse_args(list(arguments))
    except UnicodeDecodeError as error:
        raise ValueError(f"--config: the file is not text in UTF-8 ({error})") from None
    _check_kinds(parser, options)
    fields = vars(parser.instantiate(options))
    for own in ("debug", "quiet"):
        del fields[own], options[own]
    resolved = parser.dump(options, skip_unset=False, skip_validation=True)
    del fields["config"]
    fields["options"] = {name: fields.pop(option_of(name)) for name in METHODS if option_of(name) in fields}
    return fields, resolved


def _check_kinds(parser: ArgumentParser, options: Namespace) -> None:
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
