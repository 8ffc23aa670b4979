"""Fetch pinned source distributions: downloaded once, verified, unpacked safely, cached.

They are the real code that repair tasks are made from, available on any machine that pip can install from. pip itself
downloads (see pip_download.py), because only pip knows its indexes, mirrors, proxies, certificates and credentials;
no host is named here.

Invariants: an archive or a tree under its final name is complete. An interrupted download is a temporary file that is
never read, and an archive whose sha256 differs from the pin is never unpacked. Several processes may fetch into one
cache at once.
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

MAX_UNPACKED_BYTES = 64 << 20  # the largest pinned tree has 3 MB; a larger archive is damaged or hostile
DOWNLOAD_TIMEOUT_S = 180.0
_ADVICE = "repeat the command once the package index is reachable, or set repo_repair.source=stdlib to need no download"


class FetchError(ValueError):
    """A source distribution cannot be downloaded, or is not the pinned one."""


def fetch(package: SourcePackage, cache_dir: Path) -> Path:
    """Return the unpacked top directory of ``package`` in ``cache_dir``; download it if it is missing."""
    return fetch_all([package], cache_dir)[0]


def fetch_all(packages: Sequence[SourcePackage], cache_dir: Path) -> list[Path]:
    """Fetch several packages with one download process; return their trees, in the same order.

    Raises FetchError if a file cannot be downloaded or is not the pinned one. Files fetched before that stay in the
    cache.
    """
    archives = cache_dir / "sdists"
    missing = [p for p in packages if not _tree(p, cache_dir).is_dir() and not _is_pinned(archives / p.sdist, p)]
    if missing:
        archives.mkdir(parents=True, exist_ok=True)
        _download(missing, archives)
    return [_unpacked(package, cache_dir) for package in packages]


def _tree(package: SourcePackage, cache_dir: Path) -> Path:
    # With the digest in its name, a tree of an old pin is never taken for the new one.
    return cache_dir / "trees" / f"{package.directory}-{package.sha256[:12]}"


def _is_pinned(path: Path, package: SourcePackage) -> bool:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == package.sha256
    except FileNotFoundError:
        return False


def _download(packages: Sequence[SourcePackage], folder: Path) -> None:
    """Let pip download the archives; move each one to its final name in ``folder`` once it is verified."""
    logger.info("downloading %d source packages: %s", len(packages), ", ".join(p.name for p in packages))
    downloads = {
        p.sdist: {"name": p.name, "sdist": p.sdist, "path": str(folder / temporary_name(p.sdist))} for p in packages
    }
    script = Path(__file__).with_name("pip_download.py")
    try:
        done = subprocess.run(
            [_python_with_pip(), str(script)],
            input=json.dumps(list(downloads.values())),
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_TIMEOUT_S,
        )
        for package in packages:
            temporary = Path(downloads[package.sdist]["path"])
            if _is_pinned(temporary, package):
                temporary.replace(folder / package.sdist)
            elif temporary.exists():
                size = temporary.stat().st_size
                raise FetchError(
                    f"{package.sdist}: the package index served {size} bytes whose sha256 is not the pinned "
                    f"{package.sha256}; the download was cut short or the file was replaced: {_ADVICE}"
                )
            else:
                raise FetchError(f"{package.sdist} could not be downloaded: {_reason(done.stderr)}; {_ADVICE}")
    except subprocess.TimeoutExpired:
        names = ", ".join(p.name for p in packages)
        raise FetchError(f"downloading {names} took over {DOWNLOAD_TIMEOUT_S:.0f} s: {_ADVICE}") from None
    finally:
        for item in downloads.values():
            Path(item["path"]).unlink(missing_ok=True)


def _reason(stderr: str) -> str:
    """Return the most informative line of pip's messages; those about file:// locations without the package are not."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip() and "is ignored: it is neither" not in line]
    return lines[-1][:300] if lines else "no index offers it"


def _python_with_pip() -> str:
    """Return a Python that has pip: this one, the one its environment was made from, or one on PATH.

    Raises FetchError if there is none.
    """
    # Not find_spec("pip"): setuptools takes that for a running pip, and then its own distutils, which torch and vLLM
    # import later, is broken for the rest of the process.
    with contextlib.suppress(PackageNotFoundError):
        version("pip")
        return sys.executable
    candidates = [getattr(sys, "_base_executable", None), shutil.which("python3"), shutil.which("python")]
    for candidate in dict.fromkeys(filter(None, candidates)):
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

    Raises FetchError for a link, a device, a path that leaves ``top``, a damaged archive, or more than
    MAX_UNPACKED_BYTES. Modes, owners and times are not preserved.
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
