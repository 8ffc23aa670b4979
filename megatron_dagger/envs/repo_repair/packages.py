"""A pinned source distribution with its own test suite."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class SourcePackage:
    """One pinned source distribution. All paths are relative to its unpacked top directory.

    ``sources`` and ``tests`` are glob patterns for the files under repair and for pytest's arguments. ``import_root``
    comes first on the import path, so the tests import these sources and not an installed copy. ``requires`` names
    other distributions that the tests import.
    """

    name: str
    version: str
    sdist: str
    sha256: str
    sources: tuple[str, ...]
    tests: tuple[str, ...]
    import_root: str = "."
    pytest_args: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    heldout: bool = False

    @property
    def directory(self) -> str:
        """Return the name of the top directory in the archive."""
        return self.sdist.removesuffix(".tar.gz")

    def source_files(self, root: Path) -> tuple[Path, ...]:
        """Return the files under repair, relative to ``root``, in a stable order."""
        return _expand(root, self.sources)

    def test_files(self, root: Path) -> tuple[Path, ...]:
        """Return the test files, relative to ``root``, in a stable order."""
        return _expand(root, self.tests)


def _expand(root: Path, patterns: tuple[str, ...]) -> tuple[Path, ...]:
    paths: dict[Path, None] = {}  # an ordered set
    for pattern in patterns:
        matches = sorted(path for path in root.glob(pattern) if path.is_file())
        if not matches:
            raise FileNotFoundError(f"{root}: no file matches {pattern!r}; delete the folder to unpack it again")
        paths.update(dict.fromkeys(path.relative_to(root) for path in matches))
    return tuple(paths)
