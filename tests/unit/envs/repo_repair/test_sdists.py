"""Fetching source distributions with the real pip, from a folder instead of an index: no network."""

import dataclasses
import hashlib
import io
import subprocess
import sys
import tarfile

import pytest

from megatron_dagger.envs.repo_repair import sdists
from megatron_dagger.envs.repo_repair.packages import SourcePackage
from megatron_dagger.envs.repo_repair.sdists import FetchError, fetch, fetch_all, unpack

TOP = "tinypkg-1.0"


def archive(entries, path):
    """Write a .tar.gz of (name, content) pairs; a content that is a TarInfo is added as it is."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in entries:
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes for its only source, with one source distribution in it."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    archive(
        [
            (f"{TOP}/PKG-INFO", b"Metadata-Version: 2.1\nName: tinypkg\nVersion: 1.0\n"),
            (f"{TOP}/tinypkg/__init__.py", b"def one():\n    return 1\n"),
            (f"{TOP}/tests/test_one.py", b"def test_one():\n    assert True\n"),
        ],
        folder / f"{TOP}.tar.gz",
    )
    return folder


@pytest.fixture
def package(index):
    digest = hashlib.sha256((index / f"{TOP}.tar.gz").read_bytes()).hexdigest()
    return SourcePackage(
        name="tinypkg",
        version="1.0",
        sdist=f"{TOP}.tar.gz",
        sha256=digest,
        sources=("tinypkg/*.py",),
        tests=("tests/test_*.py",),
    )


def test_fetch_downloads_verifies_and_unpacks(package, tmp_path):
    root = fetch(package, tmp_path / "cache")
    assert (root / "tinypkg" / "__init__.py").read_text() == "def one():\n    return 1\n"
    assert [str(path) for path in package.source_files(root)] == ["tinypkg/__init__.py"]
    assert [str(path) for path in package.test_files(root)] == ["tests/test_one.py"]


def test_a_cached_package_needs_no_index(package, index, tmp_path):
    root = fetch(package, tmp_path / "cache")
    (index / package.sdist).unlink()
    assert fetch(package, tmp_path / "cache") == root


def test_half_a_file_in_the_cache_is_fetched_again(package, index, tmp_path):
    half = tmp_path / "cache" / "sdists" / package.sdist
    half.parent.mkdir(parents=True)
    half.write_bytes((index / package.sdist).read_bytes()[:100])
    assert (fetch(package, tmp_path / "cache") / "tinypkg").is_dir()


def test_interrupted_unpacking_leaves_no_tree(package, tmp_path, monkeypatch):
    def fail_halfway(path, top, target):
        (target / "tinypkg").mkdir()
        raise OSError("the disk went away")

    with monkeypatch.context() as patch:
        patch.setattr(sdists, "unpack", fail_halfway)
        with pytest.raises(OSError, match="went away"):
            fetch(package, tmp_path / "cache")
    assert list((tmp_path / "cache" / "trees").iterdir()) == []
    assert (fetch(package, tmp_path / "cache") / "tinypkg" / "__init__.py").is_file()


def test_a_file_without_the_pinned_digest_is_refused(package, tmp_path):
    mispinned = dataclasses.replace(package, sha256="0" * 64)
    with pytest.raises(FetchError, match=r"tinypkg-1\.0\.tar\.gz.*sha256.*repo_repair\.source=stdlib"):
        fetch(mispinned, tmp_path / "cache")
    assert list((tmp_path / "cache" / "sdists").iterdir()) == []


def test_a_missing_file_is_an_error_with_advice_and_keeps_the_others(package, tmp_path):
    missing = dataclasses.replace(package, name="otherpkg", sdist="otherpkg-2.0.tar.gz")
    with pytest.raises(FetchError, match=r"otherpkg-2\.0\.tar\.gz.*repo_repair\.source=stdlib"):
        fetch_all([package, missing], tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache" / "sdists").iterdir()] == [package.sdist]


def test_an_unreachable_index_is_a_clear_error(package, tmp_path, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: nobody answers
    with pytest.raises(FetchError, match=r"could not be downloaded.*repo_repair\.source=stdlib"):
        fetch(package, tmp_path / "cache")


def link(name, kind, target):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "entry",
    [
        (f"{TOP}/../../escaped", b"x"),
        ("/etc/escaped", b"x"),
        ("other/file", b"x"),
        ("", link(f"{TOP}/link", tarfile.SYMTYPE, "/etc/passwd")),
        ("", link(f"{TOP}/hard", tarfile.LNKTYPE, f"{TOP}/PKG-INFO")),
        ("", link(f"{TOP}/fifo", tarfile.FIFOTYPE, "")),
    ],
    ids=["parent", "absolute", "beside", "symlink", "hardlink", "fifo"],
)
def test_unpack_refuses_all_but_plain_files_below_the_top(entry, tmp_path):
    path = archive([(f"{TOP}/PKG-INFO", b"ok"), entry], tmp_path / "evil.tar.gz")
    target = tmp_path / "deep" / "er" / "target"
    target.mkdir(parents=True)
    with pytest.raises(FetchError, match="refused to unpack"):
        unpack(path, TOP, target)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["PKG-INFO", "evil.tar.gz"]


def test_unpack_refuses_a_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(sdists, "MAX_UNPACKED_BYTES", 1000)
    path = archive([(f"{TOP}/zeros", bytes(2000))], tmp_path / "bomb.tar.gz")
    with pytest.raises(FetchError, match="refused to unpack more than"):
        unpack(path, TOP, tmp_path)


def test_a_damaged_archive_is_named(package, index, tmp_path):
    whole = (index / package.sdist).read_bytes()
    half = tmp_path / "half.tar.gz"
    half.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FetchError, match=r"half\.tar\.gz is damaged"):
        unpack(half, TOP, tmp_path / "target")


def test_finding_pip_does_not_break_distutils():
    """Otherwise vLLM could not start in the same process after a download: an assertion of setuptools fails."""
    program = (
        "from megatron_dagger.envs.repo_repair.sdists import _python_with_pip\n"
        "_python_with_pip()\n"
        "import distutils.core, setuptools\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
