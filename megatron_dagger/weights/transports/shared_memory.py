"""Weights through memory shared by processes of the same host; on a GPU through CUDA IPC.

Each source rank has two buffers, which its target ranks map. Each pair of ranks has a socket on which a byte names the
buffer that was filled or released. So nothing polls, every wait has a deadline, and a dead peer is noticed at once. The
memory is anonymous: its file descriptor is passed through the socket, and it is freed with its last user.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_dagger.weights.errors import WeightSyncError
from megatron_dagger.weights.transports import TransferSpec
from megatron_dagger.weights.transports.buckets import BucketTransport, Segment
from megatron_dagger.weights.transports.memory import allocate, map_memory

SOCKETS = Path("/tmp")  # not TMPDIR: a socket's path is limited to 107 bytes

_BUFFERS = 2
_RETRY_S = 0.02
_MAX_MESSAGE_BYTES = 1 << 16


def this_host() -> str:
    """Return an id that two processes have in common if they can share memory: same kernel, same socket directory."""
    folder = SOCKETS.stat()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{folder.st_dev}:{folder.st_ino}"


def socket_path(directory: str, source_rank: int) -> str:
    """Return the path of a source rank's socket."""
    return str(Path(directory) / f"source-{source_rank}.sock")


class SharedMemorySender:
    """A source rank's side (``buckets.Sender``); a context manager that waits for its target ranks to connect."""

    def __init__(self, spec: TransferSpec, source_rank: int, device: torch.device):
        source = spec.source
        self._rank, self._deadline_s, self._device = source_rank, source.deadline_s, device
        self._users: list[int | None] = [None] * _BUFFERS  # the target rank that has not released the buffer yet
        self._next = 0
        self._peers: dict[int, socket.socket] = {}
        self._awaited = {copy.target_rank for copy in spec.plan.by_source.get(source_rank, [])}
        self._stack = contextlib.ExitStack()
        path, size = socket_path(source.address, source_rank), _BUFFERS * spec.bucket_spec.bucket_bytes
        try:
            handle = self._share(path, size)
        except (OSError, RuntimeError) as error:
            self._stack.close()
            raise WeightSyncError(f"source rank {source_rank} cannot share memory through {path}: {error}") from error
        self._greeting = {"plan": spec.digest(), **handle}

    def _share(self, path: str, size: int) -> dict[str, Any]:
        """Open the socket and allocate the buffers. Return what a target rank needs to map them."""
        self._listener = self._stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        _unlink(path)
        self._listener.bind(path)
        self._stack.callback(_unlink, path)
        self._listener.listen(len(self._awaited))
        memory, handle, self._descriptors = allocate(size, self._device, self._stack)
        self._buffers = memory.view(_BUFFERS, -1)
        return handle

    def _accept(self) -> None:
        """Wait until all target ranks have connected."""
        self._listener.settimeout(self._deadline_s)
        while self._awaited:
            try:
                peer, _ = self._listener.accept()
            except TimeoutError:
                raise WeightSyncError(
                    f"source rank {self._rank}: target ranks {sorted(self._awaited)} did not connect within "
                    f"{self._deadline_s:.0f} s"
                ) from None
            self._stack.enter_context(peer)
            peer.settimeout(self._deadline_s)
            hello = json.loads(_receive_line(peer, self._rank))
            rank = int(hello["target_rank"])
            if rank not in self._awaited:
                raise WeightSyncError(f"source rank {self._rank}: target rank {rank} connected unexpectedly")
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
        self._notify(segment.target_rank, self._next)
        self._next = (self._next + 1) % _BUFFERS

    def finish(self) -> None:
        for number in (self._next, (self._next + 1) % _BUFFERS):
            user = self._users[number]
            if user is not None:
                self._await_release(number, user)

    def _notify(self, target_rank: int, number: int) -> None:
        try:
            self._peers[target_rank].sendall(bytes([number]))
        except OSError as error:
            raise self._gone(target_rank, error) from error

    def _await_release(self, number: int, user: int) -> None:
        try:
            released = self._peers[user].recv(1)
        except OSError as error:
            raise self._gone(user, error) from error
        if released != bytes([number]):
            raise self._gone(user, None)
        self._users[number] = None

    def _gone(self, target_rank: int, error: OSError | None) -> WeightSyncError:
        how = f"did not answer within {self._deadline_s:.0f} s" if isinstance(error, TimeoutError) else "is gone"
        return WeightSyncError(f"source rank {self._rank}: target rank {target_rank} {how}")

    def __enter__(self) -> SharedMemorySender:
        try:
            self._accept()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        del self._buffers
        self._stack.close()


class SharedMemoryReceiver:
    """A target rank's side (``buckets.Receiver``), connected to the source ranks that send to it."""

    def __init__(self, spec: TransferSpec, target_rank: int, device: torch.device):
        self._rank, self._deadline_s, self._device = target_rank, spec.source.deadline_s, device
        self._peers: dict[int, socket.socket] = {}
        self._buffers: dict[int, torch.Tensor] = {}
        self._filled: dict[int, int] = {}
        self._stack = contextlib.ExitStack()
        try:
            for rank in sorted({copy.source_rank for copy in spec.plan.by_target[target_rank]}):
                self._connect(rank, spec.source.address, spec.digest())
        except BaseException:
            self.close()
            raise

    def _connect(self, rank: int, directory: str, plan_digest: str) -> None:
        path = socket_path(directory, rank)
        try:
            peer = self._stack.enter_context(_connect_socket(path, self._deadline_s))
            peer.settimeout(self._deadline_s)
            peer.sendall((json.dumps({"target_rank": self._rank, "plan": plan_digest}) + "\n").encode())
            data, descriptors, _, _ = socket.recv_fds(peer, _MAX_MESSAGE_BYTES, 1)
        except OSError as error:
            raise WeightSyncError(f"source rank {rank} cannot be reached at {path}: {error}") from error
        if not data.endswith(b"\n"):
            raise WeightSyncError(f"source rank {rank} closed the connection before sending its buffers")
        greeting = json.loads(data)
        if greeting["plan"] != plan_digest:
            raise WeightSyncError(f"source rank {rank} carries out another plan: its model, layouts or dtypes differ")
        memory = map_memory(greeting, descriptors, self._device)
        self._buffers[rank] = memory.view(_BUFFERS, -1)
        self._peers[rank] = peer

    def expect(self, bucket: Sequence[Segment]) -> None:
        """Do nothing: the sender does not wait for it."""

    def receive(self, segment: Segment) -> torch.Tensor:
        rank = segment.source_rank
        try:
            filled = self._peers[rank].recv(1)
        except OSError as error:
            raise WeightSyncError(f"source rank {rank} sent nothing within {self._deadline_s:.0f} s") from error
        if not filled:
            raise WeightSyncError(f"source rank {rank} is gone")
        self._filled[rank] = filled[0]
        return self._buffers[rank][filled[0], : segment.bytes]

    def release(self, segment: Segment) -> None:
        _synchronise(self._device)
        rank = segment.source_rank
        with contextlib.suppress(OSError):  # the next wait for this rank will raise
            self._peers[rank].sendall(bytes([self._filled[rank]]))

    def close(self) -> None:
        self._buffers.clear()
        self._stack.close()


def open_transport(spec: TransferSpec, target_rank: int, device: torch.device) -> BucketTransport:
    """Connect a target rank to the source ranks that send to it."""
    return BucketTransport(SharedMemoryReceiver(spec, target_rank, device), spec.bucket_spec)


def open_sender(spec: TransferSpec, source_rank: int, device: torch.device) -> SharedMemorySender:
    """Allocate a source rank's buffers and listen for its target ranks."""
    return SharedMemorySender(spec, source_rank, device)


def new_address(host: str, directory: Path) -> str:
    """Return a new directory for the sockets of a transfer."""
    return tempfile.mkdtemp(dir=directory)


def _connect_socket(path: str, deadline_s: float) -> socket.socket:
    """Connect to a socket, waiting for it to appear. Raises OSError after the deadline."""
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


def _receive_line(peer: socket.socket, rank: int) -> bytes:
    """Return a target rank's first line to source rank ``rank``."""
    data = b""
    while not data.endswith(b"\n") and len(data) < _MAX_MESSAGE_BYTES:
        try:
            chunk = peer.recv(_MAX_MESSAGE_BYTES)
        except OSError as error:
            raise WeightSyncError(f"source rank {rank}: a target rank did not identify itself: {error}") from error
        if not chunk:
            raise WeightSyncError(f"source rank {rank}: a target rank disconnected before identifying itself")
        data += chunk
    return data


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
