"""Runs that jobs of the virtual SLURM work on, and what tests do to them."""

import contextlib
import os
import signal
from pathlib import Path

from megatron_dagger.observability.metrics import read_lines
from tests.integration.tiny_run import ARGUMENTS, DEADLINE_S, writers

ROOT = Path(__file__).resolve().parents[2]


def words(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return [""]


def parent(pid):
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None


class Run:
    """A run that one job after the other works on, by the same sbatch file with the same arguments."""

    def __init__(self, cluster, folder, environment, file, *settings):
        self.cluster, self.folder, self.environment = cluster, folder, environment
        self.path = folder / "run"
        self.arguments = (str(file), str(self.path), *ARGUMENTS, *settings)
        self.job = self.log = None

    def submit(self, *options):
        self.log = self.folder / f"log-{len(list(self.folder.glob('log-*')))}"
        options = (*options, f"--chdir={ROOT}", f"--output={self.log}")
        self.job = self.cluster.submit(*options, *self.arguments, env=self.environment)

    def wait(self, condition, what):
        def reached():
            state = self.cluster.state(self.job)
            assert state in ("PENDING", "RUNNING", "COMPLETING"), f"waiting for {what}: {state}\n{self.log.read_text()}"
            return condition()

        self.cluster.wait(reached, DEADLINE_S, what, lambda: self.cluster.log(self.job))

    def wait_for_file(self, name):
        self.wait((self.path / name).exists, name)

    def wait_for_words(self, words):
        self.wait(lambda: self.log.exists() and words in self.log.read_text(), words)

    def wait_for_steps(self, count):
        self.wait(lambda: self.steps() >= count, f"step {count}")

    def wait_for_restart(self, count):
        def restarted():
            job = self.cluster.job(self.job)
            return job["Restarts"] == str(count) and job["JobState"] == "RUNNING"

        self.wait(restarted, f"restart {count}")

    def wait_for_end(self, state):
        """The job ends so, and leaves no process."""
        self.cluster.wait_for(self.job, state, deadline_s=DEADLINE_S)
        assert_nothing_is_left(self.cluster)

    def cancel(self):
        self.cluster.call("scancel", self.job)
        self.wait_for_end("CANCELLED")

    def steps(self, round_index=0):
        """How many of a round's training are done."""
        return len(read_lines(self.path / f"rounds/{round_index:04d}/train/metrics.jsonl"))

    def rank(self, number, logs="train-0000"):
        """The process of a rank of round 0's training, or of one with other ``logs``; not what it forks."""
        found = writers(self.path / f"logs/{logs}/rank-{number}.log")
        return next(pid for pid in found if parent(pid) not in found)

    def drivers(self):
        """The job's processes of our command line; not what they fork and start."""
        return [pid for pid in self.cluster.job_processes(self.job) if "megatron_dagger.cli.main" in words(pid)]

    def preempt(self, held=None):
        """A job of a higher partition wants all of both nodes, for a moment, while ``held`` (a rank) is in a step."""
        held = held or self.rank(0)
        os.kill(held, signal.SIGSTOP)  # or a quick machine may have done it all before it is asked
        urgent = "--partition=high", "--nodes=2", "--exclusive", "--mem=0", "--output=/dev/null", "--wrap=true"
        job = self.cluster.submit(*urgent)
        self.wait_for_words("SIGUSR1: stopping; the same command goes on from here")
        os.kill(held, signal.SIGCONT)
        self.cluster.wait_for(job, "COMPLETED", deadline_s=60)


def assert_nothing_is_left(cluster):
    cluster.wait(lambda: not cluster.job_processes(), 20, "the jobs' processes to be gone")
