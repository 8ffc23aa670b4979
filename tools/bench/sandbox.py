"""Docker sandboxes under load, under faults, and against hostile commands.

- load: many episodes at once, each in a container of its own, by replayed tool calls; turns per second, and
  the time of a turn beyond that of its command, which is known, for it sleeps;
- faults: in the middle of a round the driver is killed (kill -9), then dockerd, then the teacher's server, both
  of which are started again; the same command goes on with the round. Counted is what is left in the end, what
  the store lacks or has twice, and how many replies the teacher had to give;
- hostile: commands that want to break out, to use everything up, or to stay. Each must be contained.

    tools/bench/sandbox.py                  a dockerd of its own (as root), an image of this host's programs
    tools/bench/sandbox.py --episodes 16    fewer at once
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_dagger.config import LimitsConfig, SamplingConfig, TeacherConfig
from megatron_dagger.dagger.mixing import SoloTurnPolicy
from megatron_dagger.driver.environments import one_tool_call
from megatron_dagger.envs.base import CommandResult, EnvironmentBroken
from megatron_dagger.envs.swe.env import SYSTEM_MESSAGE, SweEnv
from megatron_dagger.envs.swe.judge import judge
from megatron_dagger.envs.swe.swebench import swebench_task
from megatron_dagger.envs.swe.task import SweTask
from megatron_dagger.envs.swe.tool_calls import ToolCall
from megatron_dagger.policies.openai.cache import ResponseCache
from megatron_dagger.policies.openai.policy import EndpointPolicy
from megatron_dagger.rollout.chat import ChatRenderer
from megatron_dagger.rollout.episode import EpisodeKey, EpisodeRunner
from megatron_dagger.rollout.tokenizer import train_tokenizer
from megatron_dagger.sandbox.docker.daemon import DockerHost
from megatron_dagger.sandbox.docker.sandbox import DockerLimits, DockerSandbox
from megatron_dagger.store.aggregated import DataStore
from megatron_dagger.types import StopReason
from tools.support import swe_image
from tools.support.chat_server import ChatServer
from tools.support.docker_engine import IMAGE, Daemon, docker_daemon, missing, mounts_below, processes_below
from tools.support.ports import free_port

RUN = "bench-sandbox"
COMMAND_S = 0.25
SLEEPER = "sleep 0.2500031"  # COMMAND_S, and known again among the host's processes
LIMITS = DockerLimits(timeout_s=20, memory_mib=256, disk_mib=64, processes=64, cpus=1.0, output_bytes=4000)
WAIT_S = 900.0
TRIES = 3
TEACHER_AWAY_S = 3.0
REPLIES = (
    *(ToolCall(name="bash", arguments={"command": f"{SLEEPER}; echo {n}"}).text() for n in range(4)),
    ToolCall(name="submit", arguments={}).text(),
)
Check = Callable[[CommandResult], bool]

# A command, and what must be so of its result; a stop reason: it must end the episode with that.
HOSTILE: dict[str, tuple[str, Check | StopReason]] = {
    "fork bomb": ("b() { b | b & }; b; sleep 9", lambda result: result.timed_out or "fork" in result.output),
    "memory bomb": ("python -c 'x = bytearray(900 << 20)'; true", StopReason.OUT_OF_MEMORY),
    "disk filler": (
        "for i in 1 2 3 4; do head -c 60000000 /dev/zero > $i; done; sleep 1",
        StopReason.ENVIRONMENT_ERROR,
    ),
    "endless output": ("yes", lambda result: len(result.output) < 2 * LIMITS.output_bytes),
    "background daemon": (f"setsid nohup {SLEEPER}9999 > /dev/null 2>&1 & true", lambda result: not sleepers()),
    "network": ("tail -n +3 /proc/net/dev | grep -v lo:", lambda result: result.output == ""),
    "Docker's socket": ("find / -type s 2> /dev/null", lambda result: result.output == ""),
    "devices": ("mknod /tmp/d b 254 0 && head -c 9 /tmp/d", lambda result: result.exit_code != 0),
    "mount": ("mkdir -p /tmp/m && mount -t proc proc /tmp/m", lambda result: result.exit_code != 0),
    "kernel": ("echo 1 > /proc/sys/kernel/panic || echo b > /proc/sysrq-trigger", lambda r: r.exit_code != 0),
    "kills everything": ("kill -9 -1; kill -9 1", lambda result: result.exit_code == 137),
    "hangs": ("trap '' TERM; while :; do :; done", lambda result: result.timed_out),
}
# A patch that must not resolve the task.
CHEATS = {
    "the judge's script, in the patch": swe_image.PATCH + swe_image.WRITE.format("../eval.sh"),
    "the judge's script, through a link": swe_image.PATCH
    + swe_image.LINK
    + swe_image.WRITE.format("calc/away/eval.sh"),
    "tests of its own": swe_image.TESTS_CHANGED,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=64, help="at once")
    parser.add_argument("--turns", type=int, default=10, help="of an episode under load")
    names = ("FOLDER", "URL", "COMMIT", "TEACHER")
    parser.add_argument("--worker", nargs=4, metavar=names, help=argparse.SUPPRESS)
    parser.add_argument("--teacher", type=int, metavar="PORT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        folder, url, commit, teacher = arguments.worker
        asyncio.run(collect(Path(folder), url, commit, teacher, arguments.episodes, at_once=8))
        return 0
    if arguments.teacher:
        with ChatServer(next_reply, arguments.teacher) as server:
            server.serve_forever()
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
        result |= faults(daemon, Path(folder), commit, min(arguments.episodes, 32))
    print("RESULT " + json.dumps(result))
    return 0


def load(host: DockerHost, task: SweTask, episodes: int, turns: int) -> dict[str, Any]:
    """``episodes`` at once; then one alone."""
    turn = ToolCall(name="bash", arguments={"command": SLEEPER}).text()

    def episode(number: int) -> list[float]:
        with SweEnv(task, functools.partial(open_sandbox, host)) as env:
            env.reset()
            ready.wait(WAIT_S)
            times = []
            for _ in range(turns):
                began = time.perf_counter()
                env.step(turn)
                times.append(time.perf_counter() - began)
            return times

    at_ready: list[float] = []
    ready = threading.Barrier(episodes, action=lambda: at_ready.extend((time.perf_counter(), available_mib())))
    began, free_mib = time.perf_counter(), available_mib()
    with ThreadPoolExecutor(episodes) as threads:
        times = [seconds for one in threads.map(episode, range(episodes)) for seconds in one]
        ended = time.perf_counter()
    reset_done, least_mib = at_ready
    ready = threading.Barrier(1)
    alone = episode(0)
    found = {
        "turns_per_s": round(len(times) / (ended - reset_done), 1),
        "resets_per_s": round(episodes / (reset_done - began), 2),
        "overhead_ms_per_turn": round(1000 * (statistics.median(times) - COMMAND_S), 1),
        "overhead_ms_per_turn_alone": round(1000 * (statistics.median(alone) - COMMAND_S), 1),
        "mib_per_episode": round((free_mib - least_mib) / episodes, 1),
        "driver_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }
    print(f"load     {episodes} episodes x {turns} turns: {found}", flush=True)
    return found


def hostile(host: DockerHost, task: SweTask, folder: Path) -> dict[str, Any]:
    """Each command in a container of its own, which must take another command afterwards or be typed broken."""
    contained = []
    for name, patch in CHEATS.items():
        verdict = judge(functools.partial(open_sandbox, host), task, patch)
        contained.append(not verdict.resolved)
        print(f"hostile  {'NOT CONTAINED' if verdict.resolved else 'contained'}  {name}: {verdict.reason}", flush=True)
    secret = folder / "secret"
    secret.write_text("of the host")
    read: dict[str, tuple[str, Check | StopReason]] = {
        "host files": (f"cat {secret}", lambda result: result.exit_code != 0)
    }
    for name, (command, expected) in (HOSTILE | read).items():
        began = time.perf_counter()
        with DockerSandbox(host, IMAGE, LIMITS) as sandbox:
            try:
                result = sandbox.run(command, timeout_s=3)
                well = not isinstance(expected, StopReason) and expected(result)
                well = well and sandbox.run("echo alive").output == "alive\n"
                what = f"exit code {result.exit_code}{', timed out' if result.timed_out else ''}"
            except EnvironmentBroken as error:
                well, what = error.reason is expected, f"{error.reason}: {error}"
        contained.append(well)
        seconds = time.perf_counter() - began
        print(f"hostile  {'contained' if well else 'NOT CONTAINED'}  {name}: {what} ({seconds:.1f} s)", flush=True)
    return {"hostile_cases": len(contained), "hostile_contained": sum(contained)}


def faults(daemon: Daemon, folder: Path, commit: str, episodes: int) -> dict[str, Any]:
    """A round whose driver is killed, then its daemon, then its teacher's server."""
    program, port = [sys.executable, str(Path(__file__))], free_port()
    url = f"http://127.0.0.1:{port}/v1"
    command = [*program, "--episodes", str(episodes), "--worker", str(folder), daemon.url, commit, url]
    mounts = len(mounts_below(daemon.home))
    teacher = subprocess.Popen([*program, "--teacher", str(port)])

    def at(share: float, victim: str) -> None:
        """Wait until so much of the round is there, and say who is killed now."""
        wait_for(lambda: len(committed(folder)) >= share * episodes or worker.poll() is not None)
        if worker.poll() is not None:
            sys.exit(f"the round has ended before its {victim} was killed")
        print(f"faults   {victim} is killed, {len(committed(folder))} episodes are there", flush=True)

    try:
        with subprocess.Popen(command) as worker:
            at(0.2, "driver")
            worker.kill()
        with subprocess.Popen(command) as worker:  # it goes on by itself when the others are started again
            at(0.4, "dockerd")
            daemon.kill()
            daemon.start()
            at(0.6, "teacher")
            teacher.kill()
            teacher.wait(timeout=WAIT_S)
            time.sleep(TEACHER_AWAY_S)
            teacher = subprocess.Popen([*program, "--teacher", str(port)])
            worker.wait(timeout=WAIT_S)
        subprocess.run(command, check=True, timeout=WAIT_S)
    finally:
        teacher.kill()
        teacher.wait(timeout=WAIT_S)
    with DockerHost(RUN, daemon.url) as host:
        host.reap()
        leaked = len(host.containers())
    store = DataStore.open(folder / "data.zarr")
    store.seal(0)
    kept = [trajectory.task_id for trajectory in store.episodes(0)]
    wanted = {f"episode-{number}" for number in range(episodes)}
    found = {
        "fault_episodes": episodes,
        "leaked_containers": leaked,
        "leaked_processes": len(sleepers()) + sum(len(processes_below(shim)) - 1 for shim in daemon.shims()),
        "leaked_shims": len(daemon.shims()),  # containerd's own: empty ones are left by its kill
        "leaked_mounts": len(mounts_below(daemon.home)) - mounts,
        "lost_episodes": len(wanted - set(kept)),
        "duplicate_episodes": len(kept) - len(set(kept)),
        "teacher_replies": len(ResponseCache(folder / "teacher")),
        "teacher_replies_needed": episodes * len(REPLIES),
    }
    print(f"faults   {found}", flush=True)
    return found


async def collect(folder: Path, url: str, commit: str, teacher: str, episodes: int, at_once: int) -> None:
    """The worker: run those episodes of round 0 that are not committed yet."""
    store = DataStore.create_or_open(folder / "data.zarr")
    renderer = ChatRenderer.load(folder)
    task = swebench_task(swe_image.row(commit))
    endpoint = TeacherConfig(urls=(teacher,), model="replay", sampling=SamplingConfig(max_tokens=200))
    replies = ResponseCache(folder / "teacher")
    policy = EndpointPolicy(endpoint, replies, read=one_tool_call, encode=renderer.action)
    actor = SoloTurnPolicy(policy=policy)
    limits = LimitsConfig(max_turns=10, max_tokens=20_000)
    places = asyncio.Semaphore(at_once)
    done = {name for name, _ in store.committed(0)}
    with DockerHost(RUN, url) as host, ThreadPoolExecutor(at_once) as threads:
        host.reap()
        runner = EpisodeRunner(renderer=renderer, limits=limits, max_action_tokens=200, threads=threads)

        async def one(name: str) -> None:
            key = EpisodeKey(run_seed=1, round_index=0, task_id=name)
            async with places:
                for _ in range(TRIES):
                    trajectory = await runner.run(
                        lambda: SweEnv(task, functools.partial(open_sandbox, host)), actor, key
                    )
                    if trajectory.stop_reason.is_clean:
                        store.append([trajectory])
                        return
            raise RuntimeError(f"{name} broke: {trajectory.details}")

        names = [f"episode-{number}" for number in range(episodes)]
        await asyncio.gather(*[one(name) for name in names if name not in done])
    replies.close()


def next_reply(request: dict[str, Any]) -> str:
    """What the teacher's server answers."""
    return REPLIES[sum(message["role"] == "assistant" for message in request["messages"])]


def open_sandbox(host: DockerHost, task: SweTask) -> DockerSandbox:
    return DockerSandbox(host, task.image, LIMITS, root=task.workdir)


def committed(folder: Path) -> set[Any]:
    path = folder / "data.zarr"
    return set(DataStore.open(path).committed(0)) if (path / "zarr.json").exists() else set()


def sleepers() -> list[str]:
    """The host's processes that are left of any command of this program."""
    return subprocess.run(["pgrep", "-f", SLEEPER], capture_output=True, text=True, check=False).stdout.split()


def available_mib() -> float:
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) / 1024


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"nothing happened in {WAIT_S:.0f} s")
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
