"""Measure what shared prefixes save on recorded agent runs, against one training sample per labelled state.

Three variants do the forward and backward passes of the same small Qwen3 model in fp32, each in its own process:

- shared_prefix: an episode is one tree, and its labels share their prefix;
- per_state: every label is a separate sample: all tokens before it, then the label as the only target. The same
  labels after the same prefixes, packed by the same code, without padding;
- linear: the executed tokens alone, one causal sequence for each episode, every executed action a target. This is
  what as many tokens cost without branches.

A variant goes through its rows in random order. Its time for all labels is the mean seconds of a row times its number
of rows. The saving grows with an episode's turns, so for the timing runs are cut at ``--longest`` tokens, between
turns. The fill is measured on a round of 512 whole episodes (each run 8 times, with different branches), which the
packer cuts at ``--sequence-length``. Gradients of shared_prefix and per_state are compared first.

    .venv/bin/python -m tools.bench.packing --trajectories FILE      (see tools/bench/recorded_episodes.py for FILE)

The last line is ``RESULT {json}``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import numpy as np

from megatron_dagger.config import TrainingConfig
from megatron_dagger.training.data import batches, packing
from megatron_dagger.training.data.episode_file import save_episodes
from megatron_dagger.training.data.flops import row_flops
from megatron_dagger.types import LabelledEpisode, StateLabel
from tools.bench import recorded_episodes
from tools.bench.packing_processes import (
    DEADLINE_S,
    GRADIENT_LONGEST,
    MODEL,
    Cost,
    compare_gradients,
    per_state,
    serve,
)
from tools.bench.processes import BenchProcess, bench_process

VARIANTS = ("shared_prefix", "per_state", "linear")
GRADIENT_EPISODES = 4
REPEATS = 8  # of every run in a round
OTHER_LENGTHS = (32768, 16384, 2048)  # row lengths whose fill is reported too
ROW_MULTIPLE = TrainingConfig().row_multiple


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", type=Path, required=True, help="recorded runs, gzipped JSON lines")
    parser.add_argument(
        "--sequence-length", type=int, default=65536, help="tokens of a packed row (default %(default)s)"
    )
    parser.add_argument(
        "--longest", type=int, default=16384, help="tokens at which timed runs are cut (default %(default)s)"
    )
    parser.add_argument("--turns", type=int, default=3, help="measurements of each variant (default %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=15.0, help="least length of a measurement (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of branches and row orders (default %(default)s)")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=[*VARIANTS, "gradients"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker == "gradients":
        compare_gradients(arguments)
    elif arguments.worker:
        serve(arguments)
    else:
        try:
            _bench(arguments)
        except FileNotFoundError as error:
            parser.error(str(error))
    return 0


def _bench(arguments: argparse.Namespace) -> None:
    runs = recorded_episodes.read(arguments.trajectories, MODEL.vocab_size)
    whole, _ = recorded_episodes.make(runs, seed=arguments.seed)
    round_episodes = [e for i in range(REPEATS) for e in recorded_episodes.make(runs, seed=arguments.seed + i)[0]]
    labelled, executed = recorded_episodes.make(runs, seed=arguments.seed, longest=arguments.longest)
    variants = dict(zip(VARIANTS, (labelled, per_state(labelled), executed), strict=True))
    data = {name: packing.pack(episodes, arguments.sequence_length) for name, episodes in variants.items()}
    filled = packing.pack(round_episodes, arguments.sequence_length)
    _describe(arguments, whole, labelled, filled)
    with tempfile.TemporaryDirectory(prefix="bench-packing-") as folder:
        arguments.folder = Path(folder)
        for name, episodes in variants.items():
            save_episodes(arguments.folder / f"{name}.npz", episodes)
        short, _ = recorded_episodes.make(runs, seed=arguments.seed, longest=min(arguments.longest, GRADIENT_LONGEST))
        save_episodes(arguments.folder / "gradients.npz", short[:GRADIENT_EPISODES])
        with _process(arguments, "gradients") as comparison:
            difference = json.loads(comparison.answer("DIFFERENCE"))
        times = _take_turns(arguments)
    print(
        f"{'variant':<15}{'samples':>8}{'rows':>6}{'fill':>7}{'tokens':>12}"
        f"{'s/row':>9}{'s for all':>11}{'us/token':>10}"
    )
    for name, packed in data.items():
        row, token = times[name].seconds / times[name].rows, times[name].seconds / times[name].tokens
        print(
            f"{name:<15}{len(packed.samples):>8}{len(packed.rows):>6}{packed.fill(ROW_MULTIPLE):>7.3f}{packed.tokens:>12,}"
            f"{row:>9.2f}{row * len(packed.rows):>11.0f}{token * 1e6:>10.1f}"
        )

    def ratio(variant: str, baseline: str, unit: str, per: str) -> float:
        """Return the ``unit`` per ``per`` (fields of Cost) of ``variant``, divided by that of ``baseline``."""
        a, b = ((getattr(times[name], unit) / getattr(times[name], per)) for name in (variant, baseline))
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
            length: round(packing.pack(round_episodes, length).fill(ROW_MULTIPLE), 4) for length in OTHER_LENGTHS
        },
        "slowest_rank": round(_slowest_rank(filled), 4),
        "fill_timed": round(data["shared_prefix"].fill(ROW_MULTIPLE), 4),
        "tokens_vs_per_state_whole": round(_tokens_per_state(round_episodes, arguments) / filled.tokens, 2),
        "grad_max_rel_diff": max(difference.values()),
        "data_wait_share": round(times["shared_prefix"].waiting / times["shared_prefix"].seconds, 5),
        "too_long_share": round(filled.too_long / sum(len(episode.labels) for episode in round_episodes), 4),
        "longest": arguments.longest,
        "sequence_length": arguments.sequence_length,
        "rows_timed": {name: times[name].rows for name in VARIANTS},
    }
    print("RESULT " + json.dumps(result))


def _slowest_rank(data: packing.PackedDataset) -> float:
    """Return the FLOPs of the busiest of 4 data-parallel ranks over the ranks' mean; mean over steps of 16 rows."""
    ranks, rows_per_step = 4, 16
    costs = row_flops(data, MODEL)
    order = np.random.default_rng(1).permutation(len(data.rows))
    steps = order[: len(order) // rows_per_step * rows_per_step].reshape(-1, rows_per_step)
    loads = [[costs[share].sum() for share in batches.distribute_rows(rows, costs, ranks)] for rows in steps]
    return float(np.mean([max(load) / np.mean(load) for load in loads]))


def _tokens_per_state(episodes: Sequence[LabelledEpisode], arguments: argparse.Namespace) -> int:
    """Return the number of row tokens of the per_state variant's samples that fit a row."""
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
        f"{len(whole)} runs, {len(labels(whole))} labels; tokens per run (byte-level BPE of {MODEL.vocab_size} "
        f"entries, trained on the runs): median {np.median(lengths):,.0f}, {lengths.min():,} to {lengths.max():,}\n"
        f"timed: {cut} runs cut at {arguments.longest} tokens, {len(labels(labelled))} labels remain\n"
        f"a round: {REPEATS * len(whole)} episodes in {len(filled.rows)} rows of {arguments.sequence_length}, "
        f"{filled.too_long} labels too long"
    )


def _take_turns(arguments: argparse.Namespace) -> dict[str, Cost]:
    """Return the total cost of each variant over all its measurements."""
    costs = dict.fromkeys(VARIANTS, Cost())
    with ExitStack() as stack:
        processes = {name: stack.enter_context(_process(arguments, name)) for name in VARIANTS}
        for process in processes.values():
            process.answer("READY")
        for _ in range(arguments.turns):
            for name, process in processes.items():
                costs[name] += Cost(*json.loads(process.ask("COST")))
    return costs


def _process(arguments: argparse.Namespace, worker: str) -> AbstractContextManager[BenchProcess]:
    argv = [*sys.argv[1:], "--folder", str(arguments.folder), "--worker", worker]
    return bench_process("tools.bench.packing", argv, DEADLINE_S, {"OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    sys.exit(main())
