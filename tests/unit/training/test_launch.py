"""The launcher: ranks see torchrun's variables, failures name the rank, nothing survives."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_dagger.config import ConfigError, ParallelConfig
from megatron_dagger.training.launch import LaunchError, launch

TWO = ParallelConfig(world_size=2)
REPOSITORY = Path(__file__).resolve().parents[3]


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


def test_ranks_die_with_a_killed_launcher(tmp_path):
    (tmp_path / "rank_program.py").write_text(
        "import os, sys, time\n"
        "open(f'{sys.argv[1]}/pid{os.environ[\"RANK\"]}', 'w').write(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    launcher = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path\n"
            "from megatron_dagger.config import ParallelConfig\n"
            "from megatron_dagger.training.launch import launch\n"
            "launch(['rank_program', sys.argv[1]], ParallelConfig(world_size=2), Path(sys.argv[1]), 60)\n",
            str(tmp_path),
        ],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"},
    )
    wait_until(lambda: len([p for p in tmp_path.glob("pid*") if p.read_text()]) == 2, 30.0)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    wait_until(lambda: not any(alive(p.read_text()) for p in tmp_path.glob("pid*")))


def test_several_hosts_need_an_address(tmp_path, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ConfigError, match="nodes=2 needs the variable MASTER_ADDR"):
        run(tmp_path, "", parallel=ParallelConfig(world_size=4, nodes=2))
    with pytest.raises(ConfigError, match="world_size=4 is no multiple of"):
        run(tmp_path, "", parallel=ParallelConfig(world_size=4, nodes=3))
