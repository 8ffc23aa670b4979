"""A rollout worker that lives through all rounds, beside others and a trainer that does (training/resident.py).

They meet in the run directory: a round is trained once it is sealed, and sampled from once its training's
manifest is there. The weights of a round serve the next round's collection first and then their own
evaluation, so that the trainer trains while the workers evaluate.
"""

from __future__ import annotations

from megatron_dagger.dagger.context import RunContext, train_manifest
from megatron_dagger.dagger.loop import collect, evaluate, train
from megatron_dagger.dagger.worker import Worker, until


async def work_rounds(context: RunContext, worker: Worker) -> None:
    """One worker's part in every round; the one that seals also records what the trainer did."""
    rounds, deadline_s = context.config.dagger.rounds, context.config.training.deadline_s
    context.student()  # its engine starts while the teacher's episodes are collected and trained on
    for round_index in range(rounds + 1):
        await collect(context, round_index, worker)
        if round_index:
            await evaluate(context, round_index - 1, worker)
        manifest = train_manifest(context.run_dir, round_index)
        await until(manifest.exists, deadline_s, f"the training of round {round_index}")
        if worker.seals:
            train(context, round_index)
    await evaluate(context, rounds, worker)
