"""Stopping between two steps when the cluster wants its machines back: SIGTERM or SIGUSR1, on any rank."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed

from megatron_dagger.signals import STOP_SIGNALS


class StopSignal:
    """Within the block the signals are remembered instead of ending the process."""

    def __init__(self) -> None:
        self._came = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def on_any_rank(self, device: torch.device) -> bool:
        """Whether one has come to any rank; a collective, so that all stop after the same step."""
        came = torch.tensor([self._came], dtype=torch.int32, device=device)
        torch.distributed.all_reduce(came, torch.distributed.ReduceOp.MAX)
        return bool(came.item())

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._came = True
