"""Read the tasks of a data set; rows that cannot be used are reported with the reason."""

from __future__ import annotations

import logging
from collections.abc import Callable

from megatron_dagger.config.base import ConfigError, build, require, to_dict
from megatron_dagger.envs.swe.r2e_gym import r2e_gym_task
from megatron_dagger.envs.swe.rows import Row, read_rows
from megatron_dagger.envs.swe.swebench import swebench_task
from megatron_dagger.envs.swe.swegym import swegym_task
from megatron_dagger.envs.swe.swesmith import swesmith_task
from megatron_dagger.envs.swe.task import SweTask

# A row to a task, for every data set format in config.swe.Dataset.
DATASETS: dict[str, Callable[[Row], SweTask]] = {
    "swe-bench": swebench_task,
    "swe-gym": swegym_task,
    "swe-smith": swesmith_task,
    "r2e-gym": r2e_gym_task,
}

logger = logging.getLogger(__name__)


def read_tasks(dataset: str, source: str, *, split: str = "test") -> tuple[list[SweTask], dict[str, str]]:
    """Return the tasks of ``source`` (see rows.read_rows), and the reason why each other row is refused.

    ``dataset`` is the format, a key of DATASETS; the refused rows are named ``row N``, from 1. Raises ConfigError if no
    row can be used or two tasks have the same id.
    """
    require(dataset in DATASETS, f"dataset={dataset!r} is unknown; choose one of {', '.join(DATASETS)}")
    tasks: dict[str, SweTask] = {}
    refused: dict[str, str] = {}
    for number, row in enumerate(read_rows(source, split=split), 1):
        try:
            task = build(SweTask, to_dict(DATASETS[dataset](row)))  # with values of the right types
        except ConfigError as error:
            refused[f"row {number}"] = str(error)
            continue
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            refused[f"row {number}"] = f"a field has a wrong value: {type(error).__name__}: {error}"
            continue
        require(task.instance_id not in tasks, f"{source}: two rows have the id {task.instance_id}")
        tasks[task.instance_id] = task
    if not tasks:
        first = next(iter(refused.values()), "it has no rows")
        raise ConfigError(f"{source}: no row is a usable {dataset} task: {first}")
    if refused:
        logger.warning("%s: %d rows cannot be used, such as %s", source, len(refused), next(iter(refused.values())))
    return list(tasks.values()), refused
