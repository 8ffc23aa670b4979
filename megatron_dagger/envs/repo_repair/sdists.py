"""Fetching pinned source distributions: downloaded once, verified, unpacked safely, cached.

Purpose: the real code that repair tasks are made from, on any machine that pip can install from.
pip itself downloads (see ``pip_download.py``), because only pip knows its indexes, mirrors,
proxies, certificates and credentials; no host is named here.

Invariants: an archive or a tree under its final name is whole. A download cut short is a
temporary file that nobody reads; an archive whose sha256 differs from the pin is never unpacked.
Several processes may fetch into one cache at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath

from megatron_dagger.envs.repo_repair.packages import SourcePackage
from megatron_dagger.store.atomic import explain_full_disk, publish_directory, sync_tree, temporary_name

logger = logging.getLogger(__name__)

MAX_UNPACKED_BYTES = 64 << 20  # the largest pinned tree has 3 MB: more is a damaged or hostile archive
DOWNLOAD_TIMEOUT_S = 180.0
_WAY_OUT = "repeat the command when the package index can be reached, or set repo_repair.source=stdlib to need none"


class FetchError(ValueError):
    """A source distribution cannot be had, or is not what was pinned."""


def fetch(package: SourcePackage, cache_dir: Path) -> Path:
    """The unpacked top directory of ``package`` below ``cache_dir``, downloaded if it is not there."""
    return fetch_all([package], cache_dir)[0]


def fetch_all(packages: Sequence[SourcePackage], cache_dir: Path) -> list[Path]:
    """Fetch several packages with one download process; the trees, in the order given.

    Raises FetchError when a file cannot be had or is not the pinned one; what had been fetched
    by then stays in the cache and is not downloaded again.
    """
    archives = cache_dir / "sdists"
    missing = [p for p in packages if not _tree(p, cache_dir).is_dir() and not _is_pinned(archives / p.sdist, p)]
    if missing:
        archives.mkdir(parents=True, exist_ok=True)
        _download(missing, archives)
    return [_unpacked(package, cache_dir) for package in packages]


def _tree(package: SourcePackage, cache_dir: Path) -> Path:
    # The digest in the name: a new pin never meets an old tree.
    return cache_dir / "trees" / f"{package.directory}-{package.sha256[:12]}"


def _is_pinned(path: Path, package: SourcePackage) -> bool:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == package.sha256
    except FileNotFoundError:
        return False


def _download(packages: Sequence[SourcePackage], folder: Path) -> None:
    """Have pip put the archives into ``folder``, each under its final name once it is whole."""
    logger.info("downloading %d source packages: %s", len(packages), ", ".join(p.name for p in packages))
    wanted = {
        p.sdist: {"name": p.name, "sdist": p.sdist, "path": str(folder / temporary_name(p.sdist))} for p in packages
    }
    script = Path(__file__).with_name("pip_download.py")
    try:
        done = subprocess.run(
            [_python_with_pip(), str(script)],
            input=json.dumps(list(wanted.values())),
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_TIMEOUT_S,
        )
        for package in packages:
            temporary = Path(wanted[package.sdist]["path"])
            if _is_pinned(temporary, package):
                temporary.replace(folder / package.sdist)
            elif temporary.exists():
                size = temporary.stat().st_size
                raise FetchError(
                    f"{package.sdist}: the package index served {size} bytes whose sha256 is not the pinned "
                    f"{package.sha256}; the download was cut short or the file was replaced: {_WAY_OUT}"
                )
            else:
                raise FetchError(f"{package.sdist} could not be downloaded: {_reason(done.stderr)}; {_WAY_OUT}")
    except subprocess.TimeoutExpired:
        names = ", ".join(p.name for p in packages)
        raise FetchError(f"downloading {names} took over {DOWNLOAD_TIMEOUT_S:.0f} s: {_WAY_OUT}") from None
    finally:
        for item in wanted.values():
            Path(item["path"]).unlink(missing_ok=True)


def _reason(stderr: str) -> str:
    """The line of pip's messages that says most; a file:// location without the package says nothing."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip() and "is ignored: it is neither" not in line]
    return lines[-1][:300] if lines else "no index offers it"


def _python_with_pip() -> str:
    """A Python that has pip: this one, the one its environment was made from, or one on PATH."""
    # Not find_spec("pip"): setuptools takes that for pip at work, and its own distutils, which torch and
    # vLLM import later, then breaks for the rest of the process.
    with contextlib.suppress(PackageNotFoundError):
        version("pip")
        return sys.executable
    others = [getattr(sys, "_base_executable", None), shutil.which("python3"), shutil.which("python")]
    for candidate in dict.fromkeys(other for other in others if other):
        if subprocess.run([candidate, "-m", "pip", "--version"], capture_output=True, timeout=60).returncode == 0:
            return candidate
    raise FetchError(
        f"{sys.executable} has no pip to download with: run `{sys.executable} -m ensurepip`, "
        "or set repo_repair.source=stdlib to need no download"
    )


def _unpacked(package: SourcePackage, cache_dir: Path) -> Path:
    tree = _tree(package, cache_dir)
    if not tree.is_dir():
        temporary = tree.parent / temporary_name(tree.name)
        try:
            temporary.mkdir(parents=True)
            unpack(cache_dir / "sdists" / package.sdist, package.directory, temporary)
            sync_tree(temporary)
            publish_directory(temporary, tree)
        except FileExistsError:
            logger.debug("%s: another process unpacked it first", tree)
        except OSError as error:
            raise explain_full_disk(error, tree) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return tree


def unpack(archive: Path, top: str, target: Path) -> None:
    """Write the regular files below ``top`` in a .tar.gz into the directory ``target``.

    Only files and directories are accepted: a link, a device, a path that leaves ``top``, or an
    archive of more than MAX_UNPACKED_BYTES is a FetchError. Modes, owners and times are not taken over.
    """
    total = 0
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                parts = PurePosixPath(member.name).parts
                if not (member.isfile() or member.isdir()) or parts[:1] != (top,) or ".." in parts:
                    raise FetchError(
                        f"{archive.name}: refused to unpack {member.name!r}: not a plain file below {top}/"
                    )
                total += member.size
                if total > MAX_UNPACKED_BYTES:
                    raise FetchError(f"{archive.name}: refused to unpack more than {MAX_UNPACKED_BYTES >> 20} MiB")
                path = target.joinpath(*parts[1:])
                content = tar.extractfile(member)
                if content is None:
                    path.mkdir(parents=True, exist_ok=True)
                else:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content.read())
    except (tarfile.TarError, EOFError) as error:
        raise FetchError(f"{archive.name} is damaged ({error}): delete {archive} and repeat the command") from error
