"""Our recipes as NeMo-Run factories: its command line finds them by name and can override every setting.

Registering them has a global side effect: NeMo-Run's parser reads the annotations of ``__init__``, so these are
replaced on our config classes by types that the parser knows. That is harmless to the rest of the package, which
reads the annotations of the classes, and happens in the launch environment only.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable
from typing import Any

import nemo_run as run

from megatron_dagger.config import RunConfig
from megatron_dagger.recipes import RECIPES


def as_run_config(value: Any) -> Any:
    """Return a dataclass and the dataclasses in it as ``run.Config``, any other value as it is."""
    if not dataclasses.is_dataclass(value):
        return value
    fields = {field.name: as_run_config(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return run.Config(type(value), **fields)


def register_recipes() -> None:
    """Register every recipe as a factory of RunConfig. Calling it again changes nothing."""
    _resolve_annotations(RunConfig)
    for recipe in RECIPES.values():
        _register(recipe)


def _register(recipe: Callable[[], RunConfig]) -> None:
    def factory() -> Any:
        return as_run_config(recipe())

    factory.__name__ = factory.__qualname__ = recipe.__name__
    factory.__doc__ = recipe.__doc__
    factory.__annotations__["return"] = run.Config[RunConfig]
    run.cli.factory(factory)


def _resolve_annotations(cls: type) -> None:
    """Replace the annotations of ``__init__``, which are strings, by types that NeMo-Run's parser knows."""
    for name, hint in typing.get_type_hints(cls).items():
        arguments = typing.get_args(hint)
        if isinstance(hint, types.UnionType):
            hint = typing.Union[arguments]  # noqa: UP007
        elif typing.get_origin(hint) is tuple:
            hint = list[arguments[0]]  # type: ignore[valid-type]
        cls.__init__.__annotations__[name] = hint  # type: ignore[misc]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            _resolve_annotations(hint)
