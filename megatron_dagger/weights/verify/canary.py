"""The canary: a few tokens with the trainer's log-probs, which an engine must reproduce before its weights serve.

Digests show that the right bytes are in the right places. The canary shows that the engine computes the same function
with them: a stale packed copy or a wrong RoPE base passes every digest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# The largest accepted difference of a log-prob. In fp32 the two implementations agree to 1e-5. In bfloat16, tokens
# differ by some tenths, and with wrong weights by several units. FP8 keeps 3 bits of a weight's mantissa.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5, "fp8": 1.0}
MAX_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Canary:
    """``logprobs[i]`` is the natural log-prob of ``tokens[i + 1]`` given all tokens before it."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]

    def problem(self, served: Any, precision: str) -> str | None:
        """Compare the engine's log-probs, (len(tokens) - 1,). Return the problem, or None if they are close enough.

        ``precision``: a key of TOLERANCE.
        """
        difference = max(abs(float(a) - b) for a, b in zip(served, self.logprobs, strict=True))
        if difference <= TOLERANCE[precision]:  # false for NaN
            return None
        return (
            f"its log-probs of the canary differ from the trainer's by {difference:.3g}, "
            f"more than the {TOLERANCE[precision]:g} allowed in {precision}"
        )
