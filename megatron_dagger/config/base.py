"""Typed settings: frozen keyword-only dataclasses, read from plain dicts, checked on construction.

A wrong name, type or value raises a ConfigError that names the setting, its value and a correction. A class whose
settings were renamed lists the old names in ``RENAMED``: old files are still read.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting is unknown or has a value that cannot work."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(message)


def build(cls: type[T], values: Any, where: str = "") -> T:
    """Return a config of class ``cls`` made from a dict, nested configs included."""
    if isinstance(values, cls):
        return values
    prefix = f"{where}." if where else ""
    if not isinstance(values, dict):
        raise ConfigError(f"{where or cls.__name__}: expected a mapping, got {values!r}")
    values = {_current_name(cls, name): value for name, value in values.items()}
    hints = _settings(cls)
    for name in values:
        require(name in hints, f"unknown setting {prefix}{name}{_suggest(name, hints, prefix)}")
    return cls(**{name: _coerce(hints[name], value, prefix + name) for name, value in values.items()})


def to_dict(config: Any) -> dict[str, Any]:
    """Return the config as plain dicts, lists and scalars: the inverse of ``build``."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return value

    return typing.cast(dict[str, Any], plain(config))


def override(config: T, assignments: list[str]) -> T:
    """Return ``config`` with ``dotted.name=value`` assignments (YAML values) applied and everything checked again."""
    values = to_dict(config)
    for assignment in assignments:
        name, sign, _ = assignment.partition("=")
        require(bool(sign), f"{assignment!r} is not a setting: write NAME=VALUE")
        *groups, leaf = current_name(type(config), name.strip()).split(".")
        node = values
        for depth, group in enumerate(groups):
            where = ".".join(groups[: depth + 1])
            if group not in node:
                raise ConfigError(f"unknown setting {name}{_suggest_path(name, values)}")
            require(isinstance(node[group], dict), f"{where} is a value, not a group of settings")
            node = node[group]
        if leaf not in node:
            raise ConfigError(f"unknown setting {name}{_suggest_path(name, values)}")
        node[leaf] = parse_value(assignment)
    return build(type(config), values)


def parse_value(assignment: str) -> Any:
    """Return the value of ``NAME=VALUE``, read as YAML. Raises ConfigError if it is not YAML."""
    name, _, text = assignment.partition("=")
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name.strip()}={text!r}: not a YAML value ({_in_one_line(error)})") from None


def current_name(cls: Any, name: str) -> str:
    """Return a dotted setting name with every renamed part replaced by its current name."""
    current = []
    for part in name.split("."):
        part = _current_name(cls, part)
        current.append(part)
        hint = _settings(cls).get(part) if dataclasses.is_dataclass(cls) else None
        cls = _without_none(hint)
    return ".".join(current)


def differing(first: Any, second: Any) -> list[str]:
    """Return the dotted names of the settings in which two configs of one class differ."""
    others = dict(_leaves(to_dict(second)))
    return [name for name, value in _leaves(to_dict(first)) if name not in others or others[name] != value]


def load_yaml(cls: type[T], path: Path) -> T:
    """Read a config that ``dump_yaml`` wrote. Raises ConfigError, naming the file, if it cannot be read."""
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a YAML file: {_in_one_line(error)}") from None
    try:
        return build(cls, values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def dump_yaml(config: Any) -> str:
    """Return a config as YAML, one setting per line."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, width=100)


def _settings(cls: Any) -> dict[str, Any]:
    """Return the type of every setting of a config class, by name."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _current_name(cls: Any, name: str) -> str:
    return str(getattr(cls, "RENAMED", {}).get(name, name))


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every setting's dotted name and value."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _suggest_path(name: str, values: Mapping[str, Any]) -> str:
    """Suggest the settings that ``name`` may stand for: by its last part anywhere, or by how it is spelt."""
    paths = [path for path, _ in _leaves(values)]
    last = name.rpartition(".")[2].strip()
    same = [path for path in paths if path.rpartition(".")[2] == last]
    if not same:
        same = difflib.get_close_matches(name, paths, n=1, cutoff=0.7)
    if not same:
        lasts = {path.rpartition(".")[2] for path in paths}
        close = difflib.get_close_matches(last, sorted(lasts), n=1)
        same = [path for path in paths if close and path.rpartition(".")[2] == close[0]]
    if same:
        return f"; did you mean {' or '.join(same[:3])}?"
    return f"; the groups of settings are: {', '.join(values)}"


def _suggest(name: str, known: Mapping[str, Any], prefix: str) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    if close:
        return f"; did you mean {prefix}{close[0]}?"
    return f"; there are: {', '.join(known)}"


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).replace('in "<unicode string>", ', "").split())


def _without_none(hint: Any) -> Any:
    """Return the type of ``X | None``: X."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return hint


def _coerce(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return None if value is None and type(None) in args else _coerce(_without_none(hint), value, where)
    if origin is tuple:
        require(value is not None and not isinstance(value, dict), f"{where}: expected a list, got {value!r}")
        items = value if isinstance(value, (list, tuple)) else [value]  # one item needs no brackets
        return tuple(_coerce(args[0], item, f"{where}[{i}]") for i, item in enumerate(items))
    if origin is typing.Literal:
        require(value in args, f"{where}={value!r}: choose one of {', '.join(map(str, args))}")
        return value
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:  # YAML reads 3e-6 as a string
            return float(value)
        except ValueError:
            raise ConfigError(f"{where}: expected a number, got {value!r}") from None
    if isinstance(hint, type):
        right = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
        require(right, f"{where}: expected {hint.__name__}, got {value!r}")
    return value
