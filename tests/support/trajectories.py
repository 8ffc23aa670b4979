"""Synthetic episodes for tests: simple, realistic and random ones, and exact comparison."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from megatron_dagger.types import ActedBy, Action, StopReason, Trajectory, Turn

CLEAN = [reason for reason in StopReason if reason.is_clean]


def make_action(*tokens: int, text: str = "", logprobs: bool = False, weight_version: int = -1) -> Action:
    values = -np.arange(1, len(tokens) + 1, dtype=np.float32) / 7 if logprobs else None
    return Action(
        text=text or f"say {' '.join(map(str, tokens))}",
        tokens=np.array(tokens, np.int32),
        logprobs=values,
        weight_version=weight_version,
    )


def make_turn(
    action: list[int],
    label: list[int] | None = None,
    *,
    acted_by: ActedBy = ActedBy.STUDENT,
    prompt: tuple[int, ...] = (1, 2),
    observation: str = "ok",
) -> Turn:
    return Turn(
        observation=observation,
        prompt_tokens=np.array(prompt, np.int32),
        acted_by=acted_by,
        action=make_action(*action, logprobs=acted_by is ActedBy.STUDENT, weight_version=3),
        label=None if label is None else make_action(*label),
    )


def make_trajectory(
    task_id: str = "task-0",
    *,
    attempt: int = 0,
    round_index: int = 0,
    turns: tuple[Turn, ...] | None = None,
    stop_reason: StopReason = StopReason.SUBMITTED,
    solved: bool = True,
    details: dict[str, object] | None = None,
) -> Trajectory:
    return Trajectory(
        task_id=task_id,
        attempt=attempt,
        round_index=round_index,
        turns=(make_turn([5, 6], [5, 6]), make_turn([7], [8, 9])) if turns is None else turns,
        stop_reason=stop_reason,
        solved=solved,
        beta=0.5,
        duration_s=1.25,
        details=details or {"note": "é", "n": [1, 2.5, None]},
    )


def random_trajectory(seed: int, task_id: str, *, round_index: int = 0, turns: int = 16) -> Trajectory:
    """Return an episode of a realistic size. The same arguments give the same episode."""
    rng = np.random.default_rng([seed, round_index, *task_id.encode()])

    def tokens(low: int, high: int) -> np.ndarray:
        return rng.integers(0, 1000, int(rng.integers(low, high))).astype(np.int32)

    all_turns = []
    for depth in range(turns):
        teacher = bool(rng.random() < 0.4)
        action = Action(
            text=f"sed -n {depth},{depth + 9}p src/module.py",
            tokens=tokens(8, 40),
            logprobs=None,
            weight_version=-1 if teacher else round_index,
        )
        if not teacher:
            values = -rng.random(len(action.tokens)).astype(np.float32)
            action = Action(text=action.text, tokens=action.tokens, logprobs=values, weight_version=round_index)
        agrees = teacher or rng.random() < 0.5
        label = Action(text=action.text, tokens=action.tokens) if agrees else Action(
            text="python -m pytest -q", tokens=tokens(8, 40))  # fmt: skip
        all_turns.append(
            Turn(
                observation="def area(width, height):\n    return width * height\n" * 8,
                prompt_tokens=tokens(60, 160),
                acted_by=ActedBy.TEACHER if teacher else ActedBy.STUDENT,
                action=action,
                label=label,
            )
        )
    solved = bool(rng.random() < 0.3 + 0.15 * round_index)
    return Trajectory(
        task_id=task_id,
        attempt=0,
        round_index=round_index,
        turns=tuple(all_turns),
        stop_reason=StopReason.SUBMITTED if solved else CLEAN[int(rng.integers(len(CLEAN)))],
        solved=solved,
        beta=0.4,
        duration_s=float(rng.random() * 10),
        details={"package": "toolz", "seed": seed},
    )


def same_action(a: Action | None, b: Action | None) -> bool:
    if a is None or b is None:
        return a is b
    if (a.logprobs is None) != (b.logprobs is None):
        return False
    if a.logprobs is not None and b.logprobs is not None:
        # compared bit by bit: NaN equals NaN, and -0.0 differs from 0.0
        x, y = a.logprobs, b.logprobs
        same = x.dtype == y.dtype and x.tobytes() == y.tobytes()
    else:
        same = True
    return same and (
        a.text == b.text
        and a.weight_version == b.weight_version
        and a.tokens.dtype == b.tokens.dtype
        and np.array_equal(a.tokens, b.tokens)
    )


def same_trajectory(a: Trajectory, b: Trajectory) -> bool:
    def scalars(t: Trajectory) -> tuple[object, ...]:
        return (t.key, t.stop_reason, t.solved, t.beta, t.duration_s, t.details, len(t.turns))

    return scalars(a) == scalars(b) and all(
        x.observation == y.observation
        and x.prompt_tokens.dtype == y.prompt_tokens.dtype
        and np.array_equal(x.prompt_tokens, y.prompt_tokens)
        and x.acted_by is y.acted_by
        and same_action(x.action, y.action)
        and same_action(x.label, y.label)
        and (x.teacher_logprobs is None) == (y.teacher_logprobs is None)
        and (x.teacher_logprobs is None or np.array_equal(x.teacher_logprobs, y.teacher_logprobs))
        for x, y in zip(a.turns, b.turns, strict=True)
    )


_ids = st.lists(st.integers(0, 2**31 - 1), max_size=6).map(lambda v: np.array(v, np.int32))
_text = st.text(st.characters(codec=None), max_size=12)  # with lone surrogates


@st.composite
def actions(draw: st.DrawFn) -> Action:
    tokens = draw(_ids)
    size = len(tokens)
    logprobs = draw(st.none() | st.lists(st.floats(width=32), min_size=size, max_size=size))
    return Action(
        text=draw(_text),
        tokens=tokens,
        logprobs=None if logprobs is None else np.array(logprobs, np.float32),
        weight_version=draw(st.integers(-1, 2**40)),
    )


@st.composite
def turns(draw: st.DrawFn) -> Turn:
    action = draw(actions())
    size = len(action.tokens)
    scores = draw(st.none() | st.lists(st.floats(-50, 0, width=32), min_size=size, max_size=size)) if size else None
    return Turn(
        observation=draw(_text),
        prompt_tokens=draw(_ids),
        acted_by=draw(st.sampled_from(ActedBy)),
        action=action,
        label=draw(st.none() | actions()),
        teacher_logprobs=None if scores is None else np.array(scores, np.float32),
    )


_scalar = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | _text


def trajectories(round_index: int = 0) -> st.SearchStrategy[Trajectory]:
    return st.builds(
        Trajectory,
        task_id=st.text(max_size=8),
        attempt=st.integers(0, 3),
        round_index=st.just(round_index),
        turns=st.lists(turns(), max_size=4).map(tuple),
        stop_reason=st.sampled_from(CLEAN),
        solved=st.booleans(),
        beta=st.floats(0, 1),
        duration_s=st.floats(0, 1e6),
        details=st.dictionaries(_text, _scalar | st.lists(_scalar, max_size=3), max_size=3),
    )
