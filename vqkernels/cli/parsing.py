"""From the words of a command line, and YAML files, to a config dataclass; strict, and without torch.

A config is a plain dataclass. The string below a field is its help; `field(metadata=...)` may add
`positional=True` (a word without a dash, or a list of them), `short="-o"`, and `takes_config=True`: -c / --config is
then another name of this option, and no file of options.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import docstring_parser
import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from vqkernels.models.config_reader import from_dict, kinds

Config = TypeVar("Config")

KINDS = {"NoneType": "null", "str": "text", "int": "an integer", "float": "a number", "bool": "true or false"}


def _config_path(words: list[str]) -> str | None:
    """The last YAML file named by -c / --config, for error messages."""
    path = None
    for word, following in zip(words, [*words[1:], None], strict=False):
        if word in ("-c", "--config"):
            path = following
        elif word.startswith("--config="):
            path = word.removeprefix("--config=")
    return path


def _add_marked(parser: ArgumentParser, entry: dataclasses.Field[Any], text: str) -> None:
    """A field with metadata, by hand, because add_class_arguments makes long options only."""
    required = entry.default is dataclasses.MISSING
    if not entry.metadata.get("positional"):
        names = [entry.metadata["short"], f"--{entry.name}"]
        names += ["-c", "--config"] if entry.metadata.get("takes_config") else []
        parser.add_argument(*names, type=str, help=text, default=entry.default)
    elif str(entry.type).startswith("list"):
        parser.add_argument(entry.name, type=str, help=text, nargs="+")
    elif required:
        parser.add_argument(entry.name, type=str, help=text)
    else:
        parser.add_argument(entry.name, type=str, help=text, nargs="?", default=entry.default)


def _takes_config(config: type) -> bool:
    """Whether the dataclass has a field of its own that --config stands for."""
    return any(entry.metadata.get("takes_config") for entry in dataclasses.fields(config))


def build_parser(config: type, prog: str, description: str) -> ArgumentParser:
    """A strict parser for one dataclass, whose errors are exceptions."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    if not _takes_config(config):
        parser.add_argument("-c", "--config", action="config", help="YAML file with any of the options below")
    texts = {entry.arg_name: entry.description for entry in docstring_parser.parse_from_object(config).params}
    marked = [entry for entry in dataclasses.fields(config) if entry.metadata]
    for entry in marked:
        _add_marked(parser, entry, texts.get(entry.name) or "")
    if len(marked) < len(dataclasses.fields(config)):
        parser.add_class_arguments(config, skip={entry.name for entry in marked})
    return parser


def _respell(words: list[str], config: type) -> list[str]:
    """The short ways of writing lists and switches, in the parser's own spelling.

    `--shape A --shape B` is `--shape+ A --shape+ B`, and `--resume` alone is `--resume=true`.
    """
    kinds = {entry.name: str(entry.type) for entry in dataclasses.fields(config)}
    spelled = []
    for word, following in zip(words, [*words[1:], ""], strict=False):
        name, equals, value = word.removeprefix("--").partition("=")
        kind = kinds.get(name, "") if word.startswith("--") else ""
        if kind.startswith("list") and not (value if equals else following).startswith("["):
            spelled.append(f"--{name}+{equals}{value}")
        elif kind == "bool" and not equals and following.lower() not in ("true", "false"):
            spelled.append(f"{word}=true")
        else:
            spelled.append(word)
    return spelled


def _kind(text: str) -> str:
    """A type as it stands in a jsonargparse message, in words."""
    if "Literal[" in text:
        return "one of " + text[text.index("[") + 1 : text.rindex("]")]
    name = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)
    return KINDS.get(name, name)


def _expected(message: str) -> str:
    """The core of a jsonargparse type error as `expected ..., got ...`."""
    given = re.search(r"(?:Given|Got) value: (.*)$", message, re.DOTALL)
    union = re.search(r"Subtypes: \[(.*?)\]\s*Errors", message, re.DOTALL)
    single = re.search(r"Expected an? (.*?)\. Got", message, re.DOTALL)
    if not given or not (union or single):
        return message
    texts = re.split(r", (?=<|typing)", union[1]) if union else [single[1]] if single else []
    return f"expected {' or '.join(map(_kind, texts))}, got {given[1].strip()!r}"


def _hint(name: str, parser: ArgumentParser) -> str:
    known = [option.lstrip("-") for action in parser._actions for option in action.option_strings]
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def explain_error(message: str, parser: ArgumentParser, words: list[str]) -> str:
    """A jsonargparse message as one sentence that names the option, what was expected and what came."""
    source = _config_path(words)
    unknown = re.search(r"Option '([^']+)' is not accepted", message)
    nested = re.search(r"Group '([^']+)' does not accept option '([^']+)'", message)
    if unknown or nested:
        name = unknown[1] if unknown else f"{nested[1]}.{nested[2]}" if nested else ""
        return f"{source or parser.prog}: unknown option {name!r}{_hint(name, parser)}"
    if message.startswith("unrecognized arguments: "):
        word = message.removeprefix("unrecognized arguments: ").split()[0]
        hint = _hint(word.lstrip("-").split("=")[0], parser) if word.startswith("-") else ""
        return f"unknown argument {word}{hint}"
    keyed = re.match(r'Parser key "([^"]+)":\s*(.*)$', message, re.DOTALL)
    if keyed and keyed[1] == "config":
        return f"--config: {source}: no such file" if "does not exist" in keyed[2] else f"--config: {keyed[2]}"
    if keyed:
        typed = any(word.split("=")[0].rstrip("+") == f"--{keyed[1]}" for word in words)
        place = f"--{keyed[1]}" if typed or source is None else f"{source}: {keyed[1]}"
        return f"{place}: {_expected(keyed[2])}"
    if source and "parsing config" in message:
        return f"{source}: {message}"
    return message


def _asked_kind(words: list[str], place: str) -> Any:
    """What the words, or else the YAML file they name, say of the option `place`; None where they say nothing."""
    for word, following in reversed(list(zip(words, [*words[1:], ""], strict=True))):
        name, equals, value = word.partition("=")
        if name == f"--{place}":
            return value if equals else following
    path = _config_path(words)
    if path is None or not Path(path).is_file():
        return None  # the parser will say so
    try:
        found: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return None
    for name in place.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def _default(config: type, name: str, kind: type) -> Any:
    """What makes the default of a field that is narrowed to `kind`: the field's own, where that is of this kind."""
    (own,) = (entry.default_factory for entry in dataclasses.fields(config) if entry.name == name)
    return own if own is not dataclasses.MISSING and type(own()) is kind else kind


def _narrowed(config: type, words: list[str], prefix: str = "") -> type:
    """`config` with one class in place of every choice of several, the one whose `kind` the user named.

    So the parser, its help and its messages know the options of that class alone.
    """
    hints, changed = typing.get_type_hints(config), {}
    for entry in dataclasses.fields(config):
        hint, place = hints[entry.name], f"{prefix}{entry.name}"
        chosen = hint
        if isinstance(hint, types.UnionType) and all(map(dataclasses.is_dataclass, typing.get_args(hint))):
            choices = kinds(typing.get_args(hint))
            kind = _asked_kind(words, f"{place}.kind")
            if kind is not None and kind not in choices:
                raise ValueError(f"{place}.kind: expected one of {', '.join(choices)}, got {kind!r}")
            chosen = choices[kind] if kind is not None else typing.get_args(hint)[0]
        if dataclasses.is_dataclass(chosen):
            chosen = _narrowed(typing.cast(type, chosen), words, f"{place}.")
        if chosen is not hint:
            changed[entry.name] = chosen
    if not changed:
        return config
    members = {name: dataclasses.field(default_factory=_default(config, name, kind)) for name, kind in changed.items()}
    narrow = type(config.__name__, (config,), {"__annotations__": changed, "__doc__": config.__doc__, **members})
    return dataclasses.dataclass(narrow)


def _with_bundled(words: list[str], folder: Path | None) -> list[str]:
    """The words, with `-c NAME` as the path of the bundled NAME.yaml where there is no file NAME."""
    name = _config_path(words)
    if folder is None or name is None or Path(name).exists() or Path(name).name != name or Path(name).suffix:
        return words
    if not (folder / f"{name}.yaml").is_file():
        bundled = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        raise ValueError(f"--config: expected a YAML file or one of {bundled}, got {name}")
    path = str(folder / f"{name}.yaml")
    return [path if word == name else f"--config={path}" if word == f"--config={name}" else word for word in words]


def parse_config(
    config: type[Config],
    prog: str,
    description: str,
    words: list[str],
    *,
    bundled: Path | None = None,
) -> Config:
    """Reads a command line into `config`.

    Args:
        config: the dataclass.
        prog: what the user typed so far, for --help.
        description: a sentence for --help.
        words: the rest of the command line.
        bundled: folder of YAML files that -c also takes by name.

    Raises:
        ValueError: one sentence about the option that is wrong.
        SystemExit: after --help and --print_config.
    """
    words = _with_bundled(_respell(words, config), bundled)
    parser = build_parser(_narrowed(config, words), prog, description)
    try:
        values: dict[str, Any] = parser.parse_args(words).as_dict()
    except Exception as error:  # argparse's, yaml's, or a TypeError, after jsonargparse's version
        raise ValueError(explain_error(str(error), parser, [] if _takes_config(config) else words)) from error
    values.pop("config", None)
    return from_dict(config, values)
