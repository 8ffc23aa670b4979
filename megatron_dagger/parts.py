"""Parts that a user may bring, found by name: ours, those of installed packages, and any by its import path."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_dagger.config.base import ConfigError


def find_part(name: str, ours: Mapping[str, str], *, group: str, setting: str) -> Any:
    """Return the part called ``name``, imported only now.

    ``ours`` has the import paths of our own parts by name. Installed packages name theirs as entry points of ``group``.
    Any other part is named by its import path (``import_part``). Raises ConfigError, which begins with ``setting``, if
    there is no such part.
    """
    if ":" in name:
        return import_part(name, setting)
    if name in ours:
        return import_part(ours[name], setting)
    installed = {point.name: point for point in importlib.metadata.entry_points(group=group)}
    if name in installed:
        return import_part(installed[name].value, setting)
    names = sorted({*ours, *installed})
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
    raise ConfigError(f"{setting}={name!r} is unknown; {hint} (one of your own is named package.module:function)")


def import_part(path: str, setting: str) -> Any:
    """Return what an import path, ``package.module:attribute``, names; modules in the current directory are found too.

    Raises ConfigError, which begins with ``setting``, if there is no such module or attribute.
    """
    module, _, attribute = path.partition(":")
    top = module.partition(".")[0]
    here = str(Path.cwd())
    if here not in sys.path and any(Path(here, place).exists() for place in (f"{top}.py", top)):
        sys.path.append(here)
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # a module that it imports
        raise ConfigError(
            f"{setting}={path}: there is no module {error.name}; start from the folder that it is in, set PYTHONPATH, "
            "or install it"
        ) from error
    if not hasattr(imported, attribute):
        raise ConfigError(f"{setting}={path}: {module} has no {attribute or 'function; write package.module:function'}")
    return getattr(imported, attribute)
