"""The whole method in minutes on two CPU cores: a small Qwen3 learns to repair packages, and to recover from errors.

Three in ten comments on a mistake name only the rule that it breaks, which no student of this size knows by heart: it
must guess, see from the longer comment that the guess was wrong, and take it back. The teacher never guesses wrong, so
its episodes show none of that. ``tools/quickstart`` also runs the SFT arm (tools/study/sft_arm.py).
"""

from __future__ import annotations

from dataclasses import replace

from megatron_dagger.config import RunConfig, override
from megatron_dagger.recipes.long_repair import long_repair

BUGS = 2
TRAIN_PACKAGES = ("boltons", "cachetools", "humanize", "parse", "toolz", "voluptuous")


def quickstart() -> RunConfig:
    """A 0.5M-parameter Qwen3 makes two repairs in a row in pure-Python packages; one CPU process, minutes."""
    recipe = long_repair(BUGS)
    repairs = replace(recipe.repo_repair, terse=0.3, train_packages=TRAIN_PACKAGES, train_tasks=200, heldout_tasks=40)
    settings = [
        "dagger.sft_tasks=110",
        "dagger.tasks_per_round=45",  # not of round 0: in a repeated task the student knows the rules
        "dagger.aggregation.max_sft_labels=1400",
        "dagger.aggregation.max_labels_per_round=550",
        "training.max_sft_steps=600",
        "training.max_steps=150",
    ]
    return override(replace(recipe, name="quickstart", repo_repair=repairs), settings)
