"""tools.check.gpu as far as a machine without a GPU can run it: names, settings, processes, the table."""

import json
import sys

import pytest

pytest.importorskip("megatron.core", reason="Megatron-Core is not installed")

from megatron_dagger.config import build, to_dict
from megatron_dagger.config.trainer_support import check_supported
from tools.check import gpu, gpu_cases

BROKEN = "speed-nosuch"
CHECKS = ("attention", BROKEN, "bridge", "ranks", "serve-bf16", "curve-bf16_recompute", "speed-bf16_separate")


@pytest.mark.slow
def test_a_dry_run_runs_every_kind_of_check_and_a_failure_does_not_stop_the_others(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "NAMES", CHECKS)
    monkeypatch.setattr(sys, "argv", ["gpu", "--dry-run", "--checks", ",".join(CHECKS)])
    assert gpu.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:8]] == [*CHECKS], "in the order of CHECKS"
    result = json.loads(lines[-1].removeprefix("RESULT "))
    assert (result["failed"], result["not_run"]) == ([BROKEN], [])
    assert result["checks"][BROKEN]["error"] == "KeyError: 'nosuch'"
    assert 0 < result["checks"]["curve-bf16_recompute"]["difference"] < 0.02
    assert result["checks"]["bridge"]["gb_per_s"] > 0
    assert result["checks"]["ranks"]["ranks"] == 2
    assert result["checks"]["serve-bf16"]["load_in_place_s"] > 0


def test_the_sizes_are_unchanged_after_json():
    for sizes in gpu_cases.SIZES.values():
        decoded = build(gpu_cases.Sizes, json.loads(json.dumps(to_dict(sizes))))
        assert decoded == sizes
    assert gpu_cases.SIZES["4b"].large_training().optimizer.moments == "bf16"


@pytest.mark.parametrize("name", gpu_cases.VARIANTS)
def test_the_trainer_supports_every_variant_on_a_gpu(name):
    variant = gpu_cases.VARIANTS[name]
    for sizes in gpu_cases.SIZES.values():
        model = sizes.small_moe if variant.moe else sizes.small
        check_supported(model, variant.settings(sizes.small_training(), cuda=True), cuda=True)
        if variant.speed:
            check_supported(sizes.large, variant.settings(sizes.large_training(), cuda=True), cuda=True)
