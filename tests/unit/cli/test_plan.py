"""``megatron-dagger plan`` as a user calls it."""

import json

import pytest

from megatron_dagger.cli.main import main


def test_a_recipe_that_fits(capsys):
    assert main(["plan", "qwen3_8b_swegym_4x8h100"]) == 0
    out = capsys.readouterr()
    assert out.err == ""
    for text in (
        "8.19B parameters on 32 x h100",
        "TP8 x PP1 x DP4",
        "optimizer",
        "tokens in the KV cache",
        "mfu_fp8=0.25",
    ):
        assert text in out.out


def test_experts_are_counted_separately(capsys):
    assert main(["plan", "qwen3_30b_a3b_swegym_4x8h100"]) == 0
    out = capsys.readouterr().out
    for text in ("30.53B parameters, 3.35B of them active", "experts EP8 x ETP1 x DP4", "expert_load=1.5"):
        assert text in " ".join(out.split())


def test_the_json_report_is_complete(capsys):
    assert main(["plan", "smollm2_135m_repair_1gpu", "dagger.rounds=1", "--json", "--assume", "mfu=0.3"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["fits"] is True
    assert report["assumptions"]["mfu"] == 0.3
    assert [entry["round_index"] for entry in report["rounds"]] == [0, 1]
    [stage] = report["training_gib"]
    parts = ("weights", "fp8_weights", "gradients", "optimizer", "activations", "working", "reserve")
    assert stage["total"] == pytest.approx(sum(stage[part] for part in parts))


def test_a_recipe_that_does_not_fit_is_refused_with_the_reason_and_settings_that_fit(capsys):
    settings = ["training.parallel.tensor_model_parallel_size=2"]
    assert main(["plan", "qwen3_8b_swegym_8h100", *settings]) == 1
    err = capsys.readouterr().err
    assert "training needs" in err
    advice = err.splitlines()[-1].partition("): ")[2].split()
    assert main(["plan", "qwen3_8b_swegym_8h100", *settings, *advice]) == 0
    capsys.readouterr()
    assert main(["plan", "qwen3_8b_swegym_8h100", *settings, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["fits"], report["nearest"]) == (False, advice)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuch"], "unknown recipe"),
        (["quickstart", "--assume", "mfuu=1"], "did you mean assume.mfu"),
        (["quickstart", "--assume", "mfu=7"], "must lie in"),
        (["quickstart", "--assume", "expert_load=0.5"], "expert_load must be at least 1"),
        (["qwen3_30b_a3b_swegym_4x8h100", "rollout.engine.quantization=fp8"], "is for dense models"),
        (["qwen3_4b_fp8_swegym_8h100", "--gpu", "a100"], "a100 has no FP8"),
        (
            ["qwen3_4b_fp8_swegym_8h100", "training.bf16_layers_at_ends=40"],
            "must lie between 0 and a stage's 36 layers",
        ),
        (["qwen3_4b_swegym_8h100", "rollout.engine.tensor_parallel_size=3"], "does not divide"),
        (["smollm2_135m_repair_1gpu", "rollout.engine.tensor_parallel_size=3"], "one node"),
    ],
)
def test_a_plan_that_cannot_be_made_is_an_error(arguments, message, capsys):
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err
