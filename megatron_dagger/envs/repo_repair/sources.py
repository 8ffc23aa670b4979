"""The code that tasks are made from: pinned packages, or modules of the standard library."""

from __future__ import annotations

import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from megatron_dagger.config import ConfigError
from megatron_dagger.envs.repo_repair.generate import SourceTree
from megatron_dagger.envs.repo_repair.packages import SourcePackage

MAX_FILE_BYTES = 400_000
KEPT_SUFFIXES = (".py", ".pyi", ".txt", ".json", ".xml", ".toml", ".diff", ".sql", ".typed")

# Pure-Python modules with quick tests in the interpreter's own test package. The others are accelerated in C or too
# entangled with the interpreter, on which pytest itself runs.
STDLIB_TRAIN = ("colorsys", "textwrap", "shlex", "fractions", "graphlib", "mailbox", "netrc", "quopri", "sched")
STDLIB_HELDOUT = ("calendar", "configparser", "difflib", "ipaddress", "string")


def package_tree(package: SourcePackage, root: Path) -> SourceTree:
    """Return the source tree of an unpacked pinned package, with the files that its modules and tests need."""
    sources, tests = package.source_files(root), package.test_files(root)
    folders = {path.parts[0] for path in (*sources, *tests)}
    return SourceTree(
        name=package.name,
        version=package.version,
        files={str(path.relative_to(root)): path.read_bytes() for path in _needed(root, folders)},
        source_files=tuple(map(str, sources)),
        test_files=tuple(map(str, tests)),
        python_paths=(package.import_root,) if package.import_root == "." else (package.import_root, "."),
        pytest_args=package.pytest_args,
    )


def stdlib_tree(module: str) -> SourceTree:
    """Return a standard-library module with its test file. Raises ConfigError if the tests are not installed."""
    library = Path(sysconfig.get_paths()["stdlib"])
    source, test = library / f"{module}.py", library / "test" / f"test_{module}.py"
    for path in (source, test):
        if not path.is_file():
            raise ConfigError(
                f"{path} is missing: this Python has no tests of {module}; set repo_repair.source=packages"
            )
    return SourceTree(
        name=module,
        version=platform.python_version(),
        files={f"{module}.py": source.read_bytes(), f"tests/test_{module}.py": test.read_bytes()},
        source_files=(f"{module}.py",),
        test_files=(f"tests/test_{module}.py",),
        python_paths=(".",),
    )


def _needed(root: Path, folders: set[str]) -> Iterator[Path]:
    """Yield the files in ``folders``, and a conftest.py at the top, that modules and tests may need."""
    for path in sorted(root.rglob("*")):
        inside = path.relative_to(root)
        wanted = inside.parts[0] in folders or (len(inside.parts) == 1 and path.name == "conftest.py")
        kept = path.suffix in KEPT_SUFFIXES or "test" in str(inside)
        if wanted and kept and path.is_file() and not path.is_symlink() and path.stat().st_size <= MAX_FILE_BYTES:
            yield path
