"""Run selected pytest tests in this process; record their outcomes and the lines that each test ran.

It runs in the sandbox, beside the code under repair, and imports nothing of megatron_dagger.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import pathlib
import re
import signal
import sys
import types
from collections.abc import Sequence

import code_cache
import pytest

UNUSED = "faulthandler unraisableexception threadexception junitxml doctest pastebin stepwise logging cacheprovider"
OPTIONS = ["-q", "--tb=no", "-c", os.devnull, "--assert=plain"]
OPTIONS += [option for name in UNUSED.split() for option in ("-p", f"no:{name}")]
# Plugins in pytest's own environment are not part of the package under repair, and importing them takes four times as
# long as importing pytest.
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
# Seconds of CPU time, so a busy machine fails no test; and of wall time, for a test that only waits.
TEST_TIMEOUTS = {signal.SIGPROF: (signal.ITIMER_PROF, 2.0), signal.SIGALRM: (signal.ITIMER_REAL, 15.0)}


EARLY_HOOKS = re.compile(rb"pytest_(plugins|addoption|addhooks|cmdline|load_initial|sessionstart)")
# pytest's options that choose among collected tests
_LATE_OPTIONS = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
_LATE_OPTIONS.add_argument("-k", dest="keyword")
_LATE_OPTIONS.add_argument("--deselect", action="append")

# Modules that tests often import; with their own imports they take longer than most tests.
PRELOADED = ("doctest", "html.parser", "pickle", "unittest.mock")


class TestTimeout(Exception):
    """A single test ran too long."""

    __test__ = False


class Recorder:
    """A pytest plugin that selects tests, limits their time, and records outcomes and executed lines."""

    def __init__(self, files: Sequence[str], wanted: list[str] | None, traced: Sequence[str]):
        self.files = [os.path.abspath(path) for path in files]
        self.wanted = None if wanted is None else set(wanted)
        self.traced = frozenset(os.path.abspath(path) for path in traced)
        self.outcomes: dict[str, str] = {}
        self.lines: dict[str, set[tuple[str, int]]] = {}
        self.timed_out = False

    @pytest.hookimpl(tryfirst=True)
    def pytest_ignore_collect(self, collection_path: os.PathLike[str]) -> bool | None:
        # pytest would visit every entry of every folder on the way to a test file, which takes longer than the tests:
        # ignore everything else.
        path = str(collection_path)
        on_the_way = any(file == path or file.startswith(path + os.sep) for file in self.files)
        inside = any(path.startswith(file + os.sep) for file in self.files)
        return None if on_the_way or inside else True

    @pytest.hookimpl(tryfirst=True)
    def pytest_pycollect_makeitem(self, collector: pytest.Collector, name: str) -> list[pytest.Item] | None:
        # Making items of the file's other tests, often hundreds, takes longer than the wanted tests.
        node = f"{collector.nodeid}::{name}"
        return None if self.wanted is None or any(_is_in(test, node) for test in self.wanted) else []

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.wanted is not None:
            items[:] = [item for item in items if item.nodeid in self.wanted]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item):  # type: ignore[no-untyped-def]
        def expired(number: int, _: object) -> None:
            self.timed_out = True
            raise TestTimeout(f"over {TEST_TIMEOUTS[signal.Signals(number)][1]} s")

        previous = {number: signal.signal(number, expired) for number in TEST_TIMEOUTS}
        for timer, seconds in TEST_TIMEOUTS.values():
            signal.setitimer(timer, seconds)
        if self.traced:
            sys.settrace(self._tracer(item.nodeid))
        try:
            return (yield)
        finally:
            sys.settrace(None)
            for number, (timer, _) in TEST_TIMEOUTS.items():
                signal.setitimer(timer, 0)
                signal.signal(number, previous[number])
            if self.timed_out:
                item.session.shouldstop = "a test ran too long"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        known = self.outcomes.get(report.nodeid, "passed")
        if report.outcome != "passed" and known == "passed":
            self.outcomes[report.nodeid] = report.outcome
        else:
            self.outcomes.setdefault(report.nodeid, known)

    def _tracer(self, test: str):  # type: ignore[no-untyped-def]
        lines = self.lines.setdefault(test, set())

        def in_frame(frame: types.FrameType, event: str, _: object):  # type: ignore[no-untyped-def]
            if event == "line":
                lines.add((frame.f_code.co_filename, frame.f_lineno))
            return in_frame

        def on_call(frame: types.FrameType, event: str, _: object):  # type: ignore[no-untyped-def]
            return in_frame if frame.f_code.co_filename in self.traced else None

        return on_call


def _is_in(test: str, node: str) -> bool:
    """Return whether a test's id is that of a function or class, of something in it, or of one of its parameters."""
    return test.startswith(node) and test[len(node) : len(node) + 1] in ("", ":", "[")


def run(
    files: list[str], wanted: list[str] | None, *, paths: list[str], extra: list[str], traced: Sequence[str] = ()
) -> Recorder:
    """Run the ``wanted`` tests (None: all) of ``files``; the others have no outcome."""
    recorder = Recorder(files, wanted, traced)
    for path in paths:  # a package under repair must not be shadowed by a module that is already loaded
        for name in os.listdir(path):
            sys.modules.pop(name.removesuffix(".py"), None)
    sys.path[:0] = [os.path.abspath(path) for path in paths]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        if _started.fits(recorder.files, extra):
            _started.run(files, extra, recorder)
        else:
            pytest.main([*OPTIONS, "--rootdir", os.getcwd(), *extra, *files], plugins=[recorder])
    return recorder


class StartedSession:
    """A pytest session that is started but has collected nothing: half of a short test run's time.

    Made once in the sandbox's server. A child forked from it goes on where ``pytest.main`` would: it collects and runs.
    """

    def __init__(self) -> None:
        self._root = os.getcwd()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            pytest.main([*OPTIONS, "--rootdir", self._root], plugins=[self])
            self._config._do_configure()
            self._session = pytest.Session.from_config(self._config)
            self._session.exitstatus = pytest.ExitCode.OK
            self._config.hook.pytest_sessionstart(session=self._session)

    @pytest.hookimpl(tryfirst=True)
    def pytest_cmdline_main(self, config: pytest.Config) -> int:
        self._config = config
        return 0

    def fits(self, files: Sequence[str], extra: list[str]) -> bool:
        """Return whether tests of these files can run in it: from its root, with no conftest that had to be there.

        Options must be some that pytest reads after its start (``_LATE_OPTIONS``).
        """
        folders = {parent for file in files for parent in pathlib.Path(file).parents}
        in_time = os.getcwd() == self._root and not _LATE_OPTIONS.parse_known_args(extra)[1]
        return in_time and not any(map(self._had_to_be_there, folders))

    def _had_to_be_there(self, folder: pathlib.Path) -> bool:
        """Return whether the folder has a conftest.py that collection alone would not load, or not early enough."""
        try:
            conftest = (folder / "conftest.py").read_bytes()
        except OSError:
            return False
        return pathlib.Path(self._root) not in folder.parents or bool(EARLY_HOOKS.search(conftest))

    def run(self, files: list[str], extra: list[str], recorder: Recorder) -> None:
        """Collect and run tests as pytest.main does. A process can do this once."""
        os.environ["PYTEST_VERSION"] = pytest.__version__
        config, session = self._config, self._session
        config.args = files
        _LATE_OPTIONS.parse_args(extra, config.option)
        config.pluginmanager.register(recorder)
        config.pluginmanager.getplugin("capturemanager").start_global_capturing()
        config.pluginmanager.getplugin("capturemanager").suspend_global_capture()
        try:
            config.hook.pytest_collection(session=session)
            config.hook.pytest_runtestloop(session=session)
        except BaseException:
            pass  # as pytest.main: the outcomes until then count
        finally:
            os.chdir(session.startpath)
            try:
                config.hook.pytest_sessionfinish(session=session, exitstatus=session.exitstatus)
            finally:
                config._ensure_unconfigure()


for _name in PRELOADED:
    importlib.import_module(_name)
code_cache.use_for(os.getcwd())
_started = StartedSession()
