"""Serves the weights in a running trainer's memory to the rollout engines of its run.

Source rank 0 keeps a store, whose address it writes to ``RUN/trainer.json``. An engine takes a ticket for a version of
the weights and waits for the WeightSource with the ticket's number. The trainer serves tickets one at a time, between
training rounds. Every ticket has a transfer of its own, so an engine that is killed in the middle affects no other. An
engine that gets no weights here reads the checkpoint.

Tickets are numbered per transport. An engine uses the first transport in ``TRANSPORTS`` that reaches the trainer:
shared memory if it runs on the host of all source ranks, otherwise the network.
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

import torch.distributed as dist

from megatron_dagger.config import build, to_dict
from megatron_dagger.store.atomic import read_json, write_json
from megatron_dagger.weights.errors import WeightSyncError
from megatron_dagger.weights.layouts import SourceLayout
from megatron_dagger.weights.transports import TRANSPORTS, WeightSource
from megatron_dagger.weights.transports.open import transport_module
from megatron_dagger.weights.transports.shared_memory import SOCKETS, this_host

HOST = "MEGATRON_DAGGER_TRAINER_HOST"  # environment variable: the name of the trainer's first node for other nodes

_FILE = "trainer.json"
_ANSWER_S = 600.0  # transfers to the engines with earlier tickets come first
_TRANSFER_S = 60.0  # for each wait of a transfer; an engine with a ticket is ready for it
_CONNECT_S = 10.0  # the file may be of a trainer that has ended
_READY_S = 5.0  # from a round's last file until the trainer serves its weights
_POLL_S = 0.1
_SERVING, _NOTHING = "serving", "none"
_LIVE_TRANSPORTS = {kind: transport for kind, transport in TRANSPORTS.items() if transport.from_trainer}


class WeightServer:
    """The trainer's side, on source rank 0. ``layout`` is the trainer's.

    ``hosts``: the id (``this_host``) of each source rank's host, or "" if its memory must not be shared.
    """

    def __init__(self, run_dir: Path, layout: SourceLayout, hosts: Sequence[str]):
        self._layout = layout
        self._host = _own_host()
        self._store = dist.TCPStore(self._host, 0, is_master=True, wait_for_workers=False)
        self._store.set(_SERVING, _NOTHING)
        self._version = _NOTHING
        self._served: dict[str, int] = {}  # tickets for this version, by transport
        address = f"{self._host}:{self._store.port}"
        write_json(run_dir / _FILE, {"address": address, "host": hosts[0] or None if len(set(hosts)) == 1 else None})

    @contextmanager
    def serving(self, version: int) -> Iterator[None]:
        """Accept tickets for this version of the weights inside the block."""
        with tempfile.TemporaryDirectory(
            prefix="megatron-dagger-weights-", dir=SOCKETS, ignore_cleanup_errors=True
        ) as directory:
            self._directory = Path(directory)
            self._version, self._served = str(version), dict.fromkeys(_LIVE_TRANSPORTS, 0)
            self._store.set(_SERVING, self._version)
            try:
                yield
            finally:
                self._version, self._served = _NOTHING, {}
                self._store.set(_SERVING, _NOTHING)

    def next_source(self) -> WeightSource | None:
        """Return the source for the next ticket, which all source ranks must now send, or None without a ticket."""
        for kind, served in self._served.items():
            if self._store.add(_tickets_key(self._version, kind), 0) > served:
                self._served[kind] += 1
                address = transport_module(kind).new_address(self._host, self._directory)
                source = WeightSource(kind=kind, address=address, layout=self._layout, deadline_s=_TRANSFER_S)
                self._store.set(_source_key(self._version, kind, served + 1), json.dumps(to_dict(source)))
                return source
        return None


def request_weights(run_dir: Path, version: int, *, deadline_s: float = _ANSWER_S) -> WeightSource:
    """Take a ticket for a version of the weights, and return its source once the trainer serves it.

    Raises WeightSyncError if no trainer serves this run, if it serves another version, or after the deadline.
    """
    requested = str(version)
    path = run_dir / _FILE
    if not path.exists():
        raise WeightSyncError("the run has no resident trainer")
    trainer = read_json(path)
    host, _, port = str(trainer["address"]).rpartition(":")
    same_host = trainer.get("host") == this_host()
    kind = next(kind for kind, transport in _LIVE_TRANSPORTS.items() if same_host or not transport.same_host)
    connecting = datetime.timedelta(seconds=min(_CONNECT_S, deadline_s))
    try:
        store = dist.TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=connecting)
        store.set_timeout(datetime.timedelta(seconds=deadline_s))
        end = time.monotonic() + _READY_S
        while (served := store.get(_SERVING).decode()) != requested:
            if time.monotonic() > end:
                raise WeightSyncError(
                    f"the trainer at {host}:{port} serves version {served} of the weights, not {requested}"
                )
            time.sleep(_POLL_S)
        ticket = store.add(_tickets_key(requested, kind), 1)
        source = store.get(_source_key(requested, kind, ticket))
    except WeightSyncError:
        raise
    except RuntimeError as error:  # torch's errors
        raise WeightSyncError(f"the trainer at {host}:{port} did not answer within {deadline_s:.0f} s") from error
    return build(WeightSource, json.loads(source))


def _tickets_key(version: str, kind: str) -> str:
    return f"tickets-{kind}-{version}"


def _source_key(version: str, kind: str, ticket: int) -> str:
    return f"source-{kind}-{version}-{ticket}"


def _own_host() -> str:
    """Return this node's name for other nodes: HOST's value, or the host name if it can be resolved."""
    name = os.environ.get(HOST) or socket.gethostname()
    try:
        socket.getaddrinfo(name, None, socket.AF_INET)
    except OSError:
        return "127.0.0.1"
    return name
