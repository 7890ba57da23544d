"""Reads a YAML or TOML file into a Config, and names all its problems at once.

msgspec stops at the first error, but an operator wants all of them, each with the path of its key.
So this module walks the sections, and msgspec converts one value at a time.
"""

import math
import tomllib
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
import yaml
from msgspec import Struct

from extproc.config.regular_file import read_regular_file
from extproc.config.rules import rule_problems
from extproc.config.schema import Config
from extproc.config.yaml_loader import read_yaml
from extproc.errors import ConfigError

__all__ = ["load_config", "parse_config", "read_yaml_file", "section_type"]

_FILE_MAX_BYTES: Final = 1024 * 1024
# Stands for a value that was refused, so that the rest can still be checked.
_BROKEN: Final = object()


def load_config(path: Path) -> Config:
    """Read and check a configuration file; the format follows the extension.

    Raises ConfigError with all problems, each led by its key.
    """
    problems: list[str] = []
    match path.suffix.lower():
        case ".yaml" | ".yml":
            raw, problems = read_yaml_file(path)
        case ".toml":
            try:
                raw = tomllib.loads(_read_text(path, _FILE_MAX_BYTES))
            except (ValueError, RecursionError) as error:
                raise ConfigError([f"{path}: not valid TOML: {_first_line(error)}"]) from None
        case _:
            raise ConfigError([f"{path}: the file name must end in .yaml, .yml or .toml"])
    return parse_config(raw, problems)


def read_yaml_file(path: Path, max_bytes: int = _FILE_MAX_BYTES) -> tuple[object, list[str]]:
    """Return the decoded YAML (or JSON) document of a file, and its problems by line.

    Raises ConfigError if it cannot be read at all.
    """
    text = _read_text(path, max_bytes)
    try:
        return read_yaml(text)
    except ConfigError:
        raise
    except Exception as error:  # the library lets more out than its own errors
        raise ConfigError([f"{path}: not valid YAML: {_first_line(error)}"]) from None


def _read_text(path: Path, max_bytes: int) -> str:
    try:
        return read_regular_file(path, max_bytes).decode()
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from None
    except UnicodeDecodeError:
        raise ConfigError([f"{path}: not UTF-8 text"]) from None


def parse_config(raw: object, problems: Sequence[str] = ()) -> Config:
    """Check decoded YAML or TOML against the schema and the rules; raises ConfigError.

    `problems` were found before and are reported with those found here.

    Broken parts are replaced by placeholders before the rules run, so that one pass finds all
    problems. Problems of the placeholders are left out.
    """
    found = _Findings(problems)
    values = _section(Config, raw, "", found)
    config = msgspec.convert(values, Config)
    for problem in rule_problems(config):
        key = problem.partition(":")[0]
        if not any(key == path or key.startswith((f"{path}.", f"{path}[")) for path in found.paths):
            found.problems.append(problem)
    if found.problems:
        raise ConfigError(found.problems, config)
    return config


class _Findings:
    """The problems so far, and the paths of the keys that hold a placeholder."""

    def __init__(self, problems: Sequence[str] = ()) -> None:
        self.problems = list(problems)
        self.paths: list[str] = []

    def broken(self, path: str, problem: str) -> None:
        self.problems.append(problem)
        self.paths.append(path)


def section_type(hint: Any) -> type[Struct] | None:
    """The struct of the section in a field's type, through Annotated, Optional and list."""
    if isinstance(hint, type) and issubclass(hint, Struct):
        return hint
    if get_origin(hint) in (Annotated, list, Union, UnionType):
        for argument in get_args(hint):
            if found := section_type(argument):
                return found
    return None


def _is_list(hint: Any) -> bool:
    if get_origin(hint) is Annotated:
        return _is_list(get_args(hint)[0])
    return get_origin(hint) is list


def _section(section: type[Struct], raw: object, path: str, found: _Findings) -> dict[str, Any]:
    """Check one mapping against its struct; returns it with placeholders for broken values."""
    if not isinstance(raw, dict):
        problem = f"{path or 'the file'}: expected a mapping of keys, found {_kind(raw)}"
        if not path:
            raise ConfigError([*found.problems, problem])
        found.broken(path, problem)
        return _section(section, {}, path, _Findings())
    hints = get_type_hints(section, include_extras=True)
    fields = {field.encode_name: field for field in msgspec.structs.fields(section)}
    found.problems += [_unknown_key(path, key, list(fields)) for key in raw if key not in fields]
    good: dict[str, Any] = {}
    for name, info in fields.items():
        key_path = _join(path, name)
        if name in raw:
            value = _field(hints[name], raw[name], key_path, found)
            if value is not _BROKEN:
                good[name] = value
        elif info.required:
            found.broken(key_path, f"{key_path}: this key is required")
        if info.required and name not in good:
            good[name] = _placeholder(hints[name])
    return good


def _placeholder(hint: Any) -> Any:
    """A valid value for a required key, so that the rest can be checked."""
    nested = section_type(hint)
    if _is_list(hint):
        return []
    if nested is not None:
        return _section(nested, {}, "-", _Findings())
    choices = _choices(hint)
    return choices[0] if choices else _least_number(hint) or "-"


def _least_number(hint: Any) -> int | None:
    """The lowest valid number of this type; None if the type is not a number."""
    if get_origin(hint) is not Annotated:
        return None
    kind, *notes = get_args(hint)
    least = [note.ge for note in notes if isinstance(note, msgspec.Meta) and note.ge is not None]
    return math.ceil(max(least, default=1)) if kind in (int, float) else None


def _field(hint: Any, raw: object, path: str, found: _Findings) -> Any:
    nested = section_type(hint)
    if nested is None or (raw is None and _allows_none(hint)):
        if problem := _scalar_problem(hint, raw):
            found.broken(path, f"{path}{problem}")
            return _BROKEN
        return raw
    if not _is_list(hint):
        if isinstance(raw, dict):
            return _section(nested, raw, path, found)
        found.broken(path, f"{path}: expected a mapping of keys, found {_kind(raw)}")
        return _BROKEN
    if not isinstance(raw, list):
        found.broken(path, f"{path}: expected a list, found {_kind(raw)}")
        return _BROKEN
    return [_section(nested, item, f"{path}[{i}]", found) for i, item in enumerate(raw)]


def _scalar_problem(hint: Any, raw: object) -> str | None:
    """The problem of one value, with the rest of its path first; None if it is valid."""
    choices = _choices(hint)
    if choices and raw not in choices:
        expected = f"expected one of {', '.join(choices)}"
        return f": unknown value {repr(raw) if isinstance(raw, str) else _kind(raw)}, {expected}"
    if isinstance(raw, float) and not math.isfinite(raw):
        return ": expected a finite number"
    if not _is_unicode(raw):
        return ": not valid Unicode text"
    try:
        msgspec.convert(raw, hint)
    except msgspec.ValidationError as error:
        sentence, _, where = str(error).partition(" - at `$")
        return f"{where.rstrip('`')}: {sentence[0].lower()}{sentence[1:]}"
    return None


def _is_unicode(raw: object) -> bool:
    """False for text with lone surrogates: a file can have them, but they cannot be encoded."""
    if isinstance(raw, list):
        return all(_is_unicode(item) for item in raw)
    try:
        return not isinstance(raw, str) or raw.encode() is not None
    except UnicodeEncodeError:
        return False


def _choices(hint: Any) -> tuple[str, ...]:
    if get_origin(hint) is Annotated:
        return _choices(get_args(hint)[0])
    return get_args(hint) if get_origin(hint) is Literal else ()


def _allows_none(hint: Any) -> bool:
    return type(None) in get_args(hint) or any(_allows_none(arg) for arg in get_args(hint))


def _unknown_key(path: str, key: object, allowed: list[str]) -> str:
    key_path = _join(path, str(key))
    return f"{key_path}: unknown key, expected one of {', '.join(allowed)}"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _kind(raw: object) -> str:
    names = {dict: "a mapping", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(raw), "a number")


def _first_line(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    lines = str(error).splitlines()
    return " ".join(line.strip() for line in lines[:2]) if lines else type(error).__name__
