"""Measure Docker sandboxes under load, against hostile commands, and when the processes around them are killed.

- load: many episodes at once, each in its own container, with scripted tool calls. It measures turns per second and a
  turn's overhead: its time beyond that of its command, which is known because the command sleeps.
- hostile (tools.bench.sandbox_hostile): commands that try to break out, to use up the machine or to stay behind, and
  patches that try to cheat the judge. Each must be contained.
- faults (tools.bench.sandbox_faults): during a round the driver, dockerd and the teacher's server are killed with
  kill -9. It counts leaked containers, processes and mounts, lost and duplicate episodes, and teacher replies.

It starts its own dockerd, which needs root, and builds an image of this host's programs; nothing is pulled.

    .venv/bin/python -m tools.bench.sandbox                  a few minutes
    .venv/bin/python -m tools.bench.sandbox --episodes 16    fewer episodes at once

The last line is ``RESULT {json}``.
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_dagger.envs.swe.env import SYSTEM_MESSAGE, SweEnv
from megatron_dagger.envs.swe.swebench import swebench_task
from megatron_dagger.envs.swe.task import SweTask
from megatron_dagger.envs.swe.tool_calls import ToolCall
from megatron_dagger.rollout.tokenizer import train_tokenizer
from megatron_dagger.sandbox.docker.daemon import DockerHost
from tools.bench.sandbox_faults import faults
from tools.bench.sandbox_hostile import RUN, SLEEP_S, SLEEPER, hostile, open_sandbox
from tools.support import swe_image
from tools.support.docker_engine import docker_daemon, missing

WAIT_S = 900.0
FAULT_EPISODES = 32  # at most


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=64, help="episodes at once (default %(default)s)")
    parser.add_argument("--turns", type=int, default=10, help="turns of an episode under load (default %(default)s)")
    arguments = parser.parse_args()
    if missing():
        sys.exit(f"no Docker daemon can be started: {missing()}")
    with tempfile.TemporaryDirectory(prefix="bench-sandbox-") as folder, docker_daemon() as daemon:
        train_tokenizer([SYSTEM_MESSAGE, swe_image.BUILD], 400, Path(folder))
        with DockerHost(RUN, daemon.url) as host:
            commit = swe_image.build(host)
            task = swebench_task(swe_image.row(commit))
            result = {"episodes": arguments.episodes}
            result |= hostile(host, task, Path(folder))
            result |= load(host, task, arguments.episodes, arguments.turns)
        result |= faults(daemon, Path(folder), commit, min(arguments.episodes, FAULT_EPISODES))
    print("RESULT " + json.dumps(result))
    return 0


def load(host: DockerHost, task: SweTask, episodes: int, turns: int) -> dict[str, Any]:
    """Run ``episodes`` at once, then one alone; return throughput, overheads and memory."""
    command = ToolCall(name="bash", arguments={"command": SLEEPER}).text()

    def episode(_: int) -> list[float]:
        with SweEnv(task, functools.partial(open_sandbox, host)) as env:
            env.reset()
            all_reset.wait(WAIT_S)
            turn_times = []
            for _turn in range(turns):
                began = time.perf_counter()
                env.step(command)
                turn_times.append(time.perf_counter() - began)
            return turn_times

    at_reset: list[float] = []
    all_reset = threading.Barrier(episodes, action=lambda: at_reset.extend((time.perf_counter(), available_mib())))
    began, free_mib = time.perf_counter(), available_mib()
    with ThreadPoolExecutor(episodes) as threads:
        times = [seconds for turn_times in threads.map(episode, range(episodes)) for seconds in turn_times]
        end = time.perf_counter()
    reset_end, least_free_mib = at_reset
    all_reset = threading.Barrier(1)
    alone = episode(0)
    result = {
        "turns_per_s": round(len(times) / (end - reset_end), 1),
        "resets_per_s": round(episodes / (reset_end - began), 2),
        "overhead_ms_per_turn": round(1000 * (statistics.median(times) - SLEEP_S), 1),
        "overhead_ms_per_turn_alone": round(1000 * (statistics.median(alone) - SLEEP_S), 1),
        "mib_per_episode": round((free_mib - least_free_mib) / episodes, 1),
        "driver_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }
    print(f"load     {episodes} episodes x {turns} turns: {result}", flush=True)
    return result


def available_mib() -> float:
    """Return the host's available memory in MiB."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) / 1024


if __name__ == "__main__":
    sys.exit(main())
