"""The table of pinned source packages that repair tasks are made from, each with its own test suite.

Every package was checked: it is pure Python; its source distribution contains the tests; they pass under plain pytest,
with no plugin and no further dependency, in about a second; and the sha256 is that of the file which the package index
serves. Training and held-out tasks come from different packages, so success on held-out tasks is not memory of a code
base.

Excluded are packages whose tests have different names in every process (isodate: parametrised from a set), and tests
that start processes, measure time, or need what is not pinned: they make the acceptance of a task slow or undecided.
"""

from __future__ import annotations

import difflib

from megatron_dagger.envs.repo_repair.packages import SourcePackage

_BOLTONS = (
    "cache",
    "dict",
    "format",
    "iter",
    "list",
    "math",
    "named",
    "set",
    "stats",
    "str",
    "table",
    "time",
    "url",
)
_NUM2WORDS = ("EN", "FR", "DE", "ES", "IT")

PACKAGES: tuple[SourcePackage, ...] = (
    SourcePackage(
        name="boltons",
        version="26.2.0",
        sdist="boltons-26.2.0.tar.gz",
        sha256="d39cfd15c1a1c3bd4d705c82252fa9edb8e4f5e8cc039f8e39afac7b1b47e92c",
        sources=tuple(f"boltons/{name}utils.py" for name in _BOLTONS),
        tests=tuple(f"tests/test_{name}utils.py" for name in _BOLTONS),
    ),
    SourcePackage(
        name="cachetools",
        version="8.0.1",
        sdist="cachetools-8.0.1.tar.gz",
        sha256="deb1d376d4d28c2f33f3e3058043b005e0af75c35c094bd54053e27d2906ad95",
        sources=("src/cachetools/*.py",),
        tests=("tests/test_*.py",),
        import_root="src",
        pytest_args=("--deselect=tests/test_lfu.py::LFUCacheTest::test_lfu_copy_use_counts",),
    ),
    SourcePackage(
        name="deepmerge",
        version="4.0.0",
        sdist="deepmerge-4.0.0.tar.gz",
        sha256="948565f2bc9cdb41259a4a23d26638e5840c9e084a343ab279ffd3edcfdf74d3",
        sources=("deepmerge/merger.py", "deepmerge/extended_set.py", "deepmerge/strategy/*.py"),
        tests=("deepmerge/tests/test_*.py", "deepmerge/tests/strategy/test_*.py"),
    ),
    SourcePackage(
        name="humanize",
        version="4.17.0",
        sdist="humanize-4.17.0.tar.gz",
        sha256="1d6a36c453dbfbb3f0b34601d2e0b4ce5d48d780305cd45714843f0068fde6ac",
        sources=("src/humanize/number.py", "src/humanize/filesize.py", "src/humanize/lists.py"),
        tests=("tests/test_filesize.py", "tests/test_lists.py", "tests/test_number.py"),
        import_root="src",
    ),
    SourcePackage(
        name="munch",
        version="4.0.0",
        sdist="munch-4.0.0.tar.gz",
        sha256="542cb151461263216a4e37c3fd9afc425feeaf38aaa3025cd2a981fadb422235",
        sources=("munch/__init__.py",),
        tests=("tests/test_munch.py",),
    ),
    SourcePackage(
        name="netaddr",
        version="1.3.0",
        sdist="netaddr-1.3.0.tar.gz",
        sha256="5c3c3d9895b551b763779ba7db7a03487dc1f8e3b385af819af341ae9ef6e48a",
        sources=(
            "netaddr/ip/__init__.py",
            "netaddr/ip/glob.py",
            "netaddr/ip/nmap.py",
            "netaddr/ip/sets.py",
            "netaddr/ip/rfc1924.py",
            "netaddr/strategy/ipv4.py",
            "netaddr/strategy/ipv6.py",
        ),
        tests=("netaddr/tests/ip/test_*.py", "netaddr/tests/strategy/test_ip*.py"),
    ),
    SourcePackage(
        name="num2words",
        version="0.5.14",
        sdist="num2words-0.5.14.tar.gz",
        sha256="b066ec18e56b6616a3b38086b5747daafbaa8868b226a36127e0451c0cf379c6",
        sources=(
            "num2words/base.py",
            "num2words/utils.py",
            "num2words/currency.py",
            "num2words/lang_EU.py",
            *(f"num2words/lang_{name}.py" for name in _NUM2WORDS),
        ),
        tests=tuple(f"tests/test_{name.lower()}.py" for name in _NUM2WORDS),
    ),
    SourcePackage(
        name="parse",
        version="1.22.4",
        sdist="parse-1.22.4.tar.gz",
        sha256="706d458feed5a81b02768d3156e8070baf6cee7d150a3a3c0cd43101a875c3b5",
        sources=("parse/__init__.py",),
        tests=("tests/test_*.py",),
    ),
    SourcePackage(
        name="pyrsistent",
        version="0.20.0",
        sdist="pyrsistent-0.20.0.tar.gz",
        sha256="4c48f78f62ab596c679086084d0dd13254ae4f3d6c72a83ffdf5ebdef8f265a4",
        sources=(
            "pyrsistent/_p[bcdlmrs]*.py",
            "pyrsistent/_checked_types.py",
            "pyrsistent/_field_common.py",
            "pyrsistent/_helpers.py",
            "pyrsistent/_immutable.py",
            "pyrsistent/_toolz.py",
            "pyrsistent/_transformations.py",
        ),
        tests=(
            "tests/bag_test.py",
            "tests/c[hl]*_test.py",
            "tests/[df]*_test.py",
            "tests/immutable_object_test.py",
            "tests/list_test.py",
            "tests/map_test.py",
            "tests/record_test.py",
            "tests/set_test.py",
            "tests/t*_test.py",
        ),
    ),
    SourcePackage(
        name="semver",
        version="3.1.1",
        sdist="semver-3.1.1.tar.gz",
        sha256="149b26cabada6f63212f97e94505d21578cb1d280cf714827f328d5e70765fea",
        sources=("src/semver/version.py",),
        tests=("tests/test_[bcfimnprstv]*.py",),
        import_root="src",
        pytest_args=("--deselect=tests/test_pysemver-cli.py",),
    ),
    SourcePackage(
        name="sqlparse",
        version="0.6.1",
        sdist="sqlparse-0.6.1.tar.gz",
        sha256="ca722573f848ff2d30e40ea30f53a104b7dea7635ea9285891263eb2c58fb6e7",
        sources=(
            "sqlparse/sql.py",
            "sqlparse/lexer.py",
            "sqlparse/formatter.py",
            "sqlparse/utils.py",
            "sqlparse/engine/*.py",
            "sqlparse/filters/*.py",
        ),
        tests=(
            "tests/test_format.py",
            "tests/test_grouping.py",
            "tests/test_parse.py",
            "tests/test_split.py",
            "tests/test_tokenize.py",
        ),
    ),
    SourcePackage(
        name="tabulate",
        version="0.10.0",
        sdist="tabulate-0.10.0.tar.gz",
        sha256="e2cfde8f79420f6deeffdeda9aaec3b6bc5abce947655d17ac662b126e48a60d",
        sources=("tabulate/__init__.py",),
        tests=("test/test_api.py", "test/test_[iort]*.py"),
        pytest_args=("-k", "not numpy and not pandas"),
    ),
    SourcePackage(
        name="toolz",
        version="1.2.0",
        sdist="toolz-1.2.0.tar.gz",
        sha256="9667a038e9d6ecba37995e26cb2f59ec6420b6ad8dd9677de59db9b956b08490",
        sources=("toolz/dicttoolz.py", "toolz/functoolz.py", "toolz/itertoolz.py", "toolz/recipes.py"),
        tests=tuple(f"toolz/tests/test_{name}.py" for name in ("dicttoolz", "functoolz", "itertoolz", "recipes")),
    ),
    SourcePackage(
        name="voluptuous",
        version="0.16.0",
        sdist="voluptuous-0.16.0.tar.gz",
        sha256="006535e22fed944aec17bef6e8725472476194743c87bd233e912eb463f8ff05",
        sources=("voluptuous/*.py",),
        tests=("voluptuous/tests/tests.py",),
    ),
    SourcePackage(
        name="webcolors",
        version="25.10.0",
        sdist="webcolors-25.10.0.tar.gz",
        sha256="62abae86504f66d0f6364c2a8520de4a0c47b80c03fc3a5f1815fedbef7c19bf",
        sources=(
            "src/webcolors/_conversion.py",
            "src/webcolors/_html5.py",
            "src/webcolors/_normalization.py",
        ),
        tests=("tests/test_*.py",),
        import_root="src",
    ),
    SourcePackage(
        name="inflection",
        version="0.5.1",
        sdist="inflection-0.5.1.tar.gz",
        sha256="1a29730d366e996aaacffb2f1f1cb9593dc38e2ddd30c91250c6dde09ea9b417",
        sources=("inflection/__init__.py",),
        tests=("test_inflection.py",),
        heldout=True,
    ),
    SourcePackage(
        name="jsonpointer",
        version="3.12",
        sdist="jsonpointer-3.12.tar.gz",
        sha256="7a3dcc11b64053eaa9c549e85e413f8d40a075215f793a331bed9182a14251ae",
        sources=("jsonpointer.py",),
        tests=("tests.py",),
        pytest_args=("--deselect=tests.py::CommandLineTests", "--deselect=tests.py::DocExampleTests"),
        heldout=True,
    ),
    SourcePackage(
        name="pytimeparse",
        version="1.1.10",
        sdist="pytimeparse-1.1.10.tar.gz",
        sha256="ecf0ee613a72cb0b1d3d5404bd398a64266576fc36ccf3149178af6f2ec6f736",
        sources=("pytimeparse/timeparse.py",),
        tests=("pytimeparse/tests/testdayclock.py", "pytimeparse/tests/testtimeparse.py"),
        heldout=True,
    ),
    SourcePackage(
        name="roman",
        version="5.2",
        sdist="roman-5.2.tar.gz",
        sha256="275fe9f46290f7d0ffaea1c33251b92b8e463ace23660508ceef522e7587cb6f",
        sources=("src/roman/__init__.py",),
        tests=("src/tests.py",),
        import_root="src",
        heldout=True,
    ),
    SourcePackage(
        name="schema",
        version="0.7.8",
        sdist="schema-0.7.8.tar.gz",
        sha256="e86cc08edd6fe6e2522648f4e47e3a31920a76e82cce8937535422e310862ab5",
        sources=("schema/__init__.py",),
        tests=("test_schema.py",),
        heldout=True,
    ),
    SourcePackage(
        name="simpleeval",
        version="1.0.8",
        sdist="simpleeval-1.0.8.tar.gz",
        sha256="b417f869c11f2de034eb919820a825f35d12ce99f63a43971947ce73679eb9ba",
        sources=("simpleeval.py",),
        tests=("tests/test_*.py",),
        heldout=True,
    ),
    SourcePackage(
        name="texttable",
        version="1.7.2",
        sdist="texttable-1.7.2.tar.gz",
        sha256="dc16ea6b35fbf5291ba6ef79d79e37d9b3ca6acd7bae3ca3450488d7c2e19c99",
        sources=("texttable.py",),
        tests=("tests.py",),
        heldout=True,
    ),
    SourcePackage(
        name="unidiff",
        version="1.0.1",
        sdist="unidiff-1.0.1.tar.gz",
        sha256="d9425bc516390c54743a1045b2c1c97f02d245a913a241dd499f958adb2df998",
        sources=("unidiff/patch.py", "unidiff/constants.py"),
        tests=("tests/test_*.py",),
        heldout=True,
    ),
    SourcePackage(
        name="xmltodict",
        version="1.0.4",
        sdist="xmltodict-1.0.4.tar.gz",
        sha256="6d94c9f834dd9e44514162799d344d815a3a4faec913717a9ecbfa5be1bb8e61",
        sources=("xmltodict.py",),
        tests=("tests/test_*.py",),
        heldout=True,
    ),
)


class UnknownPackageError(ValueError):
    """A configured package is not in the table."""


def packages(*, heldout: bool) -> tuple[SourcePackage, ...]:
    """Return the packages for held-out or for training tasks, in the table's order."""
    return tuple(package for package in PACKAGES if package.heldout is heldout)


def find_package(name: str) -> SourcePackage:
    """Return the package of that name. Raises UnknownPackageError with the closest name or the list of names."""
    for package in PACKAGES:
        if package.name == name:
            return package
    names = [package.name for package in PACKAGES]
    matches = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {matches[0]}?" if matches else f"there are: {', '.join(names)}"
    raise UnknownPackageError(f"unknown task package {name!r}; {hint}")
