"""The canary: a few tokens, and the log-probs that the trainer gave them. Before weights serve, they are tried on it.

Digests show that the right bytes are in the right places; the canary shows that the engine computes with
them what the trainer does: a packed copy that was not renewed, or a wrong RoPE base, passes every digest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# The largest difference of a log-prob that the two implementations may have: in fp32 they agree to 1e-5; in
# bfloat16 single tokens are some tenths apart, wrong weights several units. FP8 keeps 3 bits of a weight's mantissa.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5, "fp8": 1.0}
MOST_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Canary:
    """``logprobs[i]`` is of ``tokens[i + 1]``, natural logarithm, after all tokens before it."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]

    def problem(self, served: Any, precision: str) -> str | None:
        """What is wrong with the log-probs that an engine of this precision computed, or None."""
        apart = max(abs(float(a) - b) for a, b in zip(served, self.logprobs, strict=True))
        if apart <= TOLERANCE[precision]:  # not for NaN
            return None
        return f"its log-probs of the canary are {apart:.3g} from the trainer's, allowed is {TOLERANCE[precision]:g}"
