"""Compiled modules of the tasks, by the content of their source: a test run compiles only what the agent has changed.

The driver compiles the files of a task's repository into a folder, which every sandbox has read-only. So nothing that
an agent runs can put code into it, and a module with one byte changed has no entry. Bytecode in the work tree itself,
which an agent could forge, is never read.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.machinery
import importlib.util
import marshal
import os
import types
from collections.abc import Callable

FOLDER = "/sandbox/shared"  # where an isolating sandbox has it; without it every module is compiled


def entry(path: str, source: bytes) -> str:
    """Return the name of a module's entry; ``path`` is where the module is in the sandbox."""
    digest = hashlib.sha256(importlib.util.MAGIC_NUMBER + path.encode() + b"\0")
    digest.update(source)
    return digest.hexdigest()


def pack(code: types.CodeType) -> bytes:
    """Return the content of a module's entry: the code, after its digest."""
    content = marshal.dumps(code)
    return hashlib.sha256(content).digest() + content


def unpack(entry: bytes) -> types.CodeType:
    """Return the code of an entry. Raises ValueError if it is damaged, as after a power cut."""
    digest, content = entry[:32], entry[32:]
    if hashlib.sha256(content).digest() != digest:
        raise ValueError("a damaged entry")
    code: types.CodeType = marshal.loads(content)
    return code


def use_for(root: str) -> None:
    """Take the code of modules below ``root`` from the cache, in this process and in those forked from it."""
    get_code: Callable[..., types.CodeType | None] = importlib.machinery.SourceFileLoader.get_code

    def get_cached_code(loader: importlib.machinery.SourceFileLoader, name: str) -> types.CodeType | None:
        path = loader.get_filename(name)
        if not path.startswith(root + os.sep):
            return get_code(loader, name)
        source = loader.get_data(path)
        with contextlib.suppress(OSError, ValueError), open(os.path.join(FOLDER, entry(path, source)), "rb") as file:
            return unpack(file.read())
        return loader.source_to_code(source, path)

    importlib.machinery.SourceFileLoader.get_code = get_cached_code  # type: ignore[method-assign,assignment]
