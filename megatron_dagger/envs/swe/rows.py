"""Read the rows of a data set: a json, jsonl (both also gzipped) or parquet file, or a Hugging Face hub id."""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_dagger.config.base import ConfigError
from megatron_dagger.text import parse_json

Row = Mapping[str, Any]

_SUFFIXES = (".json", ".json.gz", ".jsonl", ".jsonl.gz", ".parquet")
_HUB = "hub"


def read_rows(source: str, *, split: str = "test") -> list[dict[str, Any]]:
    """Return all rows of ``source``, a file or a data set's id on the hub; ``split`` applies to the hub only.

    Raises ConfigError if it cannot be read.
    """
    kind = check_source(source)
    if kind == _HUB:
        return _hub(source, split)
    path = Path(source)
    return _parquet(path) if kind == ".parquet" else _json(path, lines=kind.startswith(".jsonl"))


def check_source(source: str) -> str:
    """Return the kind of a data set: a file's suffix, or ``hub``. Raises ConfigError if the file cannot be read."""
    path = Path(source)
    suffixes = path.suffixes[-2:] if path.suffix == ".gz" else path.suffixes[-1:]
    kind = "".join(suffixes).lower()
    if kind in _SUFFIXES:
        if not path.is_file():
            raise ConfigError(f"{source}: no such file")
        return kind
    if path.exists():
        raise ConfigError(f"{source}: expected a .json, .jsonl or .parquet file, or the id of a data set on the hub")
    return _HUB


def require_fields(row: Row, names: Iterable[str], explanation: str) -> None:
    """Raise ConfigError, ending with ``explanation``, unless the row has a value for each of ``names``."""
    absent = [name for name in names if row.get(name) in (None, "")]
    if absent:
        raise ConfigError(f"{row.get('instance_id', 'a row')} has no {', '.join(absent)}: {explanation}")


def ids_of(value: Any) -> tuple[str, ...]:
    """Return a list of test ids, which some data sets store as JSON text. Raises ValueError if it is none."""
    ids = parse_json(value) if value and isinstance(value, str) else value or ()
    if not isinstance(ids, list | tuple) or not all(isinstance(name, str) and name.strip() for name in ids):
        raise ValueError(f"expected a list of test ids, not {value!r}")
    return tuple(ids)


def tests_to_pass(row: Row) -> tuple[str, ...]:
    """Return the tests that only a repair passes. Raises ConfigError if there is none."""
    if not (ids := ids_of(row.get("FAIL_TO_PASS"))):
        raise ConfigError(f"{row['instance_id']}: FAIL_TO_PASS names no test, so any patch would count as a repair")
    return ids


def _json(path: Path, *, lines: bool) -> list[dict[str, Any]]:
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        if lines:
            rows = [parse_json(line) for line in text.splitlines() if line.strip()]
        else:
            rows = parse_json(text)
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from error
    if isinstance(rows, dict):
        rows = list(rows.values())
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"{path}: expected a list of rows")
    return rows


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(f"{path}: parquet files need pyarrow: pip install pyarrow, or convert it to jsonl") from error
    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    return rows


def _hub(name: str, split: str) -> list[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(f"{name}: reading from the hub needs datasets: pip install datasets") from error
    try:
        return [dict(row) for row in datasets.load_dataset(name, split=split)]
    except Exception as error:  # the hub's client raises errors of many kinds
        raise ConfigError(f"{name}, split {split}: not a file, and not readable from the hub ({error})") from error
