"""Parts that a user may bring, found by name: ours, those of installed packages, and any by its import path."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_dagger.config.base import ConfigError

_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


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
        return installed[name].load()
    names = sorted({*ours, *installed})
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
    raise ConfigError(f"{setting}={name!r} is unknown; {hint} (one of your own is named package.module:function)")


def import_part(path: str, setting: str) -> Any:
    """Return what an import path, ``package.module:attribute``, names; modules in the current directory are found too.

    Raises ConfigError, which begins with ``setting``, if there is no such module, or nothing in it that can be called.
    """
    module, _, attribute = path.partition(":")
    if not _PATH.fullmatch(path):
        raise ConfigError(f"{setting}={path}: write package.module:function")
    top = module.partition(".")[0]
    here = str(Path.cwd())
    if here not in sys.path and any(Path(here, place).exists() for place in (f"{top}.py", top)):
        sys.path.append(here)
    try:
        part: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # a module that it imports
        raise ConfigError(
            f"{setting}={path}: there is no module {error.name}; start from the folder that it is in, set PYTHONPATH, "
            "or install it"
        ) from error
    place = getattr(part, "__file__", module)
    for name in attribute.split("."):
        part = getattr(part, name, None)
    if not callable(part):
        raise ConfigError(f"{setting}={path}: {place} has no function {attribute}")
    return part
