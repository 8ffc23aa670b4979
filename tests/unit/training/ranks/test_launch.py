"""The launcher: ranks get torchrun's variables, failures name the rank, and no process survives."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from megatron_dagger.config import ConfigError, ParallelConfig
from megatron_dagger.training.ranks import launch as launch_module
from megatron_dagger.training.ranks.launch import LaunchError, check_gpus, warn_of_few_processors
from tests.support.waiting import wait_until
from tests.unit.training.ranks.rank_programs import REPOSITORY, alive, forked, run


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


def test_the_deadline_ends_ranks_and_their_children(tmp_path):
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
    """Check arguments, directory, main module and exit code, and that all output goes to the rank's own log."""
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
        "        time.sleep(0.01)\n"  # a failing rank ends the others
        "    sys.exit(2 * int(rank))\n"
    )
    with pytest.raises(LaunchError, match="rank 1 failed: exit code 2;"):
        run(tmp_path, source)
    for rank in (0, 1):
        text = (tmp_path / "logs" / f"rank-{rank}.log").read_text()
        assert text.split("\n") == [f"python {rank}", f"error {rank}", f"child {rank}", ""]


def test_nothing_outlives_a_killed_launcher(tmp_path, start_method):
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
            f"launch.PRELOAD, launch._forks = (), lambda: {start_method == 'forked'}\n"
            "launch.launch(['rank_program', sys.argv[1]], ParallelConfig(world_size=2), Path(sys.argv[1]), 60)\n",
            str(tmp_path),
        ],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"},
    )
    wait_until(lambda: len([p for p in tmp_path.glob("pid*") if p.read_text()]) == 2, 30.0)
    pids = {int(pid) for file in tmp_path.glob("pid*") for pid in file.read_text().split()}
    assert len(pids) == 3
    assert (launcher.pid in pids) == (start_method == "started")
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    wait_until(lambda: not any(map(alive, pids)))


def test_several_hosts_need_an_address(tmp_path, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ConfigError, match="nodes=2 needs the variable MASTER_ADDR"):
        run(tmp_path, "", parallel=ParallelConfig(world_size=4, nodes=2))
    with pytest.raises(ConfigError, match=r"nodes=3 does not divide training\.parallel\.world_size=4"):
        ParallelConfig(world_size=4, nodes=3)  # so a launch needs no check of its own


@pytest.mark.parametrize(("processors", "warned"), [(1, True), (31, True), (32, False), (192, False)])
def test_few_processors_for_the_ranks_of_a_node_are_warned_of(caplog, processors, warned):
    warn_of_few_processors(ParallelConfig(world_size=16, nodes=2), processors)
    assert (f"{processors} processors for 8 ranks" in caplog.text) == warned


STOPPABLE = (
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


def test_ranks_may_save_when_the_launcher_gets_a_signal(tmp_path):
    def stop(number, frame):
        raise SystemExit(75)

    def send_signal():
        wait_until(lambda: len(list(tmp_path.glob("pid*"))) == 2, 30.0)
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, stop)
    sender = threading.Thread(target=send_signal)
    sender.start()
    try:
        with pytest.raises(SystemExit, match="75"):
            run(tmp_path, STOPPABLE)
    finally:
        signal.signal(signal.SIGUSR1, before)
    sender.join()
    assert saved(tmp_path) == ["saved0", "saved1"]


def test_a_signal_to_one_rank_stops_all(tmp_path):
    source = STOPPABLE.replace("time.sleep(60)", "time.sleep(0.5 if os.environ['RANK'] == '1' else 60)\nsys.exit(75)")
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
        ConfigError, match=r"world_size=32 on training\.parallel\.nodes=2 is 16 ranks per node, but 8 GPUs"
    ):
        check_gpus(two_nodes, 8)


@forked
def test_the_launcher_checks_the_visible_gpus(tmp_path, monkeypatch, start_method):
    monkeypatch.setattr(launch_module, "visible_gpus", lambda environ: 1)
    with pytest.raises(ConfigError, match="2 ranks per node, but 1 GPUs are visible"):
        run(tmp_path, "")
