"""Where stages run: NeMo-Run's executors with the settings that our stages need.

To add an executor, write a function like ``slurm`` with the same two decorators in a module of yours and name that
module as an entry point of the group ``nemo_run.cli``: ``run.executor=NAME`` then finds it. If it can run a stage on
several nodes without a field ``nodes`` or ``num_nodes``, add its type to ``NODE_SETTERS``.
"""

from collections.abc import Callable

import nemo_run as run  # reads annotations as objects: this file must not postpone them
from nemo_run.cli.api import EXECUTOR_CLASSES, list_factories

from megatron_dagger.signals import STOPPED

PLANNED = "planned"  # as an executor's time limit: that of the stage
# Megatron's ranks meet on the first node, by its name: the address in NeMo-Run's script may be 127.0.1.1, or several.
# The port depends on the job, so two jobs can share a node.
_RENDEZVOUS = "export MASTER_ADDR=$head_node MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))"
# NeMo-Run's script counts every restart as a retry. Here only failures count, in a file beside the job's log. A job
# that stopped for its time limit or a preemption always goes on: a task's exit code is 75, and srun kills the others. A
# job that scancel ended is no longer running.
_STOPPED = f"'task.*Exited with exit code [{STOPPED // 10}]{STOPPED % 10}$'"  # not found in the script that bash prints
_REQUEUE = f"""\
retries=$TORCHX_MAX_RETRIES TORCHX_MAX_RETRIES=0
log=$(scontrol show job -o "$SLURM_JOB_ID" | grep -o 'StdOut=[^ ]*' | cut -d= -f2)
failures=$log.failures first_line=$(($(wc -l < "$log") + 1))
stopped() {{
    [ $1 = {STOPPED} ] || tail -n +$first_line "$log" | grep -q {_STOPPED}
}}
requeue() {{
    set +e
    [ $1 != 0 ] && [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T | head -n1)" = RUNNING ] || return 0
    if ! stopped $1; then
        echo "exit code $1" >> "$failures"
        [ $(wc -l < "$failures") -le $retries ] || return 0
    fi
    scontrol requeue "$SLURM_JOB_ID"
}}
trap 'requeue $?' EXIT"""


@run.cli.factory
@run.autoconvert
def local() -> run.LocalExecutor:
    """Run the stages on this machine, one after the other."""
    return run.LocalExecutor()


@run.cli.factory
@run.autoconvert
def slurm() -> run.SlurmExecutor:
    """Submit with sbatch on this login node; nodes and login node share the file system of checkout and run directory.

    Set what your cluster requires: ``run.executor.gpus_per_node=8``, and ``account``, ``partition``, ``time``, ``mem``,
    ``container_image``, ``container_mounts`` in the same way. A job that was preempted or ran out of time is requeued
    and resumes, as often as needed; one that failed, up to ``retries`` times. Without a ``time`` each job asks for the
    hours that ``megatron-dagger plan`` expects, twice over.
    """
    return run.SlurmExecutor(
        account=None,
        job_name_prefix="dagger-",
        time=PLANNED,
        signal="TERM@120",  # seconds before the time limit: the stage ends with exit code 75, and the job is requeued
        retries=3,
        tunnel=run.LocalTunnel(job_dir=""),
        packager=run.Packager(),
        exclusive=True,  # else a stage has one processor on a partition that jobs share
        srun_args=["--export=ALL", "--wait=0"],  # a stage ends when its slowest task has ended
        additional_parameters={"kill_on_invalid_dep": "yes"},
    )


def for_stage(executor: run.Executor, nodes: int, hours: int) -> run.Executor:
    """Return a copy of ``executor`` for a stage on ``nodes`` nodes, with one process on each.

    ``hours`` is the time limit on SLURM if the executor has none of its own.

    Raises ValueError if the executor has one node only and the stage needs more.
    """
    copy = executor.clone()
    types = type(copy).__mro__
    set_nodes = next((NODE_SETTERS[cls] for cls in types if cls in NODE_SETTERS), _set_attribute)
    set_nodes(copy, nodes)
    if getattr(copy, "time", None) == PLANNED:
        copy.time = f"{hours}:00:00"
    return copy


def executor_names() -> list[str]:
    """Return the names that ``run.executor`` can have: ours, and those that entry points registered."""
    return sorted({factory.__name__ for cls in EXECUTOR_CLASSES for factory in list_factories(cls)})


def _on_slurm(executor: run.SlurmExecutor, nodes: int) -> None:
    executor.nodes, executor.ntasks_per_node = nodes, 1
    ours = [_REQUEUE, *([_RENDEZVOUS] if nodes > 1 else [])]
    executor.setup_lines = "\n".join(filter(None, [executor.setup_lines, *ours]))


def _on_one_node(executor: run.Executor, nodes: int) -> None:
    if nodes > 1:
        raise ValueError(
            f"a stage on {nodes} nodes: {type(executor).__name__} has one; use run.executor=slurm, or set "
            "training.parallel.nodes and workers to 1"
        )


def _set_attribute(executor: run.Executor, nodes: int) -> None:
    """Set the number of nodes, whose ranks find each other by the variables that the executor's launcher sets."""
    name = next((name for name in ("nodes", "num_nodes") if hasattr(executor, name)), None)
    if name is None:
        _on_one_node(executor, nodes)
    else:
        setattr(executor, name, nodes)


# Functions that set a stage's number of nodes, by type of executor; other types have a field for it or one node.
NODE_SETTERS: dict[type, Callable[..., None]] = {
    run.SlurmExecutor: _on_slurm,
    run.LocalExecutor: _on_one_node,  # it ignores its field ``nodes``
}
