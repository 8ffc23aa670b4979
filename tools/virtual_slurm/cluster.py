"""A real SLURM with two virtual nodes on this host, for tests and benchmarks.

    with SlurmCluster() as cluster:
        job = cluster.submit("--wrap=hostname")
        cluster.wait_for(job, "COMPLETED", deadline_s=30)

A cluster has its own munge, controller and node daemons, and with accounting its own database. Its files are in one
temporary directory, and it listens on free ports. All its processes, jobs and their children included, end with it. If
this process is killed, a second one ends them.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tools.virtual_slurm import accounting as slurm_accounting
from tools.virtual_slurm.packages import SlurmError, why_unavailable
from tools.virtual_slurm.processes import (
    END_DEADLINE_S,
    cluster_processes,
    end_processes,
    environment_variable,
    program_name,
)
from tools.virtual_slurm.settings import NODES, conf_path, write_settings

ROOT = Path(__file__).resolve().parents[2]
DAEMONS = ("slurmd", "slurmctld", "munged", "slurmstepd", "slurmdbd", "mariadbd")
START_DEADLINE_S = 60.0
COMMAND_DEADLINE_S = 60.0
POLL_S = 0.2
FAILED = ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
ENDED = (*FAILED, "COMPLETED")  # a job in any other state (there are many) goes on


class SlurmCluster:
    """Nodes n1 and n2, each with all of this machine's processors and 4 made-up GPUs.

    A step sees the processors that it was given. Jobs of the partition ``high`` preempt those of ``main``.
    ``accounting`` adds a slurmdbd, which ``sacct`` needs. Entering the block starts the cluster and waits until both
    nodes are idle; it raises SlurmError if that fails. Leaving the block ends all its processes.
    """

    def __init__(self, *, accounting: bool = False) -> None:
        self._accounting = accounting
        self._user = pwd.getpwuid(os.getuid()).pw_name
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a short path, since it holds munge's socket
        self.conf = conf_path(self.folder)
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._reaper: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> SlurmCluster:
        try:
            if reason := why_unavailable(accounting=self._accounting):
                raise SlurmError(reason)
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def environment(self) -> dict[str, str]:
        """The environment for commands of this cluster, without the variables of a job that this process may be in."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        return {**inherited, "SLURM_CONF": str(self.conf)}

    def call(self, *command: str, env: Mapping[str, str] | None = None) -> str:
        """Run one of SLURM's commands and return its output. Raises SlurmError if it fails."""
        done = subprocess.run(
            command, env={**self.environment, **(env or {})}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=COMMAND_DEADLINE_S, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SlurmError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def submit(self, *arguments: str, env: Mapping[str, str] | None = None) -> str:
        """Submit a job with ``sbatch`` and return its id."""
        return self.call("sbatch", "--parsable", *arguments, env=env).strip()

    def job(self, job_id: str) -> dict[str, str]:
        """Return the fields that ``scontrol show job`` prints, by name."""
        fields = self.call("scontrol", "show", "job", "-o", job_id).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def state(self, job_id: str) -> str:
        return self.job(job_id)["JobState"]

    def wait_for(self, job_id: str, *states: str, deadline_s: float) -> str:
        """Wait until the job is in one of ``states`` and return it.

        Raises SlurmError with the job's log if the job ends in another state, or after ``deadline_s``.
        """

        def reached() -> bool:
            state = self.state(job_id)
            if state not in states and state in ENDED:
                raise SlurmError(f"job {job_id} is {state}:\n{self.log(job_id)}")
            return state in states

        self.wait(reached, deadline_s, f"job {job_id} to be {' or '.join(states)}", lambda: self.log(job_id))
        return self.state(job_id)

    def log(self, job_id: str) -> str:
        """Return the end of the job's output."""
        path = Path(self.job(job_id).get("StdOut", ""))
        return path.read_text(errors="replace")[-4000:] if path.is_file() else "(no output)"

    def nodes(self) -> dict[str, str]:
        """Return each node's state in ``sinfo``'s short form."""
        lines = self.call("sinfo", "-h", "-N", "-p", "main", "-o", "%N %t").splitlines()
        return dict(line.split() for line in lines)

    def kill_node(self, node: str) -> None:
        """Kill a node's daemon with SIGKILL and mark the node as down, as a health check would.

        The controller alone would notice only after half a minute. The node's jobs are requeued on the other node,
        while their processes here stay alive.
        """
        self.kill_daemon(node)
        self.call("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")

    def kill_daemon(self, node: str) -> None:
        """Kill a node's daemon with SIGKILL, without telling the controller."""
        child = self._children.pop(node)
        child.kill()
        child.wait()

    def start_node(self, node: str) -> None:
        """Start a node's daemon again and wait until the node takes jobs. The daemon ends processes of old jobs."""
        self._spawn(node, ["slurmd", "-D", "-N", node])
        with contextlib.suppress(SlurmError):  # the node may not be down
            self.call("scontrol", "update", f"NodeName={node}", "State=RESUME")
        self.wait(lambda: self.nodes().get(node) in ("idle", "mix", "alloc"), START_DEADLINE_S, f"{node} to be up")

    def restore(self) -> None:
        """Cancel all jobs and start the daemons that were killed."""
        self.call("scancel", f"--user={self._user}")
        for node in NODES:
            if node not in self._children:
                self.start_node(node)

    def processes(self) -> list[int]:
        """Return all processes of the cluster: daemons, jobs and their children."""
        return cluster_processes(self.folder)

    def job_processes(self, job_id: str | None = None) -> list[int]:
        """Return the processes that jobs (None: all, else this one) started, on either node."""
        pids = [pid for pid in self.processes() if program_name(pid) not in DAEMONS]
        jobs = {pid: environment_variable(pid, "SLURM_JOB_ID") for pid in pids}
        return [pid for pid, job in jobs.items() if job and job_id in (None, job)]

    def close(self) -> None:
        """End every process of the cluster and remove its directory."""
        end_processes(self.processes)
        for child in self._children.values():
            child.wait(END_DEADLINE_S)
        if self._reaper is not None and self._reaper.stdin is not None:
            self._reaper.stdin.close()
            self._reaper.wait(END_DEADLINE_S)
        shutil.rmtree(self.folder, ignore_errors=True)

    def wait(
        self, condition: Callable[[], bool], deadline_s: float, event: str, explain: Callable[[], str] = lambda: ""
    ) -> None:
        """Poll until ``condition()`` is true. Raises SlurmError, which names ``event``, after ``deadline_s``."""
        end = time.monotonic() + deadline_s
        while not condition():
            if time.monotonic() > end:
                raise SlurmError(f"waited {deadline_s:g} s for {event}\n{explain()}")
            time.sleep(POLL_S)

    def _start(self) -> None:
        self._reaper = subprocess.Popen(
            [sys.executable, "-m", "tools.virtual_slurm.processes", "reap", str(self.folder)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        for name in ("munge", "log", "state", "spool/n1", "spool/n2", "dev"):
            (self.folder / name).mkdir(parents=True, mode=0o755)
        (self.folder / "munge" / "key").write_bytes(os.urandom(128))
        (self.folder / "munge" / "key").chmod(0o600)
        write_settings(self.folder, self._user, with_accounting=self._accounting)
        munge = {"socket": "socket", "key-file": "key", "seed-file": "seed", "pid-file": "pid", "log-file": "log"}
        options = [f"--{name}={self.folder}/munge/{file}" for name, file in munge.items()]
        self._spawn("munged", ["munged", "--foreground", "--force", *options])
        self.wait((self.folder / "munge/socket").exists, START_DEADLINE_S, "munged", lambda: self._tail("munged"))
        if self._accounting:
            self._start_accounting()
        self._spawn("slurmctld", ["slurmctld", "-D", "-i"])
        for node in NODES:
            self._spawn(node, ["slurmd", "-D", "-N", node])
        end = time.monotonic() + START_DEADLINE_S
        while not self._all_idle():
            dead = [name for name, child in self._children.items() if child.poll() is not None]
            if dead or time.monotonic() > end:
                reason = f"{dead[0]} ended" if dead else f"its nodes are not idle after {START_DEADLINE_S:g} s"
                raise SlurmError(f"SLURM did not start: {reason}\n{self._tail(dead[0] if dead else 'slurmctld')}")
            time.sleep(0.1)

    def _start_accounting(self) -> None:
        self._spawn("mariadbd", slurm_accounting.database_command(self.folder, self._user))
        ready = slurm_accounting.socket_path(self.folder).exists
        self.wait(ready, START_DEADLINE_S, "mariadbd", lambda: self._tail("mariadbd"))
        self._spawn("slurmdbd", ["slurmdbd", "-D"], slurm_accounting.database_variables(self.folder))
        self.wait(self._accounting_answers, START_DEADLINE_S, "slurmdbd", lambda: self._tail("slurmdbd"))

    def _accounting_answers(self) -> bool:
        try:
            return "cluster" in self.call("sacctmgr", "-i", "add", "cluster", "virtual").lower()
        except SlurmError:
            return False  # slurmdbd does not answer yet

    def _spawn(self, name: str, command: list[str], variables: Mapping[str, str] | None = None) -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            self._children[name] = subprocess.Popen(
                command, env={**self.environment, **(variables or {})}, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def _all_idle(self) -> bool:
        try:
            return self.nodes() == dict.fromkeys(NODES, "idle")
        except SlurmError:
            return False  # the controller does not answer yet

    def _tail(self, name: str) -> str:
        return (self.folder / "log" / f"{name}.out").read_text(errors="replace")[-2000:]
