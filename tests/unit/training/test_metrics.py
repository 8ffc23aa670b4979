"""metrics.jsonl of a round that was killed and resumed."""

import pytest

from megatron_dagger.training.metrics import StepMetrics, read_steps

LINE = {"grad_norm": 1.0, "lr": 1e-3, "label_tokens": 3, "tokens": 10, "places": 16, "step_s": 0.5}


def test_a_resumed_file_repeats_and_loses_nothing(tmp_path):
    first = StepMetrics(tmp_path, 4, finished=0)
    for step in (1, 2, 3):
        first.add(step=step, loss=float(step), **LINE)
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    resumed = StepMetrics(tmp_path, 4, finished=2)
    for step in (3, 4):
        resumed.add(step=step, loss=10.0 * step, **LINE)
    resumed.close()
    assert [(x["step"], x["loss"]) for x in read_steps(tmp_path / "metrics.jsonl")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
        (4, 40.0),
    ]
    summary = resumed.summary()
    assert (summary["steps"], summary["first_loss"], summary["last_loss"]) == (4, 1.0, 40.0)
    assert (summary["tokens"], summary["tokens_per_s"], summary["fill"]) == (40, 20.0, 10 / 16)
    assert summary["mean_loss_last_10"] == pytest.approx(18.25)
