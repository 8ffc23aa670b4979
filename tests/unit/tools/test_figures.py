"""The pictures of the README: well-formed SVG, drawn from the files of a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("zarr")

from megatron_dagger.types import ActedBy
from tests.support.run_directory import make_run
from tests.support.trajectories import make_action, make_trajectory, make_turn
from tools.figure_parts.svg import LIGHT
from tools.figure_parts.tree import Block, branch_turns, choose_episode, draw_tree, mask_blocks
from tools.figures import write_figures

SVG = "{http://www.w3.org/2000/svg}"
MAX_BYTES = 30_000


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run", rounds=3, tasks=6, heldout=5)


def texts(path: Path) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(path.read_text()).iter(f"{SVG}text")]


def test_every_picture_is_small_well_formed_and_described(run: Path, tmp_path: Path) -> None:
    paths = write_figures(run, tmp_path / "assets")
    assert sorted(path.name for path in paths) == sorted(
        f"{name}-{theme}.svg" for name in ("rounds", "loop", "tree") for theme in ("light", "dark")
    )
    for path in paths:
        root = ElementTree.fromstring(path.read_text())
        assert root.tag == f"{SVG}svg"
        assert root.find(f"{SVG}title").text and root.find(f"{SVG}desc").text
        assert path.stat().st_size < MAX_BYTES
        assert str(run) not in path.read_text()


def test_both_themes_differ_in_colours_only(run: Path, tmp_path: Path) -> None:
    write_figures(run, tmp_path)
    for name in ("rounds", "loop", "tree"):
        assert texts(tmp_path / f"{name}-light.svg") == texts(tmp_path / f"{name}-dark.svg")
        assert (tmp_path / f"{name}-light.svg").read_text() != (tmp_path / f"{name}-dark.svg").read_text()


def test_the_rounds_are_those_of_the_run(run: Path, tmp_path: Path) -> None:
    write_figures(run, tmp_path)
    shown = texts(tmp_path / "rounds-light.svg")
    rounds = [text for text in shown if text.startswith("after")]
    assert rounds == ["after round 0 (SFT)", "after round 1", "after round 2"]
    assert sum(text.endswith(" of 5") for text in shown) == 3


def test_the_sft_arm_has_a_line_from_round_0_to_its_last(run: Path, tmp_path: Path) -> None:
    arm = make_run(tmp_path / "arm", rounds=3, tasks=6, heldout=5)
    for index in (0, 1):
        (arm / f"rounds/{index:04d}/evaluate.json").unlink()
    last = arm / "rounds/0002/evaluate.json"
    evaluation = json.loads(last.read_text())
    evaluation["heldout"]["success"] = 0.37
    last.write_text(json.dumps(evaluation))
    write_figures(run, tmp_path / "out", arm)
    shown = texts(tmp_path / "out/rounds-light.svg")
    assert "37%" in shown
    assert any(text.startswith("SFT") for text in shown)
    assert not any("agrees" in text for text in shown)


def test_a_run_without_an_evaluation_is_an_error(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rounds=1, tasks=2, heldout=2)
    (run / "rounds" / "0000" / "evaluate.json").unlink()
    with pytest.raises(ValueError, match="no round has held-out results"):
        write_figures(run, tmp_path / "assets")
    assert not (tmp_path / "assets").exists()


def test_a_branch_attends_to_its_prefix_and_itself() -> None:
    turns = (make_turn([5], [5]), make_turn([6], [7, 8]), make_turn([9], [10]))
    blocks = mask_blocks(make_trajectory(turns=turns), 3)
    assert [block for block in blocks if block.kind == "label"] == [Block("label", 1), Block("label", 2)]
    seen = [key for key in blocks if Block("label", 1).attends_to(key)]
    assert seen == [Block("observation", 0), Block("action", 0), Block("observation", 1), Block("label", 1)]
    seen = [key for key in blocks if Block("action", 1).attends_to(key)]
    assert seen == [Block("observation", 0), Block("action", 0), Block("observation", 1), Block("action", 1)]


def test_the_chosen_episode_has_branches_and_turns_of_both_policies() -> None:
    teacher = make_turn([5], [5], acted_by=ActedBy.TEACHER)
    plain = make_trajectory("plain", turns=(make_turn([5], [5]),))
    mixed = make_trajectory("mixed", turns=(make_turn([6], [7]), make_turn([8], [9]), teacher))
    assert choose_episode([plain, mixed, plain]) is mixed
    assert branch_turns(mixed) == [0, 1]
    with pytest.raises(ValueError, match="no committed episode"):
        choose_episode([])


def test_a_hostile_command_is_escaped() -> None:
    turn = replace(make_turn([1], [2]), action=make_action(1, text="<script>\x1b&"))
    root = ElementTree.fromstring(draw_tree(make_trajectory(turns=(turn, turn)), LIGHT).svg())
    assert "<script>␛&" in [element.text for element in root.iter(f"{SVG}text")]
