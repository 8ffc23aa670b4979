"""Teachers by name (``teacher.kind``): those that users bring. The driver makes ours."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_dagger.config import RunConfig
from megatron_dagger.config.teacher import TEACHERS
from megatron_dagger.parts import find_part
from megatron_dagger.policies.base import Policy
from megatron_dagger.policies.openai.cache import Response

ENTRY_POINTS = "megatron_dagger.policies"


@dataclass(frozen=True, kw_only=True)
class TeacherContext:
    """The argument of a function that makes a teacher."""

    config: RunConfig  # with its own settings in ``config.teacher.options``
    run_dir: Path  # for what it must keep, such as answers that cost money
    read: Callable[[Response], str]  # a model's response -> the action in it, in the student's format
    encode: Callable[[str], np.ndarray]  # an action's text -> its tokens (n,), int32
    stack: ExitStack  # closes what it opens


def find_teacher(name: str) -> Callable[[TeacherContext], Policy]:
    """Return the function that makes a teacher. Raises ConfigError if there is none of that name."""
    make: Callable[[TeacherContext], Policy] = find_part(
        name, dict.fromkeys(TEACHERS, ""), group=ENTRY_POINTS, setting="teacher.kind"
    )
    return make
