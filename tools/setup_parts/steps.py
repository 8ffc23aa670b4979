"""The steps of the set-up: they run with a heartbeat and a log, and a failure is explained. One set-up at a time."""

import contextlib
import errno
import fcntl
import os
import re
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
CACHE = ROOT / ".cache"
LOG = CACHE / "setup.log"
LOCK_TIMEOUT_S = 1800
STEP_TIMEOUT_S = 3600
HEARTBEAT_S = 10
# Patterns in the output of pip and uv, and hints. The first match counts.
CAUSES = (
    (
        r"No space left on device|os error 28\b|Disk quota exceeded",
        "the disk is full: free some space and run tools/setup again",
    ),
    (
        r"(?s)torch==\S+\+cpu.*(No matching distribution|no version of torch|unsatisfiable)"
        r"|(no version of torch|No matching distribution found for torch)",
        "no CPU build of torch was found: set MEGATRON_DAGGER_TORCH_INDEX to PyTorch's wheel index for CPU\n"
        "  builds (its address is on PyTorch's installation page) and run tools/setup again",
    ),
    (
        r"(?i)dns error|name resolution|name or service not known|connection (refused|reset|error)|"
        r"connect(ion)? timed? ?out|network is unreachable|failed to (fetch|download)|newconnectionerror|"
        r"max retries|read timed out|operation timed out|no matching distribution|"
        r"not found in the package registry",
        "the package index cannot be reached, or lacks a package: check the network and pip's settings\n"
        "  (pip config list), and run tools/setup again; downloads are kept",
    ),
)


class SetupError(Exception):
    """An error for the user: the problem, and what to do about it."""


def say(text):
    print(f"[setup] {text}", flush=True)


def run(step, command, env=None):
    """Run a step's command with its output in the log; print a line at its start, every 10 s, and at its end."""
    say(step)
    began = time.monotonic()
    command = list(map(str, command))
    with open(LOG, "ab") as log:
        log.write(f"\n$ {' '.join(command)}\n".encode())
        log.flush()
        start = log.tell()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, cwd=ROOT)
        try:
            code = _wait(process, step, start, began)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if code:
        raise SetupError(f"{step}: failed\n{_explain(_output(start))}")
    say(f"  done in {time.monotonic() - began:.1f} s")


def _wait(process, step, start, began):
    while True:
        try:
            return process.wait(timeout=HEARTBEAT_S)
        except subprocess.TimeoutExpired:
            seconds = time.monotonic() - began
            if seconds > STEP_TIMEOUT_S:
                raise SetupError(f"{step}: stopped after {STEP_TIMEOUT_S} s; see {LOG}") from None
            lines = [line.strip() for line in re.split(r"[\r\n]+", _output(start))]
            shown = [line for line in lines if line and not line.startswith("WARNING")]
            say(f"  {seconds:3.0f} s  {shown[-1][:90] if shown else ''}".rstrip())


def _output(start):
    with open(LOG, "rb") as log:
        log.seek(start)
        return log.read().decode(errors="replace")


def _explain(text):
    tail = "\n".join(f"    {line[:200]}" for line in text.strip().splitlines()[-8:])
    for pattern, hint in CAUSES:
        if re.search(pattern, text):
            return f"{tail}\n  {hint}"
    return f"{tail}\n  the whole output is in {LOG}; --recreate starts from scratch, --installer pip avoids uv"


@contextlib.contextmanager
def lock():
    """Hold the set-up's lock; wait while another process has it, since both would write to the same environment."""
    with open(CACHE / "setup.lock", "a+") as file:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        announced = False
        while not _try_lock(file):
            if not announced:
                file.seek(0)
                owner = file.read().strip() or "unknown"
                say(f"another tools/setup is running (process {owner}): waiting for it")
                announced = True
            if time.monotonic() > deadline:
                raise SetupError(f"the other tools/setup did not end in {LOCK_TIMEOUT_S} s; its log is {LOG}")
            time.sleep(0.5)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _try_lock(file):
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True
