"""The report's data and page, without a browser (the page itself: tests/integration/test_report_page.py)."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dagger.observability import report_data
from megatron_dagger.observability.report import render, write_report
from megatron_dagger.observability.report_data import choose_evenly, clip, describe, gather
from megatron_dagger.observability.rundir import NoRunError, read_run
from megatron_dagger.store.aggregated import DataStore
from tests.support.run_directory import HOSTILE, make_run
from tests.support.trajectories import make_trajectory, make_turn


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "one", rounds=2, tasks=7, heldout=3)


def embedded(page: str) -> dict:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert match
    return json.loads(match[1])


def test_the_page_is_self_contained(run: Path) -> None:
    path = write_report(
        run, data=DataStore.open(run / "data.zarr"), evaluations=DataStore.open(run / "evaluations.zarr")
    )
    page = path.read_text()
    assert path == run / "report.html"
    assert not re.search(r"""(?:src|href)=(?!"data:,")""", page.split('id="data"')[0])
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)
    assert "{{" not in page.split('id="data"')[0]
    content = embedded(page)
    assert len(content["rounds"]) == 2
    assert content["loss_steps"] == len(content["losses"]) == 120
    assert [p[0] for p in content["losses"]] == list(range(120))
    kinds = Counter((e["kind"], e["round"]) for e in content["episodes"])
    assert kinds == {(k, r): n for r in (0, 1) for k, n in (("heldout", 3), ("train", 6), ("collected", 7))}
    assert content["episodes_in_all"] == sum(kinds.values())


def test_hostile_text_stays_inside_the_data(run: Path) -> None:
    content = gather(read_run(run), DataStore.open(run / "data.zarr"), None, max_episodes=50)
    content["name"] = "<b>{{data}}</b>"
    page = render(content)
    assert "<script>window.hacked" not in page
    assert page.count("</script>") == 2
    assert "<title>&lt;b&gt;" in page
    texts = [turn["saw"] for e in embedded(page)["episodes"] for turn in e["turns"]]
    assert any(HOSTILE.replace("\x1b", "␛") in text for text in texts)


def test_a_label_equal_to_the_action_is_not_repeated() -> None:
    turns = (make_turn([1], [1]), make_turn([1], [2]), make_turn([1], None))
    described = describe(make_trajectory(turns=turns), "collected")["turns"]
    assert [(t["labelled"], t.get("would")) for t in described] == [(True, None), (True, "say 2"), (False, None)]


def test_the_size_of_the_page_is_bounded(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DataStore.open(run / "data.zarr")
    content = gather(read_run(run), data, None, max_episodes=5)
    assert len(content["episodes"]) == 5
    assert content["episodes_in_all"] == 14
    assert Counter(e["round"] for e in content["episodes"]) == {0: 3, 1: 2}
    monkeypatch.setattr(report_data, "MAX_EPISODES_CHARACTERS", 12_000)
    monkeypatch.setattr(report_data, "MAX_LOSS_POINTS", 50)
    content = gather(read_run(run), data, None, max_episodes=200)
    assert 1 <= len(content["episodes"]) < 8
    assert {e["round"] for e in content["episodes"]} == {0, 1}
    assert 40 <= len(content["losses"]) <= 52
    long = clip("a" * 5000 + "b" * 5000)
    assert len(long) < report_data.MAX_TEXT + 50
    assert "7600 characters left out" in long
    assert clip("short") == "short"


@given(
    st.dictionaries(st.tuples(st.sampled_from("ab"), st.integers(0, 3)), st.integers(1, 30)),
    st.integers(0, 60),
)
def test_episodes_are_selected_evenly(sizes: dict[tuple[str, int], int], limit: int) -> None:
    slots = [(kind, None, index, (f"t{i:02d}", 0)) for (kind, index), n in sizes.items() for i in range(n)]
    chosen = choose_evenly(slots, limit)
    assert len(chosen) == len(set(chosen)) == min(limit, len(slots))
    assert set(chosen) <= set(slots)
    taken = Counter((kind, index) for kind, _, index, _ in chosen)
    for group, n in sizes.items():  # a group that got fewer than another is exhausted, or one short
        assert taken[group] == n or taken[group] >= max(taken.values(), default=0) - 1


def test_an_unfinished_run_has_a_page_and_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NoRunError):
        write_report(tmp_path / "none")
    (tmp_path / "config.yaml").write_text("name: just begun\n")
    content = embedded(write_report(tmp_path).read_text())
    assert content["name"] == "just begun"
    assert content["rounds"] == content["episodes"] == content["losses"] == []
