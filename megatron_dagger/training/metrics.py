"""metrics.jsonl: one line per step, consistent after a resume; and progress in the log."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

from megatron_dagger.store import atomic
from megatron_dagger.store.fence import permitted

logger = logging.getLogger(__name__)

FILE_NAME = "metrics.jsonl"
_LOG_EVERY_S = 5.0


class StepMetrics:
    """The open metrics.jsonl of a round, written by rank 0.

    A line is {step, loss, grad_norm, lr, label_tokens, tokens, places, step_s}; steps count from 1. ``places`` are
    those of all ranks' rows, with a token or with padding.
    """

    def __init__(self, output_dir: Path, steps: int, *, finished: int) -> None:
        """Open the file for a round of ``steps``; keep the lines of the first ``finished`` steps."""
        self.path, self.steps = output_dir / FILE_NAME, steps
        self.lines = [line for line in read_steps(self.path) if line["step"] <= finished]
        self._logged = 0.0
        with permitted(self.path):  # no other process may write between the two
            atomic.write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))
            self._file = self.path.open("a")

    def add(self, **line: Any) -> None:
        """Append a step's line, and log the progress every few seconds."""
        self.lines.append(line)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        now = time.monotonic()
        if now - self._logged > _LOG_EVERY_S or line["step"] == self.steps:
            self._logged = now
            recent = self.lines[-20:]
            per_step = sum(x["step_s"] for x in recent) / len(recent)
            logger.info(
                "step %d/%d  loss %.4f  %.0f tokens/s  %.0f s to go",
                line["step"],
                self.steps,
                line["loss"],
                sum(x["tokens"] for x in recent) / max(1e-9, sum(x["step_s"] for x in recent)),
                (self.steps - line["step"]) * per_step,
            )

    def close(self) -> None:
        """Close the file. May be called twice."""
        self._file.close()

    def summary(self) -> dict[str, Any]:
        """Return the manifest's numbers about the steps; a token counts as often as it was trained on."""
        losses = [line["loss"] for line in self.lines]
        tokens = sum(line["tokens"] for line in self.lines)
        return {
            "steps": len(self.lines),
            "first_loss": losses[0],
            "last_loss": losses[-1],
            "mean_loss_last_10": sum(losses[-10:]) / len(losses[-10:]),
            "tokens": tokens,
            "fill": tokens / max(1, sum(line["places"] for line in self.lines)),
            "label_tokens": sum(line["label_tokens"] for line in self.lines),
            "tokens_per_s": tokens / max(1e-9, sum(line["step_s"] for line in self.lines)),
        }


def read_steps(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file ([] if there is none), without a last line that a kill cut short."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
