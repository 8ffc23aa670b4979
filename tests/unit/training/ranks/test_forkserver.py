"""The server that ranks are forked from: one for all launches, replaced when killed, gone with the launcher."""

import importlib.util
import os
import signal
import subprocess
import sys
import threading

import pytest

from megatron_dagger.training.ranks import launch as launch_module
from megatron_dagger.training.ranks.launch import LaunchError, launch, warm_up
from tests.support.waiting import wait_until
from tests.unit.training.ranks.rank_programs import REPOSITORY, TWO, alive, forked, run

PRELOAD = launch_module.PRELOAD


REPORT_PIDS = (
    "import os, sys\n"
    "open(f'{sys.argv[1]}/pid{os.environ[\"RANK\"]}', 'w').write(f'{os.getpid()} {os.getppid()}')\n"
    "assert 'LEFT_BEHIND' not in os.environ\n"
    "os.environ['LEFT_BEHIND'] = sys.argv[1]\n"
)


def pids_and_parents(tmp_path):
    """Return the ranks' process ids and those of their parents."""
    pids, parents = zip(*((tmp_path / f"pid{rank}").read_text().split() for rank in (0, 1)), strict=True)
    return [*map(int, pids)], {*map(int, parents)}


@forked
def test_one_server_forks_the_ranks_of_all_launches(tmp_path):
    warm_up({"PYTHONPATH": str(REPOSITORY)})
    server = launch_module._server.pid
    assert server != os.getpid()
    for name in ("first", "second"):  # the second finds another rank_program
        (tmp_path / name).mkdir()
        run(tmp_path / name, REPORT_PIDS)
        pids, parents = pids_and_parents(tmp_path / name)
        assert len({*pids, server, os.getpid()}) == 4
        assert parents == {server}
    launch_module._server.close()
    assert not alive(server)


@forked
def test_a_killed_server_is_reported_and_replaced(tmp_path):
    def kill():
        wait_until(lambda: all((tmp_path / f"pid{rank}").exists() for rank in (0, 1)), 30.0)
        os.kill(launch_module._server.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(LaunchError, match="the process that the ranks are forked from was killed by SIGKILL"):
        run(tmp_path, REPORT_PIDS + "import time; time.sleep(60)\n")
    killer.join()
    pids, parents = pids_and_parents(tmp_path)
    wait_until(lambda: not any(map(alive, pids)))
    run(tmp_path, REPORT_PIDS)
    assert pids_and_parents(tmp_path)[1] == {launch_module._server.pid} != parents


@forked
def test_a_server_that_cannot_start_is_an_error_with_the_reason(tmp_path):
    with pytest.raises(LaunchError, match=r"(?s)ended with exit code 1:.*No module named"):
        launch(["rank_program"], TWO, tmp_path / "logs", 30.0, env={"PYTHONHOME": str(tmp_path)})


@forked
def test_a_failed_import_in_advance_is_logged_by_the_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr(launch_module, "PRELOAD", ("no_such_module", "colorsys"))
    run(tmp_path, "import sys; print('colorsys' in sys.modules)")
    for rank in (0, 1):
        text = (tmp_path / "logs" / f"rank-{rank}.log").read_text()
        assert text.startswith("no_such_module could not be imported in advance:\nTraceback")
        assert text.endswith("No module named 'no_such_module'\nTrue\n")


@forked
def test_a_launch_abandoned_while_the_server_imports_starts_no_rank_and_keeps_the_server(tmp_path, monkeypatch):
    (tmp_path / "slow.py").write_text("import time; time.sleep(2)")
    monkeypatch.setattr(launch_module, "PRELOAD", ("slow",))
    for name in ("abandoned", "next"):
        (tmp_path / name).mkdir()
    warm_up({"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"})
    server = launch_module._server.pid
    with pytest.raises(LaunchError, match=r"not finished after 0 s; rank 0: .* is empty"):
        run(tmp_path / "abandoned", REPORT_PIDS, deadline_s=0.3)
    run(tmp_path / "next", REPORT_PIDS)
    assert pids_and_parents(tmp_path / "next")[1] == {server}
    assert not [*(tmp_path / "abandoned").glob("pid*")]


@forked
def test_a_server_does_not_import_for_a_killed_launcher(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import sys, time\n"
        "open(f'{sys.path[1]}/slow', 'w').close()\n"
        "for number in range(600):\n"
        "    time.sleep(0.1)\n"
        "    try:\n"
        "        __import__(f'none{number}')\n"
        "    except ImportError:\n"
        "        pass\n"
    )
    code = (
        "from megatron_dagger.training.ranks import launch\n"
        "launch.PRELOAD, launch._forks = ('slow',), lambda: True\n"
        "launch.warm_up()\n"
        "print(launch._server.pid, flush=True)\n"
        "input()\n"
    )
    launcher = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with launcher:
        server = int(launcher.stdout.readline())
        wait_until((tmp_path / "slow").exists)
        assert alive(server)
        launcher.kill()
    wait_until(lambda: not alive(server))


@forked
@pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="Megatron-Core is not installed")
def test_the_trainer_is_imported_and_no_thread_runs_when_ranks_are_forked(tmp_path, monkeypatch):
    monkeypatch.setattr(launch_module, "PRELOAD", PRELOAD)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    source = (
        "import os, sys\n"
        "assert {'torch', 'megatron.core', 'zarr', 'megatron_dagger.training.trainer'} <= sys.modules.keys()\n"
        "assert len(os.listdir(f'/proc/{os.getppid()}/task')) == 1\n"
        "import torch\n"
        "assert os.environ['OMP_NUM_THREADS'] == '1'\n"
        "torch.set_num_threads(2)\n"
        "assert torch.ones(512, 512).matmul(torch.ones(512, 512)).sum() == 512**3\n"
    )
    run(tmp_path, source, deadline_s=120.0)
