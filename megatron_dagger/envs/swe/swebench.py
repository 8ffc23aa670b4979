"""SWE-bench's own rows (full, Lite, Verified, Multilingual), in the schema of swebench 5.x.

A row of the older schema has no eval script and no log parser; swebench 5.x no longer has the tables that they were
derived from. Such a row is refused: scores from a script that only resembles the official one would not be SWE-bench's.
"""

from __future__ import annotations

from megatron_dagger.config.base import ConfigError
from megatron_dagger.envs.swe.assets import assets_of
from megatron_dagger.envs.swe.rows import Row, ids_of, require_fields, tests_to_pass
from megatron_dagger.envs.swe.task import SweTask

FIELDS_SINCE_5 = ("eval_script", "log_parser", "eval_type")


def swebench_task(row: Row) -> SweTask:
    """Return a row's task. Raises ConfigError with the reason if the row cannot be used."""
    require_fields(row, ("instance_id", "repo", "base_commit", "problem_statement"), "it is not a row of SWE-bench")
    absent = [name for name in FIELDS_SINCE_5 if not row.get(name)]
    if absent:
        raise ConfigError(
            f"{row['instance_id']} has SWE-bench's older schema, without {', '.join(absent)}: use the data set's "
            "current release, such as SWE-bench/SWE-bench_Verified"
        )
    return SweTask(
        instance_id=row["instance_id"],
        repo=row["repo"],
        base_commit=row["base_commit"],
        image=row.get("image") or swebench_image(row["instance_id"]),
        problem_statement=row["problem_statement"],
        eval_script=row["eval_script"],
        log_parser=row["log_parser"],
        eval_type=row["eval_type"],
        version=row.get("version") or "",
        patch=row.get("patch") or "",
        fail_to_pass=tests_to_pass(row),
        pass_to_pass=ids_of(row.get("PASS_TO_PASS")),
        assets=assets_of(row.get("image_assets")),
    )


def swebench_image(instance_id: str) -> str:
    """Return the image that swebench publishes for an instance; image names have no two underscores in a row."""
    return f"swebench/sweb.eval.x86_64.{instance_id.replace('__', '_1776_')}:latest".lower()
