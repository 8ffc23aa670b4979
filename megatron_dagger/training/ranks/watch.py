"""Waits for the ranks of a host, names the rank that failed, and asks ranks to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_dagger.signals import STOPPED
from megatron_dagger.training.ranks.forkserver import ForkedRank, RankServerError

_POLL_S = 0.05
_OTHERS_MAY_FAIL_S = 1.0  # the rank that failed first may be noticed after its victims
_STOP_DEADLINE_S = 600.0  # for a step and a checkpoint; a cluster that asked us to stop waits less
_TAIL_LINES = 25
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket Timeout")


class LaunchError(RuntimeError):
    """A rank failed or the deadline passed; names the rank and ends with the tail of its log."""


class StartedRank(subprocess.Popen[bytes]):
    """A rank started as a process of its own; has the methods of ForkedRank."""

    def end(self) -> None:
        """Kill the rank and whatever it started (its process group), and wait for it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()


@dataclass(frozen=True, kw_only=True)
class Rank:
    """A running rank of this host."""

    number: int
    process: StartedRank | ForkedRank
    log: Path


def wait_for_ranks(ranks: Sequence[Rank], deadline_s: float) -> None:
    """Return when all ranks have exited with 0.

    Raises LaunchError if a rank fails or after ``deadline_s``, SystemExit(STOPPED) if a rank stopped by a signal.
    """
    deadline = time.monotonic() + deadline_s
    while True:
        codes = [rank.process.poll() for rank in ranks]
        if all(code == 0 for code in codes):
            return
        if STOPPED in codes:
            raise SystemExit(STOPPED)
        if any(code not in (None, 0) for code in codes):
            time.sleep(_OTHERS_MAY_FAIL_S)
            raise LaunchError(_describe(*_culprit(ranks)))
        if time.monotonic() > deadline:
            late = next(rank for rank in ranks if rank.process.poll() is None)
            raise LaunchError(f"not finished after {deadline_s:.0f} s; rank {late.number}: {_tail(late)}")
        time.sleep(_POLL_S)


def stop_ranks(ranks: Sequence[Rank]) -> None:
    """Ask the ranks to stop, and wait until all have; do not wait if one has failed or has not begun."""
    deadline = time.monotonic() + _STOP_DEADLINE_S
    with contextlib.suppress(RankServerError):
        for rank in ranks:
            if rank.process.poll() is None and rank.process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank.process.pid, signal.SIGTERM)
        while time.monotonic() < deadline and all(rank.process.pid is not None for rank in ranks):
            codes = [rank.process.poll() for rank in ranks]
            if None not in codes or any(code not in (None, 0, STOPPED) for code in codes):
                return
            time.sleep(_POLL_S)


def _culprit(ranks: Sequence[Rank]) -> tuple[Rank, int]:
    """Return the failed rank that most likely failed first, with its exit code.

    That is a rank that was killed, else one whose log does not blame a lost peer.
    """

    def key(failed: tuple[Rank, int]) -> tuple[bool, bool]:
        rank, code = failed
        victim = any(sign in _read_tail(rank.log) for sign in _LOST_PEER)
        return (victim and code >= 0, code >= 0)

    return min(((rank, code) for rank in ranks if (code := rank.process.poll())), key=key)


def _describe(rank: Rank, code: int) -> str:
    how = f"exit code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
    if code == -signal.SIGKILL:
        how += " (out of memory?)"
    return f"rank {rank.number} failed: {how}; {_tail(rank)}"


def _tail(rank: Rank) -> str:
    text = _read_tail(rank.log)
    return f"the end of {rank.log}:\n{text}" if text else f"{rank.log} is empty"


def _read_tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-_TAIL_LINES:])
