"""The duration of every round: collect, train on the aggregated data, evaluate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dagger.config import RunConfig
from megatron_dagger.planning.assumptions import Assumptions
from megatron_dagger.planning.episodes import MeanEpisode, mean_sample, row_tokens, student_share, tree_tokens
from megatron_dagger.planning.gpus import Gpu
from megatron_dagger.planning.speed import RolloutSpeed, training_speed


@dataclass(frozen=True, kw_only=True)
class RoundTime:
    """One round; round 0 is SFT. Every turn is a state that the teacher labels."""

    round_index: int
    student_share: float  # of the turns
    turns: float
    train_tokens: float  # of the packed rows, all passes
    optimizer_steps: int
    train_tokens_per_s: float  # of all GPUs together
    rollout_s: float
    train_s: float
    evaluate_s: float

    @property
    def total_s(self) -> float:
        return self.rollout_s + self.train_s + self.evaluate_s


def round_times(
    config: RunConfig,
    betas: Sequence[float],
    gpu: Gpu,
    assumed: Assumptions,
    rollout: RolloutSpeed,
    episode: MeanEpisode,
) -> tuple[RoundTime, ...]:
    """Return the seconds of every round; ``betas`` are the teacher's shares of the turns, by round."""
    dagger, training = config.dagger, config.training
    shares = [student_share(dagger, beta, index, episode.turns) for index, beta in enumerate(betas)]
    tasks = [dagger.sft_tasks] + [dagger.tasks_per_round] * dagger.rounds
    episodes = [_labels_kept(config, index, n * episode.turns) * n for index, n in enumerate(tasks)]
    rounds = []
    for index, share in enumerate(shares):
        used = range(_first_round(config, index), index + 1)
        trees = sum(episodes[i] * tree_tokens(assumed, episode, shares[i]) for i in used)
        rows = sum(episodes[i] * row_tokens(training, assumed, episode, shares[i]) for i in used)
        steps = _steps(config, index, trees)
        trained = steps * training.global_batch_tokens * rows / trees
        speed = training_speed(config, gpu, assumed, mean_sample(training, assumed, episode, share))
        rounds.append(
            RoundTime(
                round_index=index,
                student_share=share,
                turns=tasks[index] * episode.turns,
                train_tokens=trained,
                optimizer_steps=steps,
                train_tokens_per_s=speed.tokens_per_s,
                rollout_s=assumed.other_s + tasks[index] * episode.turns / rollout.turns_per_s,
                train_s=assumed.other_s + trained / speed.tokens_per_s,
                evaluate_s=_evaluate_s(config, index, assumed, episode.turns / rollout.turns_per_s),
            )
        )
    return tuple(rounds)


def _labels_kept(config: RunConfig, index: int, turns: float) -> float:
    """Return the share of a round's labels, one for each of its ``turns``, that aggregation keeps."""
    limit = config.dagger.aggregation.max_labels(index)
    return 1.0 if limit is None else min(1.0, limit / turns)


def _first_round(config: RunConfig, index: int) -> int:
    """Return the oldest round whose data round ``index`` trains on."""
    aggregation = config.dagger.aggregation
    if aggregation.window == "all":
        return 0
    return index if aggregation.window == "current" else max(0, index + 1 - aggregation.last_rounds)


def _steps(config: RunConfig, index: int, tokens: float) -> int:
    """Return the steps of ``epochs`` passes over ``tokens`` of trees, however they are packed (``training.data``)."""
    training = config.training
    rows = max(1, math.ceil(tokens / training.sequence_length))
    steps = math.ceil(rows * training.epochs * training.sequence_length / training.global_batch_tokens)
    limit = training.steps_limit(index)
    return steps if limit is None else min(steps, limit)


def _evaluate_s(config: RunConfig, index: int, assumed: Assumptions, episode_s: float) -> float:
    """Return the seconds of a round's evaluation, at ``episode_s`` seconds of the engine's time per episode."""
    dagger = config.dagger
    if not dagger.evaluates(index):
        return 0.0
    return assumed.other_s + (dagger.evaluation_tasks + dagger.evaluation_train_tasks) * episode_s
