"""Files and directories appear completely or not at all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dagger.store.atomic import (
    DiskFullError,
    UnreadableFileError,
    publish_directory,
    read_json,
    remove_tree,
    write_bytes,
    write_json,
    write_text,
)


def test_json_round_trips_and_missing_directories_are_created(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, "é\ud800"], "b": {"c": True}}
    write_json(tmp_path / "x" / "y" / "v.json", value)
    assert read_json(tmp_path / "x" / "y" / "v.json") == value
    write_text(tmp_path / "t", "grün")
    assert (tmp_path / "t").read_bytes() == "grün".encode()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_names_the_file_and_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "manifest.json"
    write_bytes(path, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(DiskFullError, match=r"manifest\.json.*3 bytes.*free some space") as caught:
        write_bytes(path, b"new")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["manifest.json"]


FULL_DISK = """
import sys
from pathlib import Path
from megatron_dagger.store.aggregated import DataStore
from megatron_dagger.store.atomic import DiskFullError, check_disk_space, write_bytes
from tests.support.trajectories import random_trajectory, same_trajectory

root = Path(sys.argv[1])
write_bytes(root / "small", b"old")
try:
    write_bytes(root / "small", b"x" * (4 << 20))
    sys.exit("4 MiB fitted on a disk of 1 MiB")
except DiskFullError as error:
    assert str(root / "small") in str(error), error
assert (root / "small").read_bytes() == b"old"
check_disk_space(root, 1000)
assert sorted(p.name for p in root.iterdir()) == ["small"]
store = DataStore.create_or_open(root / "data.zarr")
kept = []
try:
    for index in range(10_000):
        episode = random_trajectory(0, f"task-{index:05d}")
        store.append([episode])
        kept.append(episode)
    sys.exit("the disk never filled")
except DiskFullError as error:
    assert "data.zarr" in str(error), error
stored = list(DataStore.open(root / "data.zarr").episodes(0))
assert kept and all(same_trajectory(a, b) for a, b in zip(kept, stored, strict=True))
try:
    store.seal(0)
    sys.exit("a seal fitted on a full disk")
except DiskFullError:
    pass
assert len(DataStore.open(root / "data.zarr").committed(0)) == len(kept)
try:
    check_disk_space(root)
    sys.exit("there was room on a full disk")
except DiskFullError as error:
    assert str(root) in str(error), error
assert not list(root.rglob(".tmp-*"))
print("full after", len(kept))
"""


def test_a_full_file_system_loses_nothing(tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o size=1m tmpfs {tmp_path}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("needs unshare and permission to mount a small file system in a new namespace")
    command = f'{mount} && exec "{sys.executable}" -c "$SCRIPT" {tmp_path}'
    environment = {**os.environ, "SCRIPT": FULL_DISK, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", command], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("full after")


def test_other_errors_are_not_reported_as_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError) as caught:
        write_bytes(tmp_path / "file" / "below", b"")
    assert not isinstance(caught.value, DiskFullError)


@pytest.mark.parametrize("value", [float("nan"), {1, 2}])
def test_a_value_that_is_not_json_is_refused_before_anything_is_written(tmp_path: Path, value: object) -> None:
    with pytest.raises(ValueError, match=r"v\.json"):
        write_json(tmp_path / "v.json", {"v": value})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("content", "message"), [(None, "no such file"), (b'{"a": ', "not valid JSON"),
                                                  (b"\xff\xfe", "not valid JSON")])  # fmt: skip
def test_reading_a_missing_or_damaged_file_names_it(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "collect.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UnreadableFileError, match=rf"collect\.json.*{message}"):
        read_json(path)


def test_a_directory_is_published_once_and_removed_atomically(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text(name)
    publish_directory(tmp_path / "a", tmp_path / "target")
    with pytest.raises(FileExistsError, match="target"):
        publish_directory(tmp_path / "b", tmp_path / "target")
    assert (tmp_path / "target" / "content").read_text() == "a"
    remove_tree(tmp_path / "target")
    remove_tree(tmp_path / "target")
    assert sorted(os.listdir(tmp_path)) == ["b"]
