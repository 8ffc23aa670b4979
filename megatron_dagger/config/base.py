"""Typed settings: frozen keyword-only dataclasses, read from plain dicts, checked on construction.

A wrong field, type or value is a ConfigError that names the field, its value and the way out.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
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
    """Make a config of class ``cls`` from a dict, descending into nested configs."""
    if isinstance(values, cls):
        return values
    prefix = f"{where}." if where else ""
    if not isinstance(values, dict):
        raise ConfigError(f"{where or cls.__name__}: expected a mapping, got {values!r}")
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in hints:
            raise ConfigError(f"unknown setting {prefix}{name}{_suggest(name, hints)}")
    return cls(**{name: _coerce(hints[name], value, prefix + name) for name, value in values.items()})


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain dicts, lists and scalars (the inverse of ``build``)."""

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
    """Apply ``dotted.name=value`` assignments (YAML values) and check the whole config again."""
    values = to_dict(config)
    for assignment in assignments:
        name, sign, text = assignment.partition("=")
        require(bool(sign), f"expected NAME=VALUE, got {assignment!r}")
        *parents, leaf = name.strip().split(".")
        node = values
        for depth, parent in enumerate(parents):
            where = ".".join(parents[: depth + 1])
            require(parent in node, f"unknown setting {where}{_suggest(parent, node)}")
            require(isinstance(node[parent], dict), f"{where} is a value, not a group of settings")
            node = node[parent]
        require(leaf in node, f"unknown setting {name}{_suggest(leaf, node)}")
        node[leaf] = yaml.safe_load(text)
    return build(type(config), values)


def differing(one: Any, other: Any) -> list[str]:
    """The dotted names of the settings in which two configs of a class differ."""

    def below(a: Any, b: Any, where: str) -> list[str]:
        if not (isinstance(a, dict) and isinstance(b, dict)):
            return [where] if a != b else []
        return [name for key in a for name in below(a[key], b.get(key), f"{where}.{key}" if where else key)]

    return below(to_dict(one), to_dict(other), "")


def load_yaml(cls: type[T], path: Path) -> T:
    """Read a config that ``dump_yaml`` wrote."""
    return build(cls, yaml.safe_load(path.read_text()), where="")


def dump_yaml(config: Any) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False, width=100)


def _suggest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; there are: {', '.join(known)}"


def _coerce(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        inner = [arg for arg in args if arg is not type(None)]
        return _coerce(inner[0], value, where)
    if origin is tuple:
        require(isinstance(value, (list, tuple)), f"{where}: expected a list, got {value!r}")
        return tuple(_coerce(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is typing.Literal:
        require(value in args, f"{where}: {value!r} is none of {', '.join(map(repr, args))}")
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
