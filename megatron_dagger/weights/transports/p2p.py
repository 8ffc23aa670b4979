"""Weights point to point between processes anywhere: gloo on CPUs, NCCL on GPUs.

Source and target ranks make a process group of their own, sources first, through a store that source
rank 0 keeps; it has nothing to do with the trainer's groups or the engine's. The group lives for one
transfer: after a failure nothing of it is left to disturb the next.
"""

from __future__ import annotations

import datetime
import socket
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_dagger.weights.errors import WeightSyncError
from megatron_dagger.weights.transports import TransferSpec
from megatron_dagger.weights.transports.buckets import Segment

_BUFFERS = 2
_TAGS = 1 << 16
_LOOPBACK = ("127.0.0.1", "localhost")


class _Group:
    """The process group of a transfer, of all source ranks and then all target ranks, and two buffers of this one."""

    def __init__(self, agreement: TransferSpec, rank: int, device: torch.device):
        address, deadline_s = agreement.offer.address, agreement.offer.deadline_s
        self.sources = agreement.offer.source.world_size
        self.deadline = datetime.timedelta(seconds=deadline_s)
        host, _, port = address.rpartition(":")
        size = self.sources + agreement.target.world_size
        try:
            store = dist.TCPStore(host, int(port), is_master=rank == 0, timeout=self.deadline, wait_for_workers=False)
            self._agree(store, rank, agreement.digest())
            scoped = dist.PrefixStore("transfer", store)
            self._group = self._join(scoped, rank, size, host, device)
        except (RuntimeError, ValueError) as error:
            raise WeightSyncError(
                f"no connection through the store at {address} within {deadline_s:.0f} s: {_short(error)}"
            ) from error
        self._store = store
        self.buffers = torch.empty(_BUFFERS, agreement.wire.bucket_bytes, dtype=torch.uint8, device=device)
        self._sent: Counter[int] = Counter()
        self._received: Counter[int] = Counter()

    def _agree(self, store: dist.TCPStore, rank: int, plan: str) -> None:
        """Both ends must have the same plan, or what is sent would land anywhere."""
        if rank == 0:
            store.set("plan", plan)
        elif store.get("plan").decode() != plan:
            raise WeightSyncError("source rank 0 carries out another plan: its model, layouts or dtypes differ")

    def _join(self, store: dist.Store, rank: int, size: int, host: str, device: torch.device) -> Any:
        if device.type == "cuda":
            return dist.ProcessGroupNCCL(store, rank, size, self.deadline)
        if host not in _LOOPBACK:
            return dist.ProcessGroupGloo(store, rank, size, self.deadline)
        options = dist.ProcessGroupGloo._Options()  # the host's own name may not resolve
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = self.deadline
        return dist.ProcessGroupGloo(store, rank, size, options)

    def send(self, data: torch.Tensor, rank: int) -> Any:
        return self._group.send([data], rank, self._tag(self._sent, rank))

    def receive(self, into: torch.Tensor, rank: int) -> Any:
        return self._group.recv([into], rank, self._tag(self._received, rank))

    @staticmethod
    def _tag(counters: Counter[int], rank: int) -> int:
        """A number of its own for each message between two ranks, the same at both ends."""
        counters[rank] += 1
        return counters[rank] % _TAGS

    def close(self) -> None:
        del self._group, self._store


class LiveSender:
    """A source rank's end. A context manager."""

    def __init__(self, agreement: TransferSpec, source_rank: int, device: torch.device):
        self._rank = source_rank
        self._transfer = _Group(agreement, source_rank, device)
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
                f"source rank {self._rank}: target rank {segment.target_rank} took nothing: {_short(error)}"
            ) from error

    def __enter__(self) -> LiveSender:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._works.clear()
        self._transfer.close()


class LiveReceiver:
    """A target rank's end: two buffers, each with a part for every segment of one bucket."""

    def __init__(self, agreement: TransferSpec, target_rank: int, device: torch.device):
        self._transfer = _Group(agreement, agreement.offer.source.world_size + target_rank, device)
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
        """Nothing to do: its buffer is used again for the bucket after the next."""

    def close(self) -> None:
        self._expected.clear()
        self._transfer.close()


def free_address(host: str = "127.0.0.1") -> str:
    """HOST:PORT for the store of a transfer; ``host`` is this one, the loopback where all of it is on one host."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return f"{host}:{probe.getsockname()[1]}"


def _short(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
