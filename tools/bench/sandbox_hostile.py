"""Hostile commands and patches for tools.bench.sandbox, and the sandbox that must contain them."""

from __future__ import annotations

import functools
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_dagger.envs.swe.judge import judge
from megatron_dagger.envs.swe.task import SweTask
from megatron_dagger.sandbox.base import CommandResult, EnvironmentBroken
from megatron_dagger.sandbox.docker.daemon import DockerHost
from megatron_dagger.sandbox.docker.sandbox import DockerLimits, DockerSandbox
from megatron_dagger.types import StopReason
from tools.support import swe_image
from tools.support.docker_engine import IMAGE

RUN = "bench-sandbox"
SLEEP_S = 0.25
SLEEPER = "sleep 0.2500031"  # SLEEP_S, and recognisable among the host's processes
LIMITS = DockerLimits(timeout_s=20, memory_mib=256, disk_mib=64, processes=64, cpus=1.0, output_bytes=4000)

Check = Callable[[CommandResult], bool]

# A command, and the check of its result, or the stop reason with which it must end the episode.
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
# Patches that must not resolve the task.
CHEATS = {
    "the judge's script, in the patch": swe_image.PATCH + swe_image.WRITE.format("../eval.sh"),
    "the judge's script, through a link": swe_image.PATCH
    + swe_image.LINK
    + swe_image.WRITE.format("calc/away/eval.sh"),
    "its own tests": swe_image.TESTS_CHANGED,
}


def hostile(host: DockerHost, task: SweTask, folder: Path) -> dict[str, Any]:
    """Run each patch and command in a fresh container; return how many there were and how many were contained.

    After a command the container must either take another command or be reported as broken, with the right reason.
    """
    contained = []
    for name, patch in CHEATS.items():
        verdict = judge(functools.partial(open_sandbox, host), task, patch)
        contained.append(not verdict.resolved)
        print(f"hostile  {'NOT CONTAINED' if verdict.resolved else 'contained'}  {name}: {verdict.reason}", flush=True)
    secret = folder / "secret"
    secret.write_text("of the host")
    host_file: dict[str, tuple[str, Check | StopReason]] = {
        "host files": (f"cat {secret}", lambda result: result.exit_code != 0)
    }
    for name, (command, expected) in (HOSTILE | host_file).items():
        began = time.perf_counter()
        with DockerSandbox(host, IMAGE, LIMITS) as sandbox:
            try:
                result = sandbox.run(command, timeout_s=3)
                ok = not isinstance(expected, StopReason) and expected(result)
                ok = ok and sandbox.run("echo alive").output == "alive\n"
                outcome = f"exit code {result.exit_code}{', timed out' if result.timed_out else ''}"
            except EnvironmentBroken as error:
                ok, outcome = error.reason is expected, f"{error.reason}: {error}"
        contained.append(ok)
        seconds = time.perf_counter() - began
        print(f"hostile  {'contained' if ok else 'NOT CONTAINED'}  {name}: {outcome} ({seconds:.1f} s)", flush=True)
    return {"hostile_cases": len(contained), "hostile_contained": sum(contained)}


def open_sandbox(host: DockerHost, task: SweTask) -> DockerSandbox:
    return DockerSandbox(host, task.image, LIMITS, root=task.workdir)


def sleepers() -> list[str]:
    """Return the ids of the host's processes that a command of this benchmark has left behind."""
    return subprocess.run(["pgrep", "-f", SLEEPER], capture_output=True, text=True, check=False).stdout.split()
