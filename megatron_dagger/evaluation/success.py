"""The success rate, with its confidence interval."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from megatron_dagger.types import Trajectory

Z_95 = 1.959963984540054  # two-sided 95% quantile of the normal distribution


def wilson_interval(solved: int, tasks: int, z: float = Z_95) -> tuple[float, float]:
    """Return Wilson's score interval of the proportion ``solved / tasks`` (Wilson, JASA 22, 1927).

    ``z`` is the normal quantile of the confidence level, by default for 95%.
    """
    if tasks == 0:
        return 0.0, 1.0
    share = solved / tasks
    centre = share + z * z / (2 * tasks)
    spread = z * math.sqrt(share * (1 - share) / tasks + z * z / (4 * tasks * tasks))
    scale = 1 + z * z / tasks
    low, high = (centre - spread) / scale, (centre + spread) / scale
    return low if solved else 0.0, high if solved < tasks else 1.0  # exact at the ends, which rounding misses


def success(trajectories: Sequence[Trajectory], *, given_up: int = 0) -> dict[str, Any]:
    """Return a round's numbers: tasks, solved, success in [0, 1] with its 95% interval, median turns, stop reasons.

    ``given_up`` further tasks have no clean episode; they count as unsolved.
    """
    solved, tasks = sum(trajectory.solved for trajectory in trajectories), len(trajectories) + given_up
    low, high = wilson_interval(solved, tasks)
    return {
        "tasks": tasks,
        "solved": solved,
        "given_up": given_up,
        "success": solved / tasks if tasks else 0.0,
        "ci_low": low,
        "ci_high": high,
        "median_turns": statistics.median(len(t.turns) for t in trajectories) if trajectories else 0,
        "stop_reasons": dict(Counter(str(t.stop_reason) for t in trajectories)),
    }
