"""A resident rollout worker: it stays alive through all rounds, next to a resident trainer on GPUs of its own.

Workers and trainer (training/resident.py) meet in the run directory: the trainer trains a round once it is
sealed, and the workers use its weights once the training's manifest exists. The weights serve the next round's
collection first and their own evaluation after it, so the trainer trains while the workers evaluate.
"""

from __future__ import annotations

from megatron_dagger.dagger.context import RunContext, train_manifest
from megatron_dagger.dagger.loop import collect, evaluate, train
from megatron_dagger.dagger.worker import Worker, wait_until


async def work_rounds(context: RunContext, worker: Worker) -> None:
    """Do one worker's part of every round. The worker that seals also records the trainer's metrics."""
    rounds, deadline_s = context.config.dagger.rounds, context.config.training.deadline_s
    context.start_student()  # its engine starts while the teacher's episodes are collected and trained on
    for round_index in range(rounds + 1):
        await collect(context, round_index, worker)
        if round_index:
            await evaluate(context, round_index - 1, worker)
        manifest = train_manifest(context.run_dir, round_index)
        await wait_until(manifest.exists, deadline_s, f"the training of round {round_index}")
        if worker.seals:
            train(context, round_index)
    await evaluate(context, rounds, worker)
