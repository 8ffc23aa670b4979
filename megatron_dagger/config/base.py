"""Typed settings: frozen keyword-only dataclasses, read from plain dicts, checked on construction.

A wrong name, type or value raises a ConfigError that names the setting, its value and a correction. A class whose
settings were renamed lists the old names in ``RENAMED``: old files are still read.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

T = TypeVar("T")
_type_hints = functools.cache(typing.get_type_hints)
LARGEST_INTEGER = 2**63 - 1  # of NumPy, PyTorch and the stores


class ConfigError(ValueError):
    """A setting is unknown or has a value that cannot work."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
    """The range of a number: greater than, at least, less than, at most."""

    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None

    def problem(self, value: float) -> str | None:
        """Return why a value is refused, e.g. ``must be positive``; None if it lies in the range."""
        if isinstance(value, float) and not math.isfinite(value):
            return "must be a finite number"
        if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
            return f"must not exceed {LARGEST_INTEGER}"
        low = (self.gt is None or value > self.gt) and (self.ge is None or value >= self.ge)
        high = (self.lt is None or value < self.lt) and (self.le is None or value <= self.le)
        return None if low and high else self._rule()

    def _rule(self) -> str:
        lowest = self.ge if self.gt is None else self.gt
        highest = self.le if self.lt is None else self.lt
        if highest is not None:
            opening, closing = "[" if self.gt is None else "(", "]" if self.lt is None else ")"
            return f"must lie in {opening}{lowest:g}, {highest:g}{closing}"
        if lowest == 0:
            return "must not be negative" if self.gt is None else "must be positive"
        return f"must be at least {lowest:g}" if self.gt is None else f"must be greater than {lowest:g}"


def number(
    default: T, *, gt: float | None = None, ge: float | None = None, lt: float | None = None, le: float | None = None
) -> T:
    """Return a numeric setting's field with its default and range, which ``check_numbers`` checks. None is allowed."""
    bounds = Bounds(gt=gt, ge=ge, lt=lt, le=le)
    require(bounds.gt is not None or bounds.ge is not None, "a setting's range needs a lower bound")
    return dataclasses.field(default=default, metadata={"bounds": bounds})


def check_numbers(config: Any, where: str) -> None:
    """Raise ConfigError if a setting lies outside its range. Call it first in ``__post_init__``, before arithmetic."""
    _check_numbers(type(config), vars(config), where)


def _check_numbers(cls: Any, values: Mapping[str, Any], where: str) -> None:
    prefix = f"{where}." if where else ""
    for setting in dataclasses.fields(cls):
        bounds, value = setting.metadata.get("bounds"), values.get(setting.name)
        problem = bounds.problem(value) if bounds and value is not None else None
        require(problem is None, f"{prefix}{setting.name}={value} {problem}")


def build(cls: type[T], values: Any, where: str = "") -> T:
    """Return a config of class ``cls`` made from a dict, nested configs included."""
    if isinstance(values, cls):
        return values
    prefix = f"{where}." if where else ""
    if not isinstance(values, dict):
        require(bool(where), f"{cls.__name__}: expected a mapping, got {values!r}")
        names = list(_settings(cls))
        raise ConfigError(f"{where} is a group of settings: set {where}.{names[0]}=... ({', '.join(names)})")
    values = {_current_name(cls, name): value for name, value in values.items()}
    hints = _settings(cls)
    for name in values:
        if name not in hints:  # a suggestion takes long to find
            raise ConfigError(f"unknown setting {prefix}{name}{_suggest(name, hints, prefix)}")
    settings = {name: _coerce(hints[name], value, prefix + name) for name, value in values.items()}
    if where:  # a class that serves several groups, like SamplingConfig, cannot name the group itself
        _check_numbers(cls, settings, where)
    return cls(**settings)


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
    """Return ``config`` with ``dotted.name=value`` assignments (YAML values) applied and everything checked again.

    A mapping assigned to a group changes the settings that it names and keeps the others.
    """
    values = to_dict(config)
    for assignment in assignments:
        name, sign, _ = assignment.partition("=")
        require(bool(sign), f"{assignment!r} is not a setting: write NAME=VALUE")
        _assign(type(config), values, name.strip(), parse_value(assignment))
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
    values, others = (dict(leaves(to_dict(config))) for config in (first, second))
    absent = object()
    return [name for name in values | others if values.get(name, absent) != others.get(name, absent)]


def load_yaml(cls: type[T], path: Path) -> T:
    """Read a config that ``dump_yaml`` wrote. Raises ConfigError, naming the file, if it cannot be read."""
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a YAML file: {_in_one_line(error)}") from None
    require(values is not None, f"{path} is empty: not a run's settings")
    try:
        return build(cls, values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def dump_yaml(config: Any) -> str:
    """Return a config as YAML, one setting per line."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, width=100)


def _assign(cls: type, values: dict[str, Any], name: str, value: Any) -> None:
    """Set the dotted ``name`` in ``values``, the plain form of a ``cls``; merge a mapping into a group."""
    *groups, leaf = current_name(cls, name).split(".")
    node = values
    for depth, group in enumerate(groups):
        if group not in node:
            if not _is_free(cls, groups[:depth]):
                raise ConfigError(f"unknown setting {name}{_suggest_path(name, values)}")
            node[group] = {}
        if not isinstance(node[group], dict):
            where = ".".join(groups[: depth + 1])
            require(_group_class(cls, where) is not None, f"{where} is a value, not a group of settings")
            raise ConfigError(f"{where} is null: write '{where}={{{leaf}: {value}}}'")
        node = node[group]
    free = _is_free(cls, groups)
    if leaf not in node and not free:
        raise ConfigError(f"unknown setting {name}{_suggest_path(name, values)}")
    if isinstance(value, dict) and isinstance(node.get(leaf), dict) and not free:
        for key, item in value.items():
            _assign(cls, values, f"{name}.{key}", item)
        return
    group_class = _group_class(cls, ".".join([*groups, leaf])) if isinstance(value, dict) and not free else None
    node[leaf] = to_dict(build(group_class, value, name)) if group_class else value


def _is_free(cls: Any, groups: Sequence[str]) -> bool:
    """Return whether ``groups`` lead to a mapping that may have any names."""
    for group in groups:
        cls = _without_none(_settings(cls)[group]) if dataclasses.is_dataclass(cls) else cls
    return bool(typing.get_origin(cls) is dict)


def _settings(cls: Any) -> dict[str, Any]:
    """Return the type of every setting of a config class, by name."""
    hints = _type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _group_class(cls: Any, name: str) -> Any:
    """Return the class of the group with the dotted ``name``, which may be null; None if ``name`` is a value."""
    for part in name.split("."):
        if not dataclasses.is_dataclass(cls):
            return None
        cls = _without_none(_settings(cls)[part])
    return cls if dataclasses.is_dataclass(cls) else None


def _current_name(cls: Any, name: str) -> str:
    return str(getattr(cls, "RENAMED", {}).get(name, name))


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the value of every setting of ``to_dict(config)``."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _suggest_path(name: str, values: Mapping[str, Any]) -> str:
    """Suggest the settings that ``name`` may stand for: by its last part anywhere, or by how it is spelt."""
    paths = [path for path, _ in leaves(values)]
    last = name.rpartition(".")[2].strip()
    same = [path for path in paths if path.rpartition(".")[2] == last]
    if not same:
        lasts = {path.rpartition(".")[2] for path in paths}
        close = difflib.get_close_matches(last, sorted(lasts), n=1, cutoff=0.7)
        same = [path for path in paths if close and path.rpartition(".")[2] == close[0]]
    if not same:
        same = difflib.get_close_matches(name, paths, n=1, cutoff=0.9)
    if same:
        return f"; did you mean {' or '.join(same[:3])}?"
    group = values.get(name.partition(".")[0])
    if "." in name and isinstance(group, dict):
        for part in name.split(".")[1:-1]:
            group = group[part] if isinstance(group.get(part), dict) else group
        return f"; there are: {', '.join(group)}"
    return "; `megatron-dagger run RUN --recipe NAME --dry-run` prints all settings"


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
        none = f"; for none write {where}=[]" if value is None else ""
        require(value is not None and not isinstance(value, dict), f"{where}: expected a list, got {value!r}{none}")
        items = value if isinstance(value, (list, tuple)) else [value]  # one item needs no brackets
        return tuple(_coerce(args[0], item, f"{where}[{i}]") for i, item in enumerate(items))
    if origin is typing.Literal:
        require(value in args, f"{where}={value!r}: choose one of {', '.join(map(str, args))}")
        return value
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    if origin is dict:
        require(isinstance(value, dict), f"{where}: expected a mapping, got {value!r}")
        return dict(value)
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:  # YAML reads 3e-6 as a string
            return float(value)
        except (ValueError, OverflowError):
            raise ConfigError(f"{where}: expected a number, got {value!r}") from None
    if isinstance(hint, type):
        right = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
        require(right, f"{where}: expected {hint.__name__}, got {value!r}")
    return value
