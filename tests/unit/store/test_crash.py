"""``kill -9`` at every file-system change of a commit and of a seal.

A child process counts its own file-system changes (an audit hook is called just before each) and kills itself with
SIGKILL at the n-th. Afterwards the store must read as before the operation or as after it, and repeating the operation
must give the same digest.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_dagger.store.aggregated import DataStore
from tests.support.trajectories import random_trajectory

ROOT = Path(__file__).parents[3]

HARNESS = """
import json, os, shutil, signal, sys, traceback
from pathlib import Path
import zarr, zarr.codecs, zarr.storage  # imported once; zarr's threads start only in the children
from megatron_dagger.store.aggregated import DataStore
from tests.support.trajectories import random_trajectory

root, operation = Path(sys.argv[1]), sys.argv[2]
store, template = root / "data.zarr", root / "template"
EPISODES = [random_trajectory(0, f"task-{i}", turns=2) for i in range(4)]


def in_child(function):
    pid = os.fork()
    if pid == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def build():
    opened = DataStore.create_or_open(store)
    opened.append(EPISODES[:1])
    opened.append(EPISODES[1:3])


def act():
    opened = DataStore.open(store)
    opened.append(EPISODES[3:]) if operation == "commit" else opened.seal(0)


def act_and_die(at):
    changes = []

    def hook(event, args):
        if event == "open":
            if not isinstance(args[2], int) or not args[2] & (os.O_WRONLY | os.O_RDWR):
                return
        elif event not in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"):
            return
        changes.append(str(args[0]))
        if len(changes) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    act()
    (root / "changes.json").write_text(json.dumps(changes))


def check():
    opened = DataStore.open(store)
    names = {task_id for task_id, _ in opened.committed(0)}
    assert names == {t.task_id for t in opened.episodes(0)}
    assert names in ({"task-0", "task-1", "task-2"}, {f"task-{i}" for i in range(4)}), names
    assert operation == "commit" or len(names) == 3
    state = "sealed" if opened.manifest(0) else f"{len(names)} committed"
    opened.verify()
    act()  # the same operation again
    opened = DataStore.open(store)
    manifest = opened.seal(0)
    assert opened.verify() == {0: manifest.episodes}
    names = sorted(p.name for p in (store / "rounds/0000").iterdir())
    assert names == [".lock", "episodes", "zarr.json"], names
    (root / "state.json").write_text(json.dumps([state, manifest.digest]))


def attempt(at):
    shutil.rmtree(store, ignore_errors=True)
    shutil.copytree(template, store)
    code = in_child(lambda: act_and_die(at))
    assert code == (-signal.SIGKILL if at else 0), (at, code)
    assert in_child(check) == 0, f"killed at change {at}"
    return json.loads((root / "state.json").read_text())


assert in_child(build) == 0
store.rename(template)
undisturbed = attempt(0)
changes = json.loads((root / "changes.json").read_text())
# inside the new arrays, which nothing refers to yet, every seventh change suffices
points = [n for n, path in enumerate(changes, 1) if "/.tmp-episodes" not in path or n % 7 == 0]
print(json.dumps([*map(attempt, points), undisturbed]))
"""


@pytest.mark.parametrize(
    ("operation", "before", "after"),
    [("commit", "3 committed", "4 committed"), ("seal", "3 committed", "sealed")],
)
def test_a_process_killed_at_any_change_leaves_the_old_or_the_new_state(
    tmp_path: Path, operation: str, before: str, after: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HARNESS, str(tmp_path), operation],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    states = [state for state, _ in results]
    assert len({digest for _, digest in results}) == 1
    assert len(results) > 8  # the hook saw the changes
    # the old state before the commit point, the new state after it
    assert states == [before] * states.count(before) + [after] * states.count(after)
    assert states.count(before) > 4
    assert states[-1] == after
    assert states.count(after) >= (1 if operation == "commit" else 10)  # a seal cleans up after its commit point


WRITER = """
import sys
from megatron_dagger.store.aggregated import DataStore
from tests.support.trajectories import random_trajectory
store = DataStore.create_or_open(sys.argv[1], writer=sys.argv[2])
print("ready", flush=True)
for index in map(int, sys.argv[3].split(",")):
    for _, task_id, _ in store.append([random_trajectory(int(sys.argv[4]), f"task-{index:03d}", turns=2)]):
        print(task_id, flush=True)
"""


def start_writer(path: Path, name: str, indices: list[int], seed: int = 0) -> subprocess.Popen[str]:
    arguments = [str(path), name, ",".join(map(str, indices)), str(seed)]
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_several_writers_at_once_commit_every_episode_once(tmp_path: Path) -> None:
    path, count = tmp_path / "data.zarr", 24
    orders = [list(range(count)), list(range(count))[::-1], [*range(count // 2, count), *range(count // 2)]]
    writers = [start_writer(path, f"w{i}", order, seed=i) for i, order in enumerate(orders)]
    lines = [w.communicate(timeout=120)[0].split() for w in writers]
    assert [w.returncode for w in writers] == [0, 0, 0]
    confirmed = [line for out in lines for line in out if line != "ready"]
    assert sorted(confirmed) == [f"task-{i:03d}" for i in range(count)]  # each by exactly one writer
    store = DataStore.open(path)
    assert sum(1 for _ in store.episodes(0)) == count
    assert store.seal(0).episodes == count
    assert store.verify() == {0: count}


def test_a_killed_writer_loses_no_confirmed_episode(tmp_path: Path) -> None:
    path = tmp_path / "data.zarr"
    other = start_writer(path, "other", list(range(100, 108)))
    victim = start_writer(path, "victim", list(range(40)))
    assert victim.stdout is not None
    confirmed = [victim.stdout.readline().strip() for _ in range(8)][1:]
    time.sleep(0.01)
    os.kill(victim.pid, signal.SIGKILL)
    confirmed += victim.stdout.read().split()
    assert victim.wait(timeout=30) == -signal.SIGKILL
    victim.stdout.close()
    confirmed_by_other = [line for line in other.communicate(timeout=60)[0].split() if line != "ready"]
    assert other.returncode == 0  # the dead writer's lock does not block it
    store = DataStore.open(path)
    names = {task_id for task_id, _ in store.committed(0)}
    assert set(confirmed) | set(confirmed_by_other) <= names
    assert len(names) <= len(confirmed) + len(confirmed_by_other) + 1  # at most the commit that was interrupted
    restarted = start_writer(path, "victim", list(range(40)))
    restarted.communicate(timeout=120)
    store.seal(0)
    assert store.verify() == {0: 48}
    fresh = DataStore.create_or_open(tmp_path / "undisturbed.zarr")
    fresh.append([random_trajectory(0, f"task-{i:03d}", turns=2) for i in [*range(40), *range(100, 108)]])
    assert fresh.seal(0).digest == json.loads((path / "rounds/0000/zarr.json").read_text())["attributes"][
        "manifest"]["digest"]  # fmt: skip
