"""Rounds of SWE tasks on the command line: containers, a teacher behind an endpoint, labels, official grading."""

from dataclasses import replace

import pytest

from tools.check.swe_round import make_tasks, run_rounds

ENGINES = ("swebench", "vllm", "megatron.core", "transformers")


@pytest.mark.slow
def test_rounds_of_mutated_packages_from_containers_to_the_official_grading(daemon, cache, tmp_path, monkeypatch):
    for engine in ENGINES:
        pytest.importorskip(engine)
    monkeypatch.setenv("MEGATRON_DAGGER_CACHE", str(cache))
    tasks = make_tasks("stdlib", 8, 3)  # those of the tiny run
    tasks = replace(tasks, train=tasks.train[:4], heldout=tasks.heldout[:2])
    report = run_rounds(tmp_path, tasks, daemon.url, ["training.max_steps=6"], repeats=1)
    assert report["valid"] == 4
    by_teacher, mixed = report["rounds"]
    assert (by_teacher["episodes"], by_teacher["solved"], by_teacher["teacher_turn_share"]) == (2, 2, 1.0)
    assert by_teacher["last_loss"] < by_teacher["first_loss"]
    assert mixed["labelled_turns"] == mixed["turns"] > 0
    assert 0 < mixed["teacher_turn_share"] < 1
    assert report["weight_version"] == 1
    assert report["judge_agrees"] == mixed["episodes"] == 2
    assert report["collected_resolved"] == mixed["solved"]
    assert report["heldout"]["tasks"] == 2
    assert (report["heldout_trained_on"], report["leaked_containers"]) == (0, 0)
