"""How ranks stop: a signal to any rank is remembered, and all ranks stop together between two steps."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed

from megatron_dagger.signals import STOP_SIGNALS


class StopSignal:
    """Context manager: within the block SIGTERM and SIGUSR1 are remembered instead of ending the process."""

    def __init__(self) -> None:
        self._received = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def on_any_rank(self, device: torch.device) -> bool:
        """Return whether any rank received a signal. A collective: all ranks get the same answer."""
        received = torch.tensor([self._received], dtype=torch.int32, device=device)
        torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
        return bool(received.item())

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._received = True
