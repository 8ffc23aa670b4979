"""The launcher: ranks see torchrun's variables, failures name the rank, nothing survives.

Every test runs both ways, forked and started, with nothing imported in advance; those of the server forked.
"""

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_dagger.config import ConfigError, ParallelConfig
from megatron_dagger.training.ranks import launch as module
from megatron_dagger.training.ranks.launch import LaunchError, check_gpus, launch, warm_up

TWO = ParallelConfig(world_size=2)
PRELOAD = module.PRELOAD
REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(params=["forked", "started"], autouse=True)
def way(request, monkeypatch):
    monkeypatch.setattr(module, "_forks", lambda: request.param == "forked")
    monkeypatch.setattr(module, "PRELOAD", ())
    monkeypatch.setattr(module, "_server", None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # ranks without a GPU, wherever this runs
    yield request.param
    if module._server is not None:
        module._server.close()


forked = pytest.mark.parametrize("way", ["forked"], indirect=True)


def run(tmp_path, source, *, deadline_s=30.0, parallel=TWO):
    (tmp_path / "rank_program.py").write_text(source)
    path = f"{tmp_path}:{REPOSITORY}"
    launch(["rank_program", str(tmp_path)], parallel, tmp_path / "logs", deadline_s, env={"PYTHONPATH": path})


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    assert condition()


def test_ranks_get_torchruns_variables_and_rank_zero_a_listening_socket(tmp_path):
    run(
        tmp_path,
        "import os, socket, sys\n"
        "names = 'RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR OMP_NUM_THREADS'.split()\n"
        "text = ' '.join(os.environ[name] for name in names)\n"
        "open(f'{sys.argv[1]}/{os.environ[\"RANK\"]}', 'w').write(text)\n"
        "if os.environ['RANK'] == '0':\n"
        "    listener = socket.socket(fileno=int(os.environ['MEGATRON_DAGGER_STORE_FD']))\n"
        "    assert listener.getsockname()[1] == int(os.environ['MASTER_PORT'])\n"
        "    listener.settimeout(20)\n"
        "    listener.accept()\n"
        "else:\n"
        "    socket.create_connection((os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])), 20)\n",
    )
    assert (tmp_path / "0").read_text() == "0 2 0 2 127.0.0.1 1"
    assert (tmp_path / "1").read_text() == "1 2 1 2 127.0.0.1 1"


def test_a_failing_rank_is_named_with_its_log_and_the_others_are_killed(tmp_path):
    source = (
        "import os, sys, time\n"
        "open(f'{sys.argv[1]}/pid{os.environ[\"RANK\"]}', 'w').write(str(os.getpid()))\n"
        "if os.environ['RANK'] == '1':\n"
        "    time.sleep(0.3)\n"
        "    raise ValueError('the reason')\n"
        "time.sleep(60)\n"
    )
    with pytest.raises(LaunchError, match=r"(?s)rank 1 failed: exit code 1.*ValueError: the reason"):
        run(tmp_path, source)
    wait_until(lambda: not alive((tmp_path / "pid0").read_text()))


def test_a_rank_that_lost_its_peer_is_not_blamed(tmp_path):
    source = (
        "import os, time\n"
        "if os.environ['RANK'] == '0':\n"
        "    raise SystemExit('RuntimeError: Connection closed by peer')\n"
        "time.sleep(0.3)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    with pytest.raises(LaunchError, match="rank 1 failed: was killed by SIGKILL"):
        run(tmp_path, source)


def test_the_deadline_ends_ranks_and_what_they_started(tmp_path):
    source = (
        "import subprocess, sys, os, time\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        "open(f'{sys.argv[1]}/child{os.environ[\"RANK\"]}', 'w').write(str(child.pid))\n"
        "print('waiting', flush=True)\n"
        "time.sleep(60)\n"
    )
    with pytest.raises(LaunchError, match=r"(?s)not finished after 2 s; rank 0: .*waiting"):
        run(tmp_path, source, deadline_s=2.0)
    wait_until(lambda: not any(alive(p.read_text()) for p in tmp_path.glob("child*")))


def test_a_rank_runs_as_python_m_would(tmp_path):
    """Arguments, directory, main module, exit code, and a log of its own for all that anybody writes."""
    source = (
        "import os, sys, time\n"
        "if __name__ == '__main__':\n"
        "    assert os.getpgid(0) == os.getsid(0) == os.getpid()\n"
        "    assert sys.path[:2] == [os.getcwd(), sys.argv[1]]\n"
        "    assert sys.modules['__main__'].__file__ == sys.argv[0] == os.path.join(sys.argv[1], 'rank_program.py')\n"
        "    assert sys.stdin.read() == ''\n"
        "    rank = os.environ['RANK']\n"
        "    print('python', rank)\n"
        "    print('error', rank, file=sys.stderr)\n"
        "    os.system('echo child $RANK')\n"
        "    while rank == '1' and 'child' not in open(f'{sys.argv[1]}/logs/rank-0.log').read():\n"
        "        time.sleep(0.01)\n"  # a rank that fails takes the others along
        "    sys.exit(2 * int(rank))\n"
    )
    with pytest.raises(LaunchError, match="rank 1 failed: exit code 2;"):
        run(tmp_path, source)
    for rank in (0, 1):
        text = (tmp_path / "logs" / f"rank-{rank}.log").read_text()
        assert text.split("\n") == [f"python {rank}", f"error {rank}", f"child {rank}", ""]


def test_nothing_outlives_a_killed_launcher(tmp_path, way):
    (tmp_path / "rank_program.py").write_text(
        "import os, sys, time\n"
        "open(f'{sys.argv[1]}/pid{os.environ[\"RANK\"]}', 'w').write(f'{os.getpid()} {os.getppid()}')\n"
        "time.sleep(60)\n"
    )
    launcher = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path\n"
            "from megatron_dagger.config import ParallelConfig\n"
            "from megatron_dagger.training.ranks import launch\n"
            f"launch.PRELOAD, launch._forks = (), lambda: {way == 'forked'}\n"
            "launch.launch(['rank_program', sys.argv[1]], ParallelConfig(world_size=2), Path(sys.argv[1]), 60)\n",
            str(tmp_path),
        ],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"},
    )
    wait_until(lambda: len([p for p in tmp_path.glob("pid*") if p.read_text()]) == 2, 30.0)
    pids = {int(pid) for file in tmp_path.glob("pid*") for pid in file.read_text().split()}
    assert len(pids) == 3
    assert (launcher.pid in pids) == (way == "started")
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    wait_until(lambda: not any(map(alive, pids)))


TELL = (
    "import os, sys\n"
    "open(f'{sys.argv[1]}/pid{os.environ[\"RANK\"]}', 'w').write(f'{os.getpid()} {os.getppid()}')\n"
    "assert 'LEFT_BEHIND' not in os.environ\n"
    "os.environ['LEFT_BEHIND'] = sys.argv[1]\n"
)


def told(tmp_path):
    """The ranks' pids and their parents'."""
    pids, parents = zip(*((tmp_path / f"pid{rank}").read_text().split() for rank in (0, 1)), strict=True)
    return [*map(int, pids)], {*map(int, parents)}


@forked
def test_one_server_forks_the_ranks_of_all_launches(tmp_path):
    warm_up({"PYTHONPATH": str(REPOSITORY)})
    server = module._server.pid
    assert server != os.getpid()
    for name in ("first", "second"):  # the second finds another rank_program
        (tmp_path / name).mkdir()
        run(tmp_path / name, TELL)
        pids, parents = told(tmp_path / name)
        assert len({*pids, server, os.getpid()}) == 4
        assert parents == {server}
    module._server.close()
    assert not alive(server)


@forked
def test_a_killed_server_is_reported_and_replaced(tmp_path):
    def kill():
        wait_until(lambda: all((tmp_path / f"pid{rank}").exists() for rank in (0, 1)), 30.0)
        os.kill(module._server.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(LaunchError, match="the process that the ranks are forked from was killed by SIGKILL"):
        run(tmp_path, TELL + "import time; time.sleep(60)\n")
    killer.join()
    pids, parents = told(tmp_path)
    wait_until(lambda: not any(map(alive, pids)))
    run(tmp_path, TELL)
    assert told(tmp_path)[1] == {module._server.pid} != parents


@forked
def test_a_server_that_cannot_start_says_why(tmp_path):
    with pytest.raises(LaunchError, match=r"(?s)ended with exit code 1:.*No module named"):
        launch(["rank_program"], TWO, tmp_path / "logs", 30.0, env={"PYTHONHOME": str(tmp_path)})


@forked
def test_a_failed_import_in_advance_is_in_the_ranks_logs(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PRELOAD", ("no_such_module", "colorsys"))
    run(tmp_path, "import sys; print('colorsys' in sys.modules)")
    for rank in (0, 1):
        text = (tmp_path / "logs" / f"rank-{rank}.log").read_text()
        assert text.startswith("no_such_module could not be imported in advance:\nTraceback")
        assert text.endswith("No module named 'no_such_module'\nTrue\n")


@forked
def test_a_launch_given_up_while_the_server_imports_starts_no_rank_and_spares_the_server(tmp_path, monkeypatch):
    (tmp_path / "slow.py").write_text("import time; time.sleep(2)")
    monkeypatch.setattr(module, "PRELOAD", ("slow",))
    for name in ("given_up", "next"):
        (tmp_path / name).mkdir()
    warm_up({"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"})
    server = module._server.pid
    with pytest.raises(LaunchError, match=r"not finished after 0 s; rank 0: .* is empty"):
        run(tmp_path / "given_up", TELL, deadline_s=0.3)
    run(tmp_path / "next", TELL)
    assert told(tmp_path / "next")[1] == {server}
    assert not [*(tmp_path / "given_up").glob("pid*")]


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
    monkeypatch.setattr(module, "PRELOAD", PRELOAD)
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


def test_several_hosts_need_an_address(tmp_path, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ConfigError, match="nodes=2 needs the variable MASTER_ADDR"):
        run(tmp_path, "", parallel=ParallelConfig(world_size=4, nodes=2))
    with pytest.raises(ConfigError, match="world_size=4 is no multiple of"):
        run(tmp_path, "", parallel=ParallelConfig(world_size=4, nodes=3))


ASK = (
    "import os, signal, sys, time\n"
    "def save(*_):\n"
    "    time.sleep(0.2)\n"
    "    open(f'{sys.argv[1]}/saved{os.environ[\"RANK\"]}', 'w').close()\n"
    "    sys.exit(75)\n"
    "signal.signal(signal.SIGTERM, save)\n"
    "open(f'{sys.argv[1]}/pid{os.environ[\"RANK\"]}', 'w').write(str(os.getpid()))\n"
    "time.sleep(60)\n"
)


def saved(tmp_path):
    return sorted(path.name for path in tmp_path.glob("saved*"))


def test_ranks_may_save_when_the_launcher_is_asked_to_stop(tmp_path):
    def stop(number, frame):
        raise SystemExit(75)

    def ask():
        wait_until(lambda: len(list(tmp_path.glob("pid*"))) == 2, 30.0)
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, stop)
    asking = threading.Thread(target=ask)
    asking.start()
    try:
        with pytest.raises(SystemExit, match="75"):
            run(tmp_path, ASK)
    finally:
        signal.signal(signal.SIGUSR1, before)
    asking.join()
    assert saved(tmp_path) == ["saved0", "saved1"]


def test_a_rank_that_was_asked_itself_stops_all(tmp_path):
    source = ASK.replace("time.sleep(60)", "time.sleep(0.5 if os.environ['RANK'] == '1' else 60)\nsys.exit(75)")
    with pytest.raises(SystemExit, match="75"):
        run(tmp_path, source)
    assert saved(tmp_path) == ["saved0"]


def test_ranks_that_cannot_save_are_not_waited_for(tmp_path):
    began = time.monotonic()
    source = (
        "import os, sys, time\nif os.environ['RANK'] == '1':\n    time.sleep(0.5)\n    sys.exit(75)\ntime.sleep(60)"
    )
    with pytest.raises(SystemExit, match="75"):
        run(tmp_path, source)
    assert time.monotonic() - began < 20


def test_more_ranks_on_a_node_than_gpus_are_refused():
    two_nodes = ParallelConfig(world_size=32, nodes=2)
    check_gpus(two_nodes, None)
    check_gpus(two_nodes, 16)
    with pytest.raises(
        ConfigError, match=r"world_size=32 on training\.parallel\.nodes=2 is 16 ranks a node, but 8 GPUs"
    ):
        check_gpus(two_nodes, 8)


@forked
def test_the_launcher_looks_at_its_gpus(tmp_path, monkeypatch, way):
    monkeypatch.setattr(module, "visible_gpus", lambda environ: 1)
    with pytest.raises(ConfigError, match="2 ranks a node, but 1 GPUs are visible"):
        run(tmp_path, "")
