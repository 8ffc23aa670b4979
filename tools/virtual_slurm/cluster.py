"""A real SLURM of two virtual nodes on this host, for tests and benchmarks: its own munge, controller and node daemons.

    with SlurmCluster() as cluster:
        job = cluster.submit("--wrap=hostname")
        cluster.wait_for(job, "COMPLETED", deadline_s=30)

    tools/virtual_slurm/cluster.py install    as root on Debian: install what it needs
    tools/virtual_slurm/cluster.py up         start one, print how to talk to it, stop it at Ctrl-C

Everything lies in one temporary directory and listens on free ports. Whatever belongs to the cluster, its
jobs and their children included, is found and ended (slurm_processes.py), by a second process if this one is
killed.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.support.ports import free_ports
from tools.virtual_slurm import accounting as slurm_accounting
from tools.virtual_slurm import processes as slurm_processes
from tools.virtual_slurm.packages import SlurmError, install, lacking
from tools.virtual_slurm.processes import END_DEADLINE_S

DAEMONS = ("slurmd", "slurmctld", "munged", "slurmstepd", "slurmdbd", "mariadbd")
NODES = ("n1", "n2")
START_DEADLINE_S = 60.0
COMMAND_DEADLINE_S = 60.0
POLL_S = 0.2
FAILED = ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")

_CONF = """\
ClusterName=virtual
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
{accounting}\
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
DependencyParameters=kill_invalid_depend
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
SlurmdTimeout=5
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=16000 Gres=gpu:4 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=16000 Gres=gpu:4 State=UNKNOWN
PartitionName=main Nodes=n[1-2] Default=YES PriorityTier=5 GraceTime=30
PartitionName=high Nodes=n[1-2] PriorityTier=10 PreemptMode=OFF
"""


def fitted(file: Path, folder: Path) -> Path:
    """A copy in ``folder`` of an sbatch file that asks for nodes of this cluster's size, one for each of its parts."""
    text = file.read_text()
    for asked, here in (("gpus-per-node=8", "gpus-per-node=4"), ("mem=0", "mem=8000"), ("nodes=2", "nodes=1")):
        text = text.replace(f"#SBATCH --{asked}", f"#SBATCH --{here}")
    copy = folder / file.name
    copy.write_text(text)
    return copy


class SlurmCluster:
    """Nodes n1 and n2 with 4 CPUs and 4 made-up GPUs each; partitions main, and high, which preempts main's jobs.

    With ``accounting`` there is a slurmdbd too, which ``sacct`` needs.
    """

    def __init__(self, *, accounting: bool = False) -> None:
        self._accounting = accounting
        self._user = pwd.getpwuid(os.getuid()).pw_name
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a short path: munge's socket lies in it
        self.conf = self.folder / "slurm.conf"
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._reaper: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> SlurmCluster:
        try:
            if missing := lacking(accounting=self._accounting):
                raise SlurmError(missing)
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def environment(self) -> dict[str, str]:
        """What a command that talks to this cluster needs, and no trace of a job that we may be in ourselves."""
        mine = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        return {**mine, "SLURM_CONF": str(self.conf)}

    def call(self, *command: str, env: Mapping[str, str] | None = None) -> str:
        """Run one of SLURM's commands; its output. SlurmError if it fails."""
        done = subprocess.run(
            command, env={**self.environment, **(env or {})}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=COMMAND_DEADLINE_S, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SlurmError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def submit(self, *arguments: str, env: Mapping[str, str] | None = None) -> str:
        """``sbatch`` a job; its id."""
        return self.call("sbatch", "--parsable", *arguments, env=env).strip()

    def job(self, job_id: str) -> dict[str, str]:
        """What ``scontrol show job`` says about it, by name."""
        words = self.call("scontrol", "show", "job", "-o", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, job_id: str) -> str:
        return self.job(job_id)["JobState"]

    def wait_for(self, job_id: str, *states: str, deadline_s: float) -> str:
        """Wait until the job is in one of ``states``; SlurmError, with its log, if it ends otherwise or is late."""

        def reached() -> bool:
            state = self.state(job_id)
            if state not in states and state in (*FAILED, "COMPLETED"):
                raise SlurmError(f"job {job_id} is {state}:\n{self.log(job_id)}")
            return state in states

        self.wait(reached, deadline_s, f"job {job_id} to be {' or '.join(states)}", lambda: self.log(job_id))
        return self.state(job_id)

    def log(self, job_id: str) -> str:
        """The end of what the job wrote."""
        path = Path(self.job(job_id).get("StdOut", ""))
        return path.read_text(errors="replace")[-4000:] if path.is_file() else "(no output)"

    def nodes(self) -> dict[str, str]:
        """Each node's state as ``sinfo`` says it."""
        lines = self.call("sinfo", "-h", "-N", "-p", "main", "-o", "%N %t").splitlines()
        return dict(line.split() for line in lines)

    def kill_node(self, node: str) -> None:
        """kill -9 of a node's daemon and the news of it to the controller, as a health check brings it.

        By itself the controller takes half a minute to notice. The node's jobs are requeued elsewhere; their
        processes stay and go on.
        """
        self.kill_daemon(node)
        self.call("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")

    def kill_daemon(self, node: str) -> None:
        """kill -9 of a node's daemon, of which the controller hears nothing."""
        child = self._children.pop(node)
        child.kill()
        child.wait()

    def start_node(self, node: str) -> None:
        """Start a node's daemon again, and wait until the node takes jobs; it ends what it finds of old ones."""
        self._spawn(node, ["slurmd", "-D", "-N", node])
        with contextlib.suppress(SlurmError):  # it may never have been down, or be up by itself
            self.call("scontrol", "update", f"NodeName={node}", "State=RESUME")
        self.wait(lambda: self.nodes().get(node) in ("idle", "mix", "alloc"), START_DEADLINE_S, f"{node} to be up")

    def restore(self) -> None:
        """Cancel all jobs, and start the nodes that have no daemon."""
        self.call("scancel", f"--user={self._user}")
        for node in NODES:
            if node not in self._children:
                self.start_node(node)

    def processes(self) -> list[int]:
        """All processes of the cluster: daemons, and what jobs started."""
        return slurm_processes.marked(self.folder)

    def job_processes(self, job_id: str | None = None) -> list[int]:
        """The processes that jobs (or one job) started, on whichever node."""
        found = [pid for pid in self.processes() if slurm_processes.program(pid) not in DAEMONS]
        jobs = {pid: slurm_processes.variable(pid, "SLURM_JOB_ID") for pid in found}
        return [pid for pid, job in jobs.items() if job and job_id in (None, job)]

    def close(self) -> None:
        """End every process of the cluster, and remove its directory."""
        slurm_processes.end(self.processes)
        for child in self._children.values():
            child.wait(END_DEADLINE_S)
        if self._reaper is not None and self._reaper.stdin is not None:
            self._reaper.stdin.close()
            self._reaper.wait(END_DEADLINE_S)
        shutil.rmtree(self.folder, ignore_errors=True)

    def wait(
        self, condition: Callable[[], bool], deadline_s: float, what: str, explain: Callable[[], str] = lambda: ""
    ) -> None:
        """Poll until ``condition``; SlurmError that names ``what`` was waited for."""
        end = time.monotonic() + deadline_s
        while not condition():
            if time.monotonic() > end:
                raise SlurmError(f"waited {deadline_s:g} s for {what}\n{explain()}")
            time.sleep(POLL_S)

    def _start(self) -> None:
        self._reaper = subprocess.Popen(
            [sys.executable, slurm_processes.__file__, "reap", str(self.folder)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        for name in ("munge", "log", "state", "spool/n1", "spool/n2", "dev"):
            (self.folder / name).mkdir(parents=True, mode=0o755)
        (self.folder / "munge" / "key").write_bytes(os.urandom(128))
        (self.folder / "munge" / "key").chmod(0o600)
        self._write_conf()
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
                what = f"{dead[0]} ended" if dead else f"it is not idle after {START_DEADLINE_S:g} s"
                raise SlurmError(f"SLURM did not start: {what}\n{self._tail(dead[0] if dead else 'slurmctld')}")
            time.sleep(0.1)

    def _start_accounting(self) -> None:
        self._spawn("mariadbd", slurm_accounting.database(self.folder, self._user))
        ready = slurm_accounting.socket_path(self.folder).exists
        self.wait(ready, START_DEADLINE_S, "mariadbd", lambda: self._tail("mariadbd"))
        self._spawn("slurmdbd", ["slurmdbd", "-D"], slurm_accounting.variables(self.folder))
        self.wait(self._has_accounts, START_DEADLINE_S, "slurmdbd", lambda: self._tail("slurmdbd"))

    def _has_accounts(self) -> bool:
        try:
            return "cluster" in self.call("sacctmgr", "-i", "add", "cluster", "virtual").lower()
        except SlurmError:
            return False  # slurmdbd does not answer yet

    def _write_conf(self) -> None:
        host = socket.gethostname().partition(".")[0]
        *ports, accounting_port = free_ports(4)
        accounting = "AccountingStorageType=accounting_storage/none\n"
        if self._accounting:
            accounting = slurm_accounting.write_conf(self.folder, accounting_port, self._user)
        values = {"host": host, "ports": ports, "user": self._user, "accounting": accounting}
        self.conf.write_text(_CONF.format(folder=self.folder, **values))
        for number in range(4):  # GPUs without device files drain the nodes
            os.mknod(self.folder / "dev" / f"gpu{number}", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        (self.folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={self.folder}/dev/gpu[0-3]\n")

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


def main() -> int:
    match sys.argv[1:]:
        case ["install"]:
            install()
        case ["up"]:
            install()
            with SlurmCluster() as cluster:
                print(f"export SLURM_CONF={cluster.conf}", flush=True)
                signal.sigwait({signal.SIGINT, signal.SIGTERM})
        case ["-h" | "--help"]:
            print(__doc__)
        case _:
            sys.exit(__doc__)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SlurmError as problem:
        sys.exit(f"error: {problem}")
