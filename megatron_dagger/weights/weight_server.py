"""Where the engines of a run ask its trainer for the weights that it holds in memory.

Source rank 0 keeps a store and writes where it is to ``RUN/trainer.json``. An engine that wants a version of
the weights draws a number there and waits for the WeightSource of that number; the trainer, while it has nothing else
to do, answers one after the other. Each gets a transfer of its own: one that is killed in the middle costs its
transfer and nobody else's. What cannot be had here can be had from the checkpoint.

There are two rows of numbers. An engine on the host that all source ranks are on draws for a transfer through the
host's memory, any other for one over the network.
"""

from __future__ import annotations

import datetime
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch.distributed as dist

from megatron_dagger.config import build, to_dict
from megatron_dagger.store.atomic import read_json, write_json
from megatron_dagger.weights.errors import WeightSyncError
from megatron_dagger.weights.layouts import SourceLayout
from megatron_dagger.weights.transports import WeightSource
from megatron_dagger.weights.transports.p2p import free_address
from megatron_dagger.weights.transports.shared_memory import SOCKETS, this_host

HOST = "MEGATRON_DAGGER_TRAINER_HOST"  # by which other nodes know the trainer's first one

_FILE = "trainer.json"
_ANSWER_S = 600.0  # a trainer that serves answers after a transfer to each engine that came before
_TRANSFER_S = 60.0  # for every single wait of a transfer; an engine that has asked is ready for it
_CONNECT_S = 10.0  # the file may be of a trainer that is gone
_READY_S = 5.0  # between a training's last file and its offer
_POLL_S = 0.1
_SERVING, _NOTHING = "serving", "none"

Kind = Literal["host", "live"]


class WeightServer:
    """The trainer's end, on source rank 0; Offers are for sources laid out like ``source``.

    ``hosts``: what ``this_host`` is for each source rank, or "" where its memory is not to be shared.
    """

    def __init__(self, run_dir: Path, source: SourceLayout, hosts: Sequence[str]):
        self._source = source
        self._host = _own_host()
        self._store = dist.TCPStore(self._host, 0, is_master=True, wait_for_workers=False)
        self._store.set(_SERVING, _NOTHING)
        self._version = _NOTHING
        self._answered: dict[Kind, int] = {}  # of those who want this version
        address = f"{self._host}:{self._store.port}"
        write_json(run_dir / _FILE, {"address": address, "host": hosts[0] or None if len(set(hosts)) == 1 else None})

    @contextmanager
    def serving(self, version: int) -> Iterator[None]:
        """In the block engines may ask for this version of the weights."""
        with tempfile.TemporaryDirectory(
            prefix="megatron-dagger-weights-", dir=SOCKETS, ignore_cleanup_errors=True
        ) as self._sockets:
            self._version, self._answered = str(version), {"host": 0, "live": 0}
            self._store.set(_SERVING, self._version)
            try:
                yield
            finally:
                self._version, self._answered = _NOTHING, {}
                self._store.set(_SERVING, _NOTHING)

    def next_offer(self) -> WeightSource | None:
        """The WeightSource that the next engine in a row is told of, to be carried out now by all source ranks."""
        for kind, answered in self._answered.items():
            if self._store.add(_drawn(self._version, kind), 0) > answered:
                self._answered[kind] += 1
                offer = self._offer(kind)
                self._store.set(_told(self._version, kind, answered + 1), json.dumps(to_dict(offer)))
                return offer
        return None

    def _offer(self, kind: Kind) -> WeightSource:
        """With sockets, or a port, that no other transfer has."""
        address = tempfile.mkdtemp(dir=self._sockets) if kind == "host" else free_address(self._host)
        return WeightSource(kind=kind, address=address, source=self._source, deadline_s=_TRANSFER_S)


def request_weights(run_dir: Path, version: int, *, deadline_s: float = _ANSWER_S) -> WeightSource:
    """What the run's trainer offers of this version. Raises WeightSyncError if it has not got it, or is not there."""
    wanted = str(version)
    path = run_dir / _FILE
    if not path.exists():
        raise WeightSyncError("the run has no trainer that lives through its rounds")
    trainer = read_json(path)
    host, _, port = str(trainer["address"]).rpartition(":")
    kind: Kind = "host" if trainer.get("host") == this_host() else "live"
    connecting = datetime.timedelta(seconds=min(_CONNECT_S, deadline_s))
    try:
        store = dist.TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=connecting)
        store.set_timeout(datetime.timedelta(seconds=deadline_s))
        end = time.monotonic() + _READY_S
        while (serves := store.get(_SERVING).decode()) != wanted:
            if time.monotonic() > end:
                raise WeightSyncError(f"the trainer at {host}:{port} offers version {serves} of the weights")
            time.sleep(_POLL_S)
        offer = store.get(_told(wanted, kind, store.add(_drawn(wanted, kind), 1)))
    except RuntimeError as error:  # torch's errors; ours is one too
        if isinstance(error, WeightSyncError):
            raise
        raise WeightSyncError(f"the trainer at {host}:{port} did not answer within {deadline_s:.0f} s") from error
    return build(WeightSource, json.loads(offer))


def _drawn(version: str, kind: Kind) -> str:
    return f"drawn-{kind}-{version}"


def _told(version: str, kind: Kind, number: int) -> str:
    return f"offer-{kind}-{version}-{number}"


def _own_host() -> str:
    """This node's name for other nodes: what HOST says, or its own name where that can be resolved."""
    name = os.environ.get(HOST) or socket.gethostname()
    try:
        socket.getaddrinfo(name, None, socket.AF_INET)
    except OSError:
        return "127.0.0.1"
    return name
