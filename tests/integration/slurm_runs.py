"""Runs as jobs of the virtual SLURM: submit them, wait for an event, and disturb them."""

import contextlib
import os
import signal
from pathlib import Path

from megatron_dagger.observability.metrics import read_lines
from tests.integration.tiny_run import ARGUMENTS, DEADLINE_S, writers
from tools.virtual_slurm.cluster import ENDED

ROOT = Path(__file__).resolve().parents[2]


def command_line(pid):
    """Return a process's arguments; [""] if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return [""]


def parent(pid):
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None


class Run:
    """A run, and the jobs that continue it one after another: the same sbatch file with the same arguments."""

    def __init__(self, cluster, folder, environment, file, *settings):
        self.cluster, self.folder, self.environment = cluster, folder, environment
        self.path = folder / "run"
        self.arguments = (str(file), str(self.path), *ARGUMENTS, *settings)
        self.job = self.log = None

    def submit(self, *options):
        self.log = self.folder / f"log-{len(list(self.folder.glob('log-*')))}"
        options = (*options, f"--chdir={ROOT}", f"--output={self.log}")
        self.job = self.cluster.submit(*options, *self.arguments, env=self.environment)

    def wait(self, condition, event):
        """Wait until ``condition()`` is true; fail if the job ends before, or after the deadline."""

        def reached():
            state = self.cluster.state(self.job)
            assert state not in ENDED, f"waiting for {event}: {state}\n{self.log.read_text()}"
            return condition()

        self.cluster.wait(reached, DEADLINE_S, event, lambda: self.cluster.log(self.job))

    def wait_for_file(self, name):
        self.wait((self.path / name).exists, name)

    def wait_for_log(self, text):
        self.wait(lambda: self.log.exists() and text in self.log.read_text(), text)

    def wait_for_steps(self, count):
        self.wait(lambda: self.steps() >= count, f"step {count}")

    def wait_for_restart(self, count):
        def restarted():
            job = self.cluster.job(self.job)
            return job["Restarts"] == str(count) and job["JobState"] == "RUNNING"

        self.wait(restarted, f"restart {count}")

    def wait_for_end(self, state):
        """Wait until the job ends in ``state``, and check that none of its processes remains."""
        self.cluster.wait_for(self.job, state, deadline_s=DEADLINE_S)
        assert_no_processes(self.cluster)

    def cancel(self):
        self.cluster.call("scancel", self.job)
        self.wait_for_end("CANCELLED")

    def steps(self, round_index=0):
        """Return how many optimizer steps of a round are done."""
        return len(read_lines(self.path / f"rounds/{round_index:04d}/train/metrics.jsonl"))

    def rank(self, number, logs="train-0000"):
        """Return a training rank's process id, without its forks; ``logs`` is the folder of its log."""
        pids = writers(self.path / f"logs/{logs}/rank-{number}.log")
        return next(pid for pid in pids if parent(pid) not in pids)

    def drivers(self):
        """Return the job's processes that run our command line, without their children."""
        return [pid for pid in self.cluster.job_processes(self.job) if "megatron_dagger.cli.main" in command_line(pid)]

    def preempt(self, stopped_pid=None):
        """Let a short job of the higher partition preempt this one, in the middle of its work.

        The process ``stopped_pid`` (None: rank 0) is stopped until the preemption has begun; otherwise a fast machine
        might finish first.
        """
        stopped_pid = stopped_pid or self.rank(0)
        os.kill(stopped_pid, signal.SIGSTOP)
        urgent = "--partition=high", "--nodes=2", "--exclusive", "--mem=0", "--output=/dev/null", "--wrap=true"
        job = self.cluster.submit(*urgent)
        self.wait_for_log("SIGUSR1: stopping; repeat the command to resume")
        os.kill(stopped_pid, signal.SIGCONT)
        self.cluster.wait_for(job, "COMPLETED", deadline_s=60)


def assert_no_processes(cluster):
    cluster.wait(lambda: not cluster.job_processes(), 20, "the jobs' processes to end")
