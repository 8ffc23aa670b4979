"""Weights through memory that two processes of one host share: shared memory, or on a GPU CUDA IPC.

Each source rank has two buffers, which its target ranks map. A socket a pair of ranks says which buffer
is full and which is free again; so nobody polls, every wait has a deadline, and a peer that dies is seen
at once. The memory has no name: it is handed over through the socket and ends with its users.
"""

from __future__ import annotations

import base64
import contextlib
import json
import mmap
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_dagger.weights.errors import WeightSyncError
from megatron_dagger.weights.transports import TransferSpec
from megatron_dagger.weights.transports.buckets import Segment

SOCKETS = Path("/tmp")  # not TMPDIR: a socket's path has 107 bytes at most

_BUFFERS = 2
_RETRY_S = 0.02
_MOST_BYTES_OF_A_MESSAGE = 1 << 16


def this_host() -> str:
    """Equal in two processes if they can share memory: they run on one kernel and see the same folder of sockets."""
    folder = SOCKETS.stat()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{folder.st_dev}:{folder.st_ino}"


def socket_path(directory: str, source_rank: int) -> str:
    return str(Path(directory) / f"source-{source_rank}.sock")


class HostSender:
    """A source rank's end. A context manager: waits for its target ranks to come, and shares two buffers with them."""

    def __init__(self, agreement: TransferSpec, source_rank: int, device: torch.device):
        offer = agreement.offer
        self._rank, self._deadline_s, self._device = source_rank, offer.deadline_s, device
        self._users: list[int | None] = [None] * _BUFFERS  # the target rank that a buffer was filled for
        self._next = 0
        self._peers: dict[int, socket.socket] = {}
        self._awaited = {copy.target_rank for copy in agreement.plan.by_source.get(source_rank, [])}
        self._stack = contextlib.ExitStack()
        path, size = socket_path(offer.address, source_rank), _BUFFERS * agreement.wire.bucket_bytes
        try:
            handle = self._share(path, size)
        except (OSError, RuntimeError) as error:
            self._stack.close()
            raise WeightSyncError(f"source rank {source_rank} cannot share memory through {path}: {error}") from error
        self._greeting = {"plan": agreement.digest(), "bytes": size, **handle}

    def _share(self, path: str, size: int) -> dict[str, Any]:
        """Make the buffers, and the socket by which they are had; what to tell those who come."""
        self._listener = self._stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        _unlink(path)
        self._listener.bind(path)
        self._stack.callback(_unlink, path)
        self._listener.listen(len(self._awaited))
        share = _cuda_memory if self._device.type == "cuda" else _shared_memory
        memory, handle, self._descriptors = share(size, self._device, self._stack)
        self._buffers = memory.view(_BUFFERS, -1)
        return handle

    def _accept(self) -> None:
        """Wait until all targets have come."""
        self._listener.settimeout(self._deadline_s)
        while self._awaited:
            try:
                peer, _ = self._listener.accept()
            except TimeoutError:
                raise WeightSyncError(
                    f"source rank {self._rank}: target ranks {sorted(self._awaited)} did not come within "
                    f"{self._deadline_s:.0f} s"
                ) from None
            self._stack.enter_context(peer)
            peer.settimeout(self._deadline_s)
            hello = json.loads(_receive_line(peer, f"source rank {self._rank}", "a target rank"))
            rank = int(hello["target_rank"])
            if rank not in self._awaited:
                raise WeightSyncError(f"source rank {self._rank}: target rank {rank} came, which was not awaited")
            self._awaited.remove(rank)
            self._peers[rank] = peer
            socket.send_fds(peer, [(json.dumps(self._greeting) + "\n").encode()], self._descriptors)
            if hello["plan"] != self._greeting["plan"]:
                raise WeightSyncError(f"source rank {self._rank} and target rank {rank} have different plans")

    def buffer(self, segment: Segment) -> torch.Tensor:
        user = self._users[self._next]
        if user is not None:
            self._await_release(self._next, user)
        return self._buffers[self._next, : segment.bytes]

    def send(self, segment: Segment) -> None:
        _synchronise(self._device)
        self._users[self._next] = segment.target_rank
        self._tell(segment.target_rank, self._next)
        self._next = (self._next + 1) % _BUFFERS

    def finish(self) -> None:
        for number in (self._next, (self._next + 1) % _BUFFERS):
            user = self._users[number]
            if user is not None:
                self._await_release(number, user)

    def _tell(self, target_rank: int, number: int) -> None:
        try:
            self._peers[target_rank].sendall(bytes([number]))
        except OSError as error:
            raise self._gone(target_rank, error) from error

    def _await_release(self, number: int, user: int) -> None:
        try:
            answer = self._peers[user].recv(1)
        except OSError as error:
            raise self._gone(user, error) from error
        if answer != bytes([number]):
            raise self._gone(user, None)
        self._users[number] = None

    def _gone(self, target_rank: int, error: OSError | None) -> WeightSyncError:
        how = f"did not answer within {self._deadline_s:.0f} s" if isinstance(error, TimeoutError) else "is gone"
        return WeightSyncError(f"source rank {self._rank}: target rank {target_rank} {how}")

    def __enter__(self) -> HostSender:
        try:
            self._accept()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        del self._buffers
        self._stack.close()


class HostReceiver:
    """A target rank's end, connected to the source ranks that it needs."""

    def __init__(self, agreement: TransferSpec, target_rank: int, device: torch.device):
        self._rank, self._deadline_s, self._device = target_rank, agreement.offer.deadline_s, device
        self._peers: dict[int, socket.socket] = {}
        self._buffers: dict[int, torch.Tensor] = {}
        self._filled: dict[int, int] = {}
        self._stack = contextlib.ExitStack()
        try:
            for rank in sorted({copy.source_rank for copy in agreement.plan.by_target[target_rank]}):
                self._connect(rank, agreement.offer.address, agreement.digest())
        except BaseException:
            self.close()
            raise

    def _connect(self, rank: int, directory: str, plan_digest: str) -> None:
        path = socket_path(directory, rank)
        try:
            peer = self._stack.enter_context(_reach(path, self._deadline_s))
            peer.settimeout(self._deadline_s)
            peer.sendall((json.dumps({"target_rank": self._rank, "plan": plan_digest}) + "\n").encode())
            data, descriptors, _, _ = socket.recv_fds(peer, _MOST_BYTES_OF_A_MESSAGE, 1)
        except OSError as error:
            raise WeightSyncError(f"source rank {rank} cannot be reached at {path}: {error}") from error
        if not data.endswith(b"\n"):
            raise WeightSyncError(f"source rank {rank} ended while it was greeted")
        greeting = json.loads(data)
        if greeting["plan"] != plan_digest:
            raise WeightSyncError(f"source rank {rank} carries out another plan: its model, layouts or dtypes differ")
        memory = _open_memory(greeting, descriptors, self._device)
        self._buffers[rank] = memory.view(_BUFFERS, -1)
        self._peers[rank] = peer

    def expect(self, bucket: Sequence[Segment]) -> None:
        """Nothing to do: the sender does not wait for it."""

    def receive(self, segment: Segment) -> torch.Tensor:
        rank = segment.source_rank
        try:
            word = self._peers[rank].recv(1)
        except OSError as error:
            raise WeightSyncError(f"source rank {rank} sent nothing within {self._deadline_s:.0f} s") from error
        if not word:
            raise WeightSyncError(f"source rank {rank} is gone")
        self._filled[rank] = word[0]
        return self._buffers[rank][word[0], : segment.bytes]

    def release(self, segment: Segment) -> None:
        _synchronise(self._device)
        rank = segment.source_rank
        with contextlib.suppress(OSError):  # the next wait for it tells
            self._peers[rank].sendall(bytes([self._filled[rank]]))

    def close(self) -> None:
        self._buffers.clear()
        self._stack.close()


def _reach(path: str, deadline_s: float) -> socket.socket:
    """Connect, as soon as there is somebody to connect to."""
    end = time.monotonic() + deadline_s
    while True:
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            peer.connect(path)
            return peer
        except (FileNotFoundError, ConnectionRefusedError):
            peer.close()
            if time.monotonic() > end:
                raise
            time.sleep(_RETRY_S)


def _receive_line(peer: socket.socket, who: str, whom: str) -> bytes:
    data = b""
    while not data.endswith(b"\n") and len(data) < _MOST_BYTES_OF_A_MESSAGE:
        try:
            part = peer.recv(_MOST_BYTES_OF_A_MESSAGE)
        except OSError as error:
            raise WeightSyncError(f"{who}: {whom} did not say who it is: {error}") from error
        if not part:
            raise WeightSyncError(f"{who}: {whom} ended before it said who it is")
        data += part
    return data


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _shared_memory(
    size: int, device: torch.device, stack: contextlib.ExitStack
) -> tuple[torch.Tensor, dict[str, Any], list[int]]:
    descriptor = os.memfd_create("megatron-dagger-weights")
    stack.callback(os.close, descriptor)
    os.ftruncate(descriptor, size)
    return _mapped(descriptor, size), {}, [descriptor]


def _mapped(descriptor: int, size: int) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)


def _cuda_memory(
    size: int, device: torch.device, stack: contextlib.ExitStack
) -> tuple[torch.Tensor, dict[str, Any], list[int]]:
    tensor = torch.empty(size, dtype=torch.uint8, device=device)
    shared = tensor.untyped_storage()._share_cuda_()
    parts = [{"bytes": base64.b64encode(x).decode()} if isinstance(x, bytes) else x for x in shared]
    return tensor, {"cuda": parts}, []


def _open_memory(greeting: dict[str, Any], descriptors: list[int], device: torch.device) -> torch.Tensor:
    size = int(greeting["bytes"])
    if "cuda" not in greeting:
        (descriptor,) = descriptors
        try:
            return _mapped(descriptor, size)
        finally:
            os.close(descriptor)
    _, *rest = (base64.b64decode(x["bytes"]) if isinstance(x, dict) else x for x in greeting["cuda"])
    # The number of a GPU is each process's own.
    storage = torch.UntypedStorage._new_shared_cuda(device.index or 0, *rest)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (size,))
