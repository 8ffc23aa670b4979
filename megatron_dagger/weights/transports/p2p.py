"""Weights point to point between processes on any hosts: gloo on CPUs, NCCL on GPUs.

Source and target ranks form a process group of their own, sources first, through a store on source rank 0. It is
independent of the trainer's and the engine's groups, and lives for a single transfer: a failure cannot affect
the next.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_dagger.weights.errors import WeightSyncError
from megatron_dagger.weights.transports import TransferSpec
from megatron_dagger.weights.transports.buckets import BucketTransport, Segment

_BUFFERS = 2
_TAGS = 1 << 16
_LOOPBACK = ("127.0.0.1", "localhost")


class _Group:
    """The process group of a transfer (all source ranks, then all target ranks), and this rank's two buffers."""

    def __init__(self, spec: TransferSpec, rank: int, device: torch.device):
        address, deadline_s = spec.source.address, spec.source.deadline_s
        self.sources = spec.source.layout.world_size
        self.deadline = datetime.timedelta(seconds=deadline_s)
        host, _, port = address.rpartition(":")
        size = self.sources + spec.target.world_size
        try:
            store = dist.TCPStore(host, int(port), is_master=rank == 0, timeout=self.deadline, wait_for_workers=False)
            self._compare_plans(store, rank, spec.digest())
            scoped = dist.PrefixStore("transfer", store)
            self._group = self._join(scoped, rank, size, host, device)
        except (RuntimeError, ValueError) as error:
            raise WeightSyncError(
                f"no connection through the store at {address} within {deadline_s:.0f} s: {_short(error)}"
            ) from error
        self._store = store
        self.buffers = torch.empty(_BUFFERS, spec.bucket_spec.bucket_bytes, dtype=torch.uint8, device=device)
        self._sent: Counter[int] = Counter()
        self._received: Counter[int] = Counter()

    def _compare_plans(self, store: dist.TCPStore, rank: int, digest: str) -> None:
        """Raise WeightSyncError if this rank's plan is not source rank 0's: blocks would land in wrong places."""
        if rank == 0:
            store.set("plan", digest)
        elif store.get("plan").decode() != digest:
            raise WeightSyncError("source rank 0 carries out another plan: its model, layouts or dtypes differ")

    def _join(self, store: dist.Store, rank: int, size: int, host: str, device: torch.device) -> Any:
        if device.type == "cuda":
            with _variable("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0"):  # else a failed transfer ends the trainer's process
                return dist.ProcessGroupNCCL(store, rank, size, self.deadline)
        if host not in _LOOPBACK:
            return dist.ProcessGroupGloo(store, rank, size, self.deadline)
        options = dist.ProcessGroupGloo._Options()  # the host name, which is the default, may not resolve
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = self.deadline
        return dist.ProcessGroupGloo(store, rank, size, options)

    def send(self, data: torch.Tensor, rank: int) -> Any:
        return self._group.send([data], rank, self._tag(self._sent, rank))

    def receive(self, into: torch.Tensor, rank: int) -> Any:
        return self._group.recv([into], rank, self._tag(self._received, rank))

    @staticmethod
    def _tag(counters: Counter[int], rank: int) -> int:
        """Return the number of the next message between two ranks, which is the same on both sides."""
        counters[rank] += 1
        return counters[rank] % _TAGS

    def close(self) -> None:
        del self._group, self._store


class P2pSender:
    """A source rank's side (``buckets.Sender``); a context manager."""

    def __init__(self, spec: TransferSpec, source_rank: int, device: torch.device):
        self._rank = source_rank
        self._transfer = _Group(spec, source_rank, device)
        self._buffers = self._transfer.buffers
        self._works: deque[tuple[Segment, Any]] = deque()
        self._next = 0

    def buffer(self, segment: Segment) -> torch.Tensor:
        if len(self._works) == _BUFFERS:
            self._wait()
        return self._buffers[self._next, : segment.bytes]

    def send(self, segment: Segment) -> None:
        data = self._buffers[self._next, : segment.bytes]
        self._works.append((segment, self._transfer.send(data, self._transfer.sources + segment.target_rank)))
        self._next = (self._next + 1) % _BUFFERS

    def finish(self) -> None:
        while self._works:
            self._wait()

    def _wait(self) -> None:
        segment, work = self._works.popleft()
        try:
            work.wait(self._transfer.deadline)
        except RuntimeError as error:
            raise WeightSyncError(
                f"source rank {self._rank}: target rank {segment.target_rank} received nothing: {_short(error)}"
            ) from error

    def __enter__(self) -> P2pSender:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._works.clear()
        self._transfer.close()


class P2pReceiver:
    """A target rank's side (``buckets.Receiver``): two buffers, each of which holds the segments of a bucket."""

    def __init__(self, spec: TransferSpec, target_rank: int, device: torch.device):
        self._transfer = _Group(spec, spec.source.layout.world_size + target_rank, device)
        self._buffers = self._transfer.buffers
        self._bucket = 0
        self._expected: dict[int, deque[tuple[torch.Tensor, Any]]] = {}

    def expect(self, bucket: Sequence[Segment]) -> None:
        start = 0
        for segment in bucket:
            into = self._buffers[self._bucket, start : start + segment.bytes]
            work = self._transfer.receive(into, segment.source_rank)
            self._expected.setdefault(segment.source_rank, deque()).append((into, work))
            start += segment.bytes
        self._bucket = (self._bucket + 1) % _BUFFERS

    def receive(self, segment: Segment) -> torch.Tensor:
        into, work = self._expected[segment.source_rank].popleft()
        try:
            work.wait(self._transfer.deadline)
        except RuntimeError as error:
            raise WeightSyncError(f"source rank {segment.source_rank} sent nothing: {_short(error)}") from error
        return into

    def release(self, segment: Segment) -> None:
        """Do nothing: the buffer is reused for the bucket after the next, when all its segments are released."""

    def close(self) -> None:
        self._expected.clear()
        self._transfer.close()


def open_transport(spec: TransferSpec, target_rank: int, device: torch.device) -> BucketTransport:
    """Join the process group of the transfer as a target rank."""
    return BucketTransport(P2pReceiver(spec, target_rank, device), spec.bucket_spec)


def open_sender(spec: TransferSpec, source_rank: int, device: torch.device) -> P2pSender:
    """Join the process group of the transfer as a source rank."""
    return P2pSender(spec, source_rank, device)


def new_address(host: str, directory: Path) -> str:
    """Return HOST:PORT for the store of a transfer."""
    return free_address(host)


def free_address(host: str = "127.0.0.1") -> str:
    """Return HOST:PORT with a free port. ``host`` must be this host's name or address."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return f"{host}:{probe.getsockname()[1]}"


def _short(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__


@contextlib.contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for the block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
