"""Where stages run: NeMo-Run's executors with the settings that our stages need."""

import nemo_run as run  # reads annotations as objects: this file must not postpone them

# Megatron's ranks meet on the first node; the port depends on the job, so that two jobs can share a node.
_RENDEZVOUS = "export MASTER_ADDR=$head_node_ip MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))"


@run.cli.factory
@run.autoconvert
def local() -> run.LocalExecutor:
    """This machine, one stage after the other."""
    return run.LocalExecutor()


@run.cli.factory
@run.autoconvert
def slurm() -> run.SlurmExecutor:
    """sbatch on this login node; the checkout and the run directory lie on a file system that the nodes share.

    Set what your cluster wants: ``run.executor.gpus_per_node=8``, and ``account``, ``partition``, ``time``, ``mem``,
    ``container_image``, ``container_mounts`` likewise. A job that was preempted, failed or ran out of time is
    queued again up to ``retries`` times and goes on where it was.
    """
    return run.SlurmExecutor(
        account=None,
        job_name_prefix="dagger-",
        time="04:00:00",
        signal="TERM@120",  # seconds before the time is up: the job fails, and so is queued again
        retries=3,
        tunnel=run.LocalTunnel(job_dir=""),
        packager=run.Packager(),
        srun_args=["--export=ALL"],
        additional_parameters={"kill_on_invalid_dep": "yes"},
    )


def for_stage(executor: run.Executor, nodes: int) -> run.Executor:
    """A copy of ``executor`` for a stage on so many nodes, with one process on each."""
    own = executor.clone()
    if isinstance(own, run.SlurmExecutor):
        own.nodes, own.ntasks_per_node = nodes, 1
        if nodes > 1:
            own.setup_lines = "\n".join(filter(None, [own.setup_lines, _RENDEZVOUS]))
    elif nodes > 1:
        raise ValueError(
            f"a stage on {nodes} nodes: {type(executor).__name__} has one; use run.executor=slurm, or set "
            "training.parallel.nodes and workers to 1"
        )
    return own
