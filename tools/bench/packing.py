"""What sharing prefixes saves on real agent runs, next to every labelled state as a sample of its own.

The episodes are real runs (see ``real_episodes``). Three sides do the forward and backward passes of the
same small Qwen3 model in fp32, each in a process of its own, and take turns, so that whatever else the
machine does slows all of them down:

- shared_prefix: an episode is one tree; its labels share their prefix;
- per_state: every label, executed or not, is a sample: all tokens before it, then the label, nothing
  else a target. The same labels after the same prefixes, packed by the same code, without padding;
- linear: the executed tokens alone, one plain causal sequence an episode, every executed action a
  target: what as many tokens cost without branches.

A side goes through its own rows in a random order; the mean seconds of a row, times the side's rows, are
the seconds that it takes for all labels. What sharing saves grows with the turns of an episode, so runs
are cut at ``--longest`` tokens for the timing (before a turn, never in a label). The fill is that of a
round of 512 whole episodes (each run 8 times, other turns executed as recorded), which the packer cuts
at ``--sequence-length``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from megatron_dagger.config import ModelConfig, TrainingConfig  # noqa: E402
from megatron_dagger.training.data import (
    batches,
    packing,
)
from megatron_dagger.training.data.episode_file import load_episodes, save_episodes  # noqa: E402
from megatron_dagger.training.data.flops import row_flops  # noqa: E402
from megatron_dagger.types import LabelledEpisode, StateLabel  # noqa: E402
from tools.bench import recorded_episodes as real_episodes  # noqa: E402
from tools.bench.processes import Side, side  # noqa: E402

SIDES = ("shared_prefix", "per_state", "linear")
MODEL = ModelConfig(num_layers=2, vocab_size=4096, max_position_embeddings=131_072)
GRADIENT_EPISODES, GRADIENT_LONGEST = 4, 4096
REPEATS = 8  # of the runs in a round
OTHER_LENGTHS = (32768, 16384, 2048)  # of rows, whose fill is told too
ROW_MULTIPLE = TrainingConfig().row_multiple
DEADLINE_S = 1800.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", type=Path, default=real_episodes.TRAJECTORIES, help="default %(default)s")
    parser.add_argument("--sequence-length", type=int, default=65536, help="of a packed row (default %(default)s)")
    parser.add_argument("--longest", type=int, default=16384, help="tokens of a timed episode (default %(default)s)")
    parser.add_argument("--turns", type=int, default=3, help="times that each side is measured (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=15.0, help="of one measurement, at least (default 15)")
    parser.add_argument("--seed", type=int, default=1, help="of branches and orders (default %(default)s)")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=[*SIDES, "gradients"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker == "gradients":
        _compare_gradients(arguments)
    elif arguments.worker:
        _serve(arguments)
    else:
        try:
            _bench(arguments)
        except FileNotFoundError as error:
            parser.error(str(error))
    return 0


def _bench(arguments: argparse.Namespace) -> None:
    runs = real_episodes.read(arguments.trajectories, MODEL.vocab_size)
    whole, _ = real_episodes.make(runs, seed=arguments.seed)
    a_round = [e for i in range(REPEATS) for e in real_episodes.make(runs, seed=arguments.seed + i)[0]]
    labelled, executed = real_episodes.make(runs, seed=arguments.seed, longest=arguments.longest)
    sides = dict(zip(SIDES, (labelled, _per_state(labelled), executed), strict=True))
    data = {side: packing.pack(episodes, arguments.sequence_length) for side, episodes in sides.items()}
    filled = packing.pack(a_round, arguments.sequence_length)
    _describe(arguments, whole, labelled, filled)
    with tempfile.TemporaryDirectory(prefix="bench_packing-") as name:
        arguments.folder = Path(name)
        for side, episodes in sides.items():
            save_episodes(arguments.folder / f"{side}.npz", episodes)
        short, _ = real_episodes.make(runs, seed=arguments.seed, longest=min(arguments.longest, GRADIENT_LONGEST))
        save_episodes(arguments.folder / "gradients.npz", short[:GRADIENT_EPISODES])
        with _side(arguments, "gradients") as comparison:
            difference = json.loads(comparison.answer("DIFFERENCE"))
        times = _take_turns(arguments)
    print(
        f"{'side':<15}{'samples':>8}{'rows':>6}{'fill':>7}{'tokens':>12}{'s/row':>9}{'s for all':>11}{'us/token':>10}"
    )
    for side, packed in data.items():
        row, token = times[side].seconds / times[side].rows, times[side].seconds / times[side].tokens
        print(
            f"{side:<15}{len(packed.samples):>8}{len(packed.rows):>6}{packed.fill(ROW_MULTIPLE):>7.3f}{packed.tokens:>12,}"
            f"{row:>9.2f}{row * len(packed.rows):>11.0f}{token * 1e6:>10.1f}"
        )

    def ratio(side: str, other: str, unit: str, per: str) -> float:
        """The ``unit`` that ``side`` took for each of ``per``, to those of ``other``."""
        a, b = ((getattr(times[name], unit) / getattr(times[name], per)) for name in (side, other))
        return float(a / b)

    more_rows = len(data["per_state"].rows) / len(data["shared_prefix"].rows)
    result = {
        "tokens_vs_per_state": round(data["per_state"].tokens / data["shared_prefix"].tokens, 2),
        "speedup_vs_per_state": round(more_rows * ratio("per_state", "shared_prefix", "seconds", "rows"), 2),
        "speedup_vs_per_state_per_cpu_s": round(more_rows * ratio("per_state", "shared_prefix", "cpu", "rows"), 2),
        "overhead_vs_linear": round(ratio("shared_prefix", "linear", "seconds", "tokens"), 3),
        "overhead_vs_linear_per_cpu_s": round(ratio("shared_prefix", "linear", "cpu", "tokens"), 3),
        "fill": round(filled.fill(ROW_MULTIPLE), 4),
        "fill_whole_rows": round(filled.bin_fill, 4),
        "fill_by_length": {
            length: round(packing.pack(a_round, length).fill(ROW_MULTIPLE), 4) for length in OTHER_LENGTHS
        },
        "slowest_rank": round(_slowest_rank(filled), 4),
        "fill_timed": round(data["shared_prefix"].fill(ROW_MULTIPLE), 4),
        "tokens_vs_per_state_whole": round(_tokens_per_state(a_round, arguments) / filled.tokens, 2),
        "grad_max_rel_diff": max(difference.values()),
        "data_wait_share": round(times["shared_prefix"].waiting / times["shared_prefix"].seconds, 5),
        "too_long_share": round(filled.too_long / sum(len(episode.labels) for episode in a_round), 4),
        "longest": arguments.longest,
        "sequence_length": arguments.sequence_length,
        "rows_timed": {side: times[side].rows for side in SIDES},
    }
    print("RESULT " + json.dumps(result))


def _slowest_rank(data: packing.PackedDataset) -> float:
    """What the costliest of 4 data-parallel ranks computes in a step of 16 rows, over their mean; mean over steps."""
    ranks, rows_per_step = 4, 16
    costs = row_flops(data, MODEL)
    order = np.random.default_rng(1).permutation(len(data.rows))
    steps = order[: len(order) // rows_per_step * rows_per_step].reshape(-1, rows_per_step)
    loads = [[costs[share].sum() for share in batches.share_out(rows, costs, ranks)] for rows in steps]
    return float(np.mean([max(load) / np.mean(load) for load in loads]))


def _per_state(episodes: Sequence[LabelledEpisode]) -> list[LabelledEpisode]:
    """Every label as an episode that ends with it."""
    return [
        LabelledEpisode(tokens=np.concatenate([episode.tokens[: label.position], label.tokens]), labels=(label,))
        for episode in episodes
        for label in episode.labels
    ]


def _tokens_per_state(episodes: Sequence[LabelledEpisode], arguments: argparse.Namespace) -> int:
    """The row tokens of ``_per_state`` samples, of those that fit."""
    lengths = [label.position - 1 + len(label.tokens) for episode in episodes for label in episode.labels]
    return sum(length for length in lengths if length <= arguments.sequence_length)


def _describe(
    arguments: argparse.Namespace,
    whole: Sequence[LabelledEpisode],
    labelled: Sequence[LabelledEpisode],
    filled: packing.PackedDataset,
) -> None:
    def labels(episodes: Sequence[LabelledEpisode]) -> list[StateLabel]:
        return [label for episode in episodes for label in episode.labels]

    lengths = np.array([len(episode.tokens) for episode in whole])
    cut = np.count_nonzero(lengths > arguments.longest)
    print(
        f"{len(whole)} runs, {len(labels(whole))} labels; tokens of a run (byte-level BPE, {MODEL.vocab_size} "
        f"entries, trained on them): median {np.median(lengths):,.0f}, {lengths.min():,} to {lengths.max():,}\n"
        f"timed: {cut} runs cut at {arguments.longest} tokens, {len(labels(labelled))} labels left\n"
        f"a round: {REPEATS * len(whole)} episodes in {len(filled.rows)} rows of {arguments.sequence_length}, "
        f"{filled.too_long} labels too long"
    )


# ---- the sides, each a process that works while it is told to


@contextmanager
def _engine(sequence_length: int) -> Iterator[Any]:
    from megatron_dagger.training import compat
    from megatron_dagger.training.engine import MegatronEngine
    from megatron_dagger.training.ranks import process_groups as parallel

    compat.quiet()
    training = TrainingConfig(
        sequence_length=sequence_length,
        global_batch_tokens=sequence_length,
        packing="shared_prefix",
        deadline_s=DEADLINE_S,
    )
    with parallel.process_groups(training.parallel, seed=1, deadline_s=DEADLINE_S, threads=1) as device:
        yield MegatronEngine(MODEL, training, seed=1, device=device)


def _serve(arguments: argparse.Namespace) -> None:
    """For each line of stdin do the passes of a few rows, and answer with what they took."""
    from megatron_dagger.training.loss import micro_batch

    data = packing.pack(load_episodes(arguments.folder / f"{arguments.worker}.npz"), arguments.sequence_length)
    rng = np.random.default_rng(arguments.seed)
    order = itertools.chain.from_iterable(rng.permutation(len(data.rows)) for _ in itertools.count())
    with _engine(arguments.sequence_length) as engine:
        engine.forward_backward([data.row(batches.EMPTY_ROW)], normaliser=1.0)
        print("READY", flush=True)
        for _ in sys.stdin:
            taken = Taken()
            while taken.seconds < arguments.seconds:
                index = int(next(order))
                began, cpu = time.perf_counter(), time.process_time()
                (length,) = batches.row_lengths(data.row_tokens[[index]], engine.training)
                row = data.row(index, length)
                built = time.perf_counter()
                engine.forward_backward([row], normaliser=float(data.row_weights[index]))
                ended, cpu = time.perf_counter(), time.process_time() - cpu
                micro_batch(row, 1.0, engine.device, select=engine.select)  # as within the pass, to time it alone
                waiting = built - began + time.perf_counter() - ended
                taken += Taken(1, int(data.row_tokens[index]), ended - began, cpu, waiting)
            print("TAKEN " + json.dumps(astuple(taken)), flush=True)


def _compare_gradients(arguments: argparse.Namespace) -> None:
    """The largest difference of loss and gradient between the two ways, of the largest gradient."""
    from megatron_dagger.training import param_names as layout
    from megatron_dagger.training.model import bare

    episodes = load_episodes(arguments.folder / "gradients.npz")
    size = 2 * GRADIENT_LONGEST
    results = []
    with _engine(size) as engine:
        for made in (_per_state(episodes), episodes):
            data = packing.pack(made, size)
            rows = [data.row(index) for index in range(len(data.rows))]
            loss = engine.forward_backward(rows, normaliser=float(data.row_weights.sum()))
            parameters = [parameter for _, parameter in layout.global_parameters(bare(engine.chunks[0]))]
            results.append((loss, [parameter.main_grad.clone() for parameter in parameters]))
    (loss, gradients), (shared_loss, shared_gradients) = results
    largest = max(float(gradient.abs().max()) for gradient in gradients)
    apart = max(float((a - b).abs().max()) for a, b in zip(gradients, shared_gradients, strict=True))
    print("DIFFERENCE " + json.dumps({"loss": abs(shared_loss - loss) / loss, "gradient": apart / largest}), flush=True)


# ---- measuring


@dataclass(frozen=True)
class Taken:
    """What some rows took: seconds, processor seconds, and the seconds of building the rows."""

    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0
    cpu: float = 0.0
    waiting: float = 0.0

    def __add__(self, other: Taken) -> Taken:
        return Taken(*map(sum, zip(astuple(self), astuple(other), strict=True)))


def _take_turns(arguments: argparse.Namespace) -> dict[str, Taken]:
    """What each side took, all its turns together."""
    taken = dict.fromkeys(SIDES, Taken())
    with ExitStack() as stack:
        running = {name: stack.enter_context(_side(arguments, name)) for name in SIDES}
        for side in running.values():
            side.answer("READY")
        for _ in range(arguments.turns):
            for name, side in running.items():
                taken[name] += Taken(*json.loads(side.go("TAKEN")))
    return taken


def _side(arguments: argparse.Namespace, worker: str) -> AbstractContextManager[Side]:
    given = [*sys.argv[1:], "--folder", str(arguments.folder), "--worker", worker]
    return side(given, DEADLINE_S, {"OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    sys.exit(main())
