"""Who may write to a run: one incarnation of it at a time, checked at every durable write.

A run is worked on by the holder of ``RUN/.lock``, a lock that dies with its holder. On a cluster that is
not enough: when a node is lost, SLURM starts its job anew on another, while the processes there may live
on, hold the lock, and write. So the job's next incarnation (the same SLURM_JOB_ID, a higher
SLURM_RESTART_COUNT) takes the run over: it puts a new lock file in place of the old, and a new token into
``RUN/.fence``.

Invariant: whoever puts work in place (``store.atomic``, metrics) holds ``.fence`` shared while it
compares the token with its own and does so; a claim holds it alone while it changes the token. So no
write of an earlier incarnation happens after a claim, however long that process was stopped: it raises
FencedError and ends.

Workers that share a run hold ``.lock`` together, and each its own ``.lock-NAME`` and ``.fence-NAME``: the
workers of a rollout, and the trainer beside resident ones.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dagger.store.errors import StoreError
from megatron_dagger.store.lock import LockedError, flocked, name_holder, this_process

CLAIM_TIMEOUT_S = 5.0  # another process that works on the same run is an error, not a wait
VARIABLE = "MEGATRON_DAGGER_INCARNATION"  # how the ranks of a training come to know their driver's tokens

_FENCE_DEADLINE_S = 60.0  # a fence is held for as long as a rename takes
_POLL_S = 0.05


class FencedError(StoreError):
    """A later incarnation of the run has taken over: this process must not write any more."""


@dataclass(frozen=True)
class _Claim:
    """That the file ``fence`` must hold ``token`` whenever something in ``run_dir`` is put in place."""

    run_dir: Path
    fence: Path
    token: str


_claims: list[_Claim] = []  # of this process


@contextmanager
def claim(
    run_dir: Path, *, worker: str | None = None, take_over: bool = False, deadline_s: float = CLAIM_TIMEOUT_S
) -> Iterator[str]:
    """Work on a run alone, or as the ``worker`` of that name beside others; yields what ``inherit`` wants in VARIABLE.

    A process that works on it already is an error after ``deadline_s`` (LockedError), unless it is an
    earlier incarnation of this SLURM job, or ``take_over`` is set: then it may write no more.
    """
    with ExitStack() as stack:
        made = [_enter(stack, run_dir, "", shared=worker is not None, take_over=take_over, deadline_s=deadline_s)]
        if worker is not None:
            made.append(_enter(stack, run_dir, f"-{worker}", shared=False, take_over=take_over, deadline_s=deadline_s))
        yield json.dumps({held.fence.name: held.token for held in made})


def inherit(run_dir: Path, environment: Mapping[str, str]) -> None:
    """Be held, for the rest of this process, to the claim of the driver that started it, if there is one."""
    if VARIABLE in environment:
        tokens: dict[str, str] = json.loads(environment[VARIABLE])
        _claims.extend(_Claim(run_dir.absolute(), run_dir / name, token) for name, token in tokens.items())


def this_job() -> dict[str, Any]:
    """Which incarnation of which SLURM job this is, and on which of its nodes; nothing outside of one."""
    if "SLURM_JOB_ID" not in os.environ:
        return {}
    return {
        "job": os.environ["SLURM_JOB_ID"],
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "node": os.environ.get("SLURMD_NODENAME"),
    }


@contextmanager
def permitted(path: str | os.PathLike[str]) -> Iterator[None]:
    """Put ``path`` in place in this block; FencedError if it lies in a run that another incarnation took over."""
    absolute = Path(path).absolute()
    with ExitStack() as stack:
        for held in [held for held in _claims if absolute.is_relative_to(held.run_dir)]:
            descriptor = stack.enter_context(flocked(held.fence, shared=True, deadline_s=_FENCE_DEADLINE_S))
            record = _read(descriptor)
            if record.get("token") != held.token:
                raise FencedError(
                    f"{held.run_dir}: {record.get('holder', 'another process')} has taken this run over; "
                    f"{path} was not written, and this process must end"
                )
        yield


def _enter(stack: ExitStack, run_dir: Path, suffix: str, *, shared: bool, take_over: bool, deadline_s: float) -> _Claim:
    """Take a lock file and its fence for the life of ``stack``, and register the claim."""
    lock, fence = run_dir / f".lock{suffix}", run_dir / f".fence{suffix}"
    end = time.monotonic() + deadline_s
    while True:
        with flocked(fence, deadline_s=_FENCE_DEADLINE_S) as descriptor:
            record = _read(descriptor)
            takes = _is_my_predecessor(record) or (take_over and not shared)
            if takes:
                lock.unlink(missing_ok=True)  # whoever holds that file holds nothing now
            try:
                held = stack.enter_context(flocked(lock, shared=shared, deadline_s=0.0))
            except LockedError as error:
                if time.monotonic() > end:
                    raise LockedError(
                        f"{error}, after {deadline_s:g} s. It works on this run: end it first; if it cannot be "
                        "reached any more, --take-over shuts it out"
                    ) from None
            else:
                name_holder(held)
                joins = shared and not takes and "token" in record
                token = record["token"] if joins else uuid.uuid4().hex
                if not joins:  # jobs that share a run are not each other's predecessors
                    job = this_job() if takes or not shared else {}
                    _write(descriptor, {"token": token, "holder": this_process(), **job})
                break
        time.sleep(_POLL_S)
    made = _Claim(run_dir.absolute(), fence.absolute(), token)
    _claims.append(made)
    stack.callback(_claims.remove, made)
    return made


def _is_my_predecessor(record: dict[str, Any]) -> bool:
    mine = this_job()
    return bool(mine) and record.get("job") == mine["job"] and record["restart"] < mine["restart"]


def _read(descriptor: int) -> dict[str, Any]:
    """What the fence says; nothing (and so no one's token) where a kill cut it short."""
    try:
        record = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _write(descriptor: int, record: dict[str, Any]) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(record).encode(), 0)
    os.fsync(descriptor)
