"""Write the settings reference in recipes/README.md from the settings' classes, their defaults and comments.

.venv/bin/python -m tools.settings_reference            rewrite the reference
.venv/bin/python -m tools.settings_reference --check    exit with 1 if it is out of date
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import io
import re
import sys
import tokenize
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_dagger.config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "recipes" / "README.md"
BEGIN, END = "<!-- settings: by tools/settings_reference.py -->\n", "<!-- end of settings -->\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if the file is out of date")
    arguments = parser.parse_args()
    text = README.read_text()
    updated = with_reference(text)
    if arguments.check and updated != text:
        print(f"{README.relative_to(ROOT)} is out of date: run `python -m tools.settings_reference`")
        return 1
    if not arguments.check:
        README.write_text(updated)
    return 0


def with_reference(text: str) -> str:
    """Return the README's text with the part between the markers replaced."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n" + "\n".join(reference()) + "\n" + END + after


def reference() -> Iterator[str]:
    """Yield the lines of the reference: a section and a table for each group of settings."""
    for group, default in groups("", RunConfig()):
        cls = type(default)
        yield from (
            f"### {group or 'top level'}",
            "",
            " ".join((inspect.getdoc(cls) or "").split()).replace("``", "`"),
            "",
        )
        yield from ("| setting | type | default | |", "|---|---|---|---|")
        hints, notes = typing.get_type_hints(cls), comments(cls)
        for field in dataclasses.fields(cls):
            value = getattr(default, field.name)
            if not dataclasses.is_dataclass(value):
                choices = field.metadata.get("choices")
                kind = ", ".join(f"`{choice}`" for choice in choices) if choices else type_name(hints[field.name])
                note = re.sub(r"\bNone\b", "null", notes.get(field.name, ""))
                columns = (f"`{field.name}`", kind, f"`{plain(value)}`", note)
                yield "| " + " | ".join(cell.replace("|", "\\|") for cell in columns) + " |"
        yield ""


def groups(name: str, config: Any) -> Iterator[tuple[str, Any]]:
    """Yield each group's dotted name and its default values, the outer groups first."""
    yield name, config
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        optional: list[Any] = [arg for arg in typing.get_args(hints[field.name]) if dataclasses.is_dataclass(arg)]
        inner = value if dataclasses.is_dataclass(value) else optional[0]() if optional else None
        if inner is not None:
            yield from groups(f"{name}.{field.name}".lstrip("."), inner)


def comments(cls: type) -> dict[str, str]:
    """Return the comment at the end of each field's line, by the field's name."""
    texts = {}
    for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(cls)).readline):
        if token.type == tokenize.COMMENT and (name := re.match(r"\s+(\w+): ", token.line)):
            texts[name[1]] = token.string.lstrip("# ")
    return texts


def type_name(hint: Any) -> str:
    """Return a type as a reader of YAML would call it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return ", ".join("null" if arg is type(None) else type_name(arg) for arg in args)
    if origin is typing.Literal:
        return ", ".join(f"`{arg}`" for arg in args)
    if origin is tuple:
        return f"list of {type_name(args[0])}"
    if origin is dict:
        return "mapping"
    if dataclasses.is_dataclass(hint):
        return "group"
    return {str: "text", int: "integer", float: "number", bool: "true, false"}[hint]


def plain(value: Any) -> str:
    """Return a default value as it is written in YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(value)}]"
    if isinstance(value, (int, float)):
        return f"{value:g}" if isinstance(value, float) else str(value)
    if isinstance(value, dict):
        return "{}"
    return value or '""'


if __name__ == "__main__":
    sys.exit(main())
