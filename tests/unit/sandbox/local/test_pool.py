"""The pool of local sandboxes, and its removal of folders that killed processes left behind."""

import os
import tempfile

import pytest

from megatron_dagger.sandbox.local import ProcessSandbox, SandboxPool
from megatron_dagger.sandbox.local.process import HOME_PREFIX
from tests.unit.sandbox.conftest import LIMITS


def test_the_pool_lends_only_sandboxes_that_ended_normally():
    opened = []

    def factory():
        opened.append(ProcessSandbox(LIMITS))
        return opened[-1]

    with SandboxPool(factory) as pool:
        with pool.lend() as first:
            first.write({"left": b"behind"})
        with pool.lend() as second:
            assert second is first
            assert second.read() == {}
        with pytest.raises(KeyError), pool.lend():
            raise KeyError
        with pool.lend() as third:
            assert third is not first
    assert len(opened) == 2


def test_folders_of_killed_processes_are_removed(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    abandoned, young = (tmp_path / f"{HOME_PREFIX}{name}" for name in ("abandoned", "young"))
    (abandoned / "work").mkdir(parents=True)
    young.mkdir()
    with ProcessSandbox(LIMITS) as sandbox:
        (home,) = set(tmp_path.iterdir()) - {abandoned, young}
        for path in (abandoned, home):
            os.utime(path, (0, 0))
        SandboxPool(lambda: sandbox).close()
        assert set(tmp_path.iterdir()) == {young, home}
        assert sandbox.run("echo alive").output == "alive\n"
    assert set(tmp_path.iterdir()) == {young}
