"""Compile the modules of tasks ahead of their test runs; see tools/code_cache.py."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path

from megatron_dagger.envs.repo_repair.tools.code_cache import entry, pack
from megatron_dagger.sandbox.local.bubblewrap import work_dir
from megatron_dagger.store.atomic import temporary_name

_lock = threading.Lock()  # filters of warnings belong to the process


def compile_modules(files: Mapping[str, bytes], folder: Path) -> None:
    """Add every module of a task's repository that compiles to the cache in ``folder``. Nothing of it is run."""
    folder.chmod(0o755)  # sandboxes have user ids of their own
    for name, source in files.items():
        if not name.endswith(".py"):
            continue
        path = f"{work_dir()}/{name}"
        target = folder / entry(path, source)
        if not target.exists():
            with _lock, contextlib.suppress(SyntaxError, ValueError, RecursionError), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                content = pack(compile(source, path, "exec", dont_inherit=True))
                temporary = folder / temporary_name(name.replace("/", "-"))
                temporary.write_bytes(content)  # not synced, which would take longer than to compile: see unpack
                temporary.chmod(0o644)
                temporary.replace(target)
