"""Kill the driver, dockerd and the teacher's server during a round, and count losses and leaks.

tools.bench.sandbox calls ``faults``, which runs this module as the driver and as the teacher's server, each in its own
process. A killed driver resumes when its command is repeated.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_dagger.config import LimitsConfig, SamplingConfig, TeacherConfig
from megatron_dagger.dagger.mixing import SoloTurnPolicy
from megatron_dagger.envs.swe.env import SweEnv
from megatron_dagger.envs.swe.responses import read_tool_call
from megatron_dagger.envs.swe.swebench import swebench_task
from megatron_dagger.envs.swe.tool_calls import ToolCall
from megatron_dagger.policies.openai.cache import ResponseCache
from megatron_dagger.policies.openai.endpoint_pool import EndpointPool
from megatron_dagger.policies.openai.policy import EndpointPolicy
from megatron_dagger.rollout.chat import ChatRenderer
from megatron_dagger.rollout.episode import EpisodeKey, EpisodeRunner
from megatron_dagger.sandbox.docker.daemon import DockerHost
from megatron_dagger.store.aggregated import DataStore
from tools.bench.processes import ROOT
from tools.bench.sandbox_hostile import RUN, SLEEPER, open_sandbox, sleepers
from tools.support import swe_image
from tools.support.chat_server import ChatServer
from tools.support.docker_engine import Daemon, mounts_below, processes_below
from tools.support.ports import free_port

WAIT_S = 900.0
TRIES = 3
CONCURRENT_EPISODES = 8
TEACHER_AWAY_S = 3.0
REPLIES = (
    *(ToolCall(name="bash", arguments={"command": f"{SLEEPER}; echo {n}"}).text() for n in range(4)),
    ToolCall(name="submit", arguments={}).text(),
)


def faults(daemon: Daemon, folder: Path, commit: str, episodes: int) -> dict[str, Any]:
    """Do a round of ``episodes`` with three kills; return the counts of leaks, losses and teacher replies."""
    program, port = [sys.executable, "-m", "tools.bench.sandbox_faults"], free_port()
    teacher_command = [*program, "teacher", str(port)]
    url = f"http://127.0.0.1:{port}/v1"
    driver_command = [*program, "driver", str(folder), daemon.url, commit, url, str(episodes)]
    mounts = len(mounts_below(daemon.home))
    teacher = subprocess.Popen(teacher_command, cwd=ROOT)

    def wait_until(share: float, victim: str) -> None:
        """Wait until ``share`` of the episodes is committed, then announce the next victim."""
        wait_for(lambda: len(committed(folder)) >= share * episodes or driver.poll() is not None)
        if driver.poll() is not None:
            sys.exit(f"the round ended before its {victim} was killed")
        print(f"faults   killing the {victim} after {len(committed(folder))} episodes", flush=True)

    try:
        with subprocess.Popen(driver_command, cwd=ROOT) as driver:
            wait_until(0.2, "driver")
            driver.kill()
        with subprocess.Popen(driver_command, cwd=ROOT) as driver:  # it survives the next two kills
            wait_until(0.4, "dockerd")
            daemon.kill()
            daemon.start()
            wait_until(0.6, "teacher")
            teacher.kill()
            teacher.wait(timeout=WAIT_S)
            time.sleep(TEACHER_AWAY_S)
            teacher = subprocess.Popen(teacher_command, cwd=ROOT)
            driver.wait(timeout=WAIT_S)
        subprocess.run(driver_command, cwd=ROOT, check=True, timeout=WAIT_S)
    finally:
        teacher.kill()
        teacher.wait(timeout=WAIT_S)
    with DockerHost(RUN, daemon.url) as host:
        host.reap()
        leaked = len(host.containers())
    store = DataStore.open(folder / "data.zarr")
    store.seal(0)
    kept = [trajectory.task_id for trajectory in store.episodes(0)]
    expected = {f"episode-{number}" for number in range(episodes)}
    result = {
        "fault_episodes": episodes,
        "leaked_containers": leaked,
        "leaked_processes": len(sleepers()) + sum(len(processes_below(shim)) - 1 for shim in daemon.shims()),
        "leaked_shims": len(daemon.shims()),  # containerd's own; the kill of dockerd leaves empty ones
        "leaked_mounts": len(mounts_below(daemon.home)) - mounts,
        "lost_episodes": len(expected - set(kept)),
        "duplicate_episodes": len(kept) - len(set(kept)),
        "teacher_replies": len(ResponseCache(folder / "teacher")),
        "teacher_replies_needed": episodes * len(REPLIES),
    }
    print(f"faults   {result}", flush=True)
    return result


async def collect(folder: Path, docker_url: str, commit: str, teacher_url: str, episodes: int) -> None:
    """Do the driver's work: run and commit the episodes of round 0 that are not committed yet."""
    store = DataStore.create_or_open(folder / "data.zarr")
    renderer = ChatRenderer.load(folder)
    task = swebench_task(swe_image.row(commit))
    endpoint = TeacherConfig(urls=(teacher_url,), model="replay", sampling=SamplingConfig(max_tokens=200))
    cache = ResponseCache(folder / "teacher")
    pool = EndpointPool(endpoint, cache)
    teacher = EndpointPolicy(endpoint, pool, cache, read=read_tool_call, encode=renderer.action)
    turn_policy = SoloTurnPolicy(policy=teacher)
    limits = LimitsConfig(max_turns=10, max_tokens=20_000)
    semaphore = asyncio.Semaphore(CONCURRENT_EPISODES)
    done = {name for name, _ in store.committed(0)}
    with DockerHost(RUN, docker_url) as host, ThreadPoolExecutor(CONCURRENT_EPISODES) as threads:
        host.reap()
        runner = EpisodeRunner(renderer=renderer, limits=limits, max_action_tokens=200, threads=threads)

        async def run_episode(name: str) -> None:
            key = EpisodeKey(run_seed=1, round_index=0, task_id=name)
            async with semaphore:
                for _ in range(TRIES):
                    trajectory = await runner.run(
                        lambda: SweEnv(task, functools.partial(open_sandbox, host)), turn_policy, key
                    )
                    if trajectory.stop_reason.is_clean:
                        store.append([trajectory])
                        return
            raise RuntimeError(f"{name} broke {TRIES} times: {trajectory.details}")

        names = [f"episode-{number}" for number in range(episodes)]
        await asyncio.gather(*[run_episode(name) for name in names if name not in done])
    pool.close()
    cache.close()


def next_reply(request: dict[str, Any]) -> str:
    """Return the teacher's reply: the next of REPLIES."""
    return REPLIES[sum(message["role"] == "assistant" for message in request["messages"])]


def committed(folder: Path) -> set[Any]:
    """Return the keys of the committed episodes of round 0."""
    path = folder / "data.zarr"
    return set(DataStore.open(path).committed(0)) if (path / "zarr.json").exists() else set()


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until ``condition()`` is true; exit with an error after WAIT_S."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"the round made no progress in {WAIT_S:.0f} s")
        time.sleep(0.1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    teacher = parts.add_parser("teacher", help="serve the teacher")
    teacher.add_argument("port", type=int)
    driver = parts.add_parser("driver", help="collect the round")
    driver.add_argument("folder", type=Path)
    for name in ("docker_url", "commit", "teacher_url"):
        driver.add_argument(name)
    driver.add_argument("episodes", type=int)
    arguments = parser.parse_args()
    if arguments.part == "teacher":
        with ChatServer(next_reply, arguments.port) as server:
            server.serve_forever()
    asyncio.run(
        collect(arguments.folder, arguments.docker_url, arguments.commit, arguments.teacher_url, arguments.episodes)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
