"""The runs of a study: their settings, and what they share."""

from dataclasses import replace

import pytest

pytest.importorskip("zarr")

from megatron_dagger.config import override
from tools.study.plan import ARMS, VARIANTS, Cell, Plan, parse_amounts, teacher_turns
from tools.study.shared import Shared, choose_donor, shared

PLAN = Plan(amounts={0: (100, 300), 1: (100,), 8: (100, 300)}, seeds=2, heldout=20, steps=50)
CELL = Cell(arm="sft", horizon=8, amount=100, seed=0)


def config(**changes):
    return PLAN.config(replace(CELL, **changes))


def test_every_seed_is_complete_before_the_next_and_sft_comes_first():
    all_cells = list(replace(PLAN, variants=("beta_half",)).all_cells())
    assert len(all_cells) == len(set(all_cells)) == 2 * 2 * (5 * 3 + 1)
    assert [cell.seed for cell in all_cells] == [0] * 32 + [1] * 32
    assert [cell.arm for cell in all_cells[:6]] == ["sft", "sft", "dagger", "dagger", "prefix", "prefix"]
    assert {(c.horizon, c.amount) for c in all_cells if c.arm == "beta_half"} == {(8, 100)}
    assert not any(cell.greedy for cell in replace(PLAN, greedy=False).all_cells())


@pytest.mark.parametrize("horizon", PLAN.amounts)
def test_the_arms_of_a_group_differ_only_in_who_acts(horizon):
    sft, dagger, prefix = (config(arm=arm, horizon=horizon) for arm in ARMS)
    for other in (dagger, prefix):
        groups = ("beta", "mixing", "prefix_turns_per_round", "prefix_turns_limit", "takeover_turns")
        neutral = replace(other, dagger=replace(other.dagger, **{name: getattr(sft.dagger, name) for name in groups}))
        assert neutral == sft
    assert sft.repo_repair.bugs == horizon
    assert sft.dagger.aggregation.max_labels_per_round == 100
    assert prefix.dagger.prefix_turns_per_round * 2 >= prefix.dagger.prefix_turns_limit == teacher_turns(horizon)
    assert sft.dagger.aggregation.max_sft_labels == 400
    tasks, largest = sft.dagger.tasks_per_round, PLAN.amounts[horizon][-1]
    assert sft.repo_repair.train_tasks == sft.dagger.sft_tasks + tasks * 2, "every round has new tasks"
    assert tasks * teacher_turns(horizon) >= 1.1 * largest
    assert sft.dagger.sft_tasks * teacher_turns(horizon) >= 1.05 * 4 * largest
    assert not {*sft.repo_repair.train_packages} & {*sft.repo_repair.heldout_packages}


def test_every_variant_can_be_run():
    configs = [PLAN.config(replace(CELL, arm=arm)) for arm in VARIANTS]
    assert len({repr(value.dagger) for value in [*configs, config(arm="dagger")]}) == len(VARIANTS) + 1


def test_amounts_are_for_all_horizons_or_for_one():
    assert parse_amounts([1, 8], ["300", "8:500", "100"]) == {1: (100, 300), 8: (500,)}
    for wrong in (["8:500"], ["7:500", "1"], ["many"], ["0"], ["-5"]):
        with pytest.raises(ValueError, match="amount"):
            parse_amounts([1, 8], wrong)


def test_runs_share_what_the_same_settings_decide():
    def common(first, second):
        assert shared(first, second) == shared(second, first)
        return shared(first, second)

    assert common(config(), config()) == Shared(trained=3, collected=3, references=True)
    assert common(config(), config(greedy=True)) == Shared(trained=3, collected=3, references=True)
    assert common(config(), config(arm="dagger")) == Shared(trained=1, collected=1, references=True)
    assert common(config(), config(arm="prefix", greedy=True)) == Shared(trained=1, collected=1, references=True)
    assert common(config(), config(amount=300)) == Shared(collected=3, references=True)
    assert common(config(), config(arm="dagger", amount=300)) == Shared(collected=1, references=True)
    assert common(config(), config(seed=1)) == common(config(), config(horizon=1)) == Shared()
    fewer_tokens = override(config(), ["evaluation_sampling.max_tokens=9"])
    assert common(config(), fewer_tokens) == Shared(trained=3, collected=3)
    assert common(config(), override(config(), ["rollout.sampling.temperature=1.0"])) == Shared()


def test_the_donor_is_the_run_with_the_most_to_share(tmp_path):
    finished = {tmp_path / "other": config(seed=1), tmp_path / "amount": config(amount=300), tmp_path / "sft": config()}
    assert choose_donor(config(arm="dagger"), finished)[0] == tmp_path / "sft"
    assert choose_donor(config(seed=2), finished) == choose_donor(config(), {}) == (None, Shared())
