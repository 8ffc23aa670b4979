"""The assumed mean episode, and the tokens that its labels take in packed rows."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dagger.config import DaggerConfig, RunConfig, TrainingConfig
from megatron_dagger.planning.assumptions import Assumptions


@dataclass(frozen=True, kw_only=True)
class MeanEpisode:
    """The mean episode."""

    turns: float
    tokens: float  # of the whole conversation at its end
    reply: float  # tokens of a turn that a policy writes

    @classmethod
    def of(cls, config: RunConfig, assumed: Assumptions) -> MeanEpisode:
        """Return the mean episode under the limits of ``config``."""
        limits = config.rollout.limits
        turns, tokens = limits.max_turns * assumed.turns_share, limits.max_tokens * assumed.tokens_share
        reply = min(tokens * assumed.reply_share / turns, config.rollout.sampling.max_tokens)
        return cls(turns=turns, tokens=tokens, reply=reply)

    def branches(self, student_share: float, assumed: Assumptions) -> float:
        """Return the number of labels that differ from the executed action: their tokens are not on the trunk."""
        return self.turns * student_share * (1 - assumed.agreement)


def student_share(dagger: DaggerConfig, beta: float, round_index: int, turns: float) -> float:
    """Return the student's share of a round's turns; round 0 is the teacher's.

    1 - beta with mixing per turn. With mixing by prefix the student acts in the first k ~ Uniform{0..T} turns, which
    gives E[min(k, turns)] / turns. The teacher's turns after errors (``dagger.takeover_turns``) are not counted.
    """
    if round_index == 0:
        return 0.0
    if dagger.mixing == "per_turn":
        return 1.0 - beta
    longest = min(dagger.prefix_turns_per_round * round_index, dagger.prefix_turns_limit)
    return sum(min(k, turns) for k in range(longest + 1)) / (longest + 1) / turns


def tree_tokens(assumed: Assumptions, episode: MeanEpisode, share: float) -> float:
    """Return the tokens of one episode's tree: its trunk, and each label that differs from it."""
    return episode.tokens + episode.branches(share, assumed) * episode.reply


def row_tokens(training: TrainingConfig, assumed: Assumptions, episode: MeanEpisode, share: float) -> float:
    """Return the tokens that one episode takes in packed rows: those of its tree.

    With ``training.packing=separate`` each branch has a copy of its prefix, which is half the episode on average.
    """
    prefix = 0.0 if training.packing == "shared_prefix" else episode.tokens / 2
    return tree_tokens(assumed, episode, share) + episode.branches(share, assumed) * prefix


def mean_sample(training: TrainingConfig, assumed: Assumptions, episode: MeanEpisode, share: float) -> float:
    """Return the mean length of the sample around a token, averaged over tokens: sum of squares over sum.

    A prefix ends anywhere in the episode with the same probability, so its mean square is 4/3 of its squared mean.
    """
    if training.packing == "shared_prefix":
        return episode.tokens
    trunk, alone = episode.tokens, episode.tokens / 2 + episode.reply
    branches = episode.branches(share, assumed)
    return (trunk**2 + branches * 4 / 3 * alone**2) / (trunk + branches * alone)
