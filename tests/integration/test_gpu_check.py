"""tools/check/gpu.py as far as a machine without a GPU can run it: names, settings, processes, the table."""

import json
import sys

import pytest

pytest.importorskip("megatron.core", reason="Megatron-Core is not installed")

from megatron_dagger.config import build, to_dict
from megatron_dagger.config.support import check_supported
from tools.check import gpu as gpu_check
from tools.check import gpu_cases as gpu_sizes

BROKEN = "speed-nosuch"
CHECKS = ("attention", BROKEN, "bridge", "curve-bf16_recompute", "speed-bf16_separate")


@pytest.mark.slow
def test_a_dry_run_goes_through_every_kind_of_check_and_what_fails_costs_no_other(monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "NAMES", CHECKS)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--dry-run", "--checks", ",".join(CHECKS)])
    assert gpu_check.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:6]] == [*CHECKS], "as they came"
    result = json.loads(lines[-1].removeprefix("RESULT "))
    assert (result["failed"], result["not_run"]) == ([BROKEN], [])
    assert result["checks"][BROKEN]["error"] == "KeyError: 'nosuch'"
    assert 0 < result["checks"]["curve-bf16_recompute"]["difference"] < 0.02
    assert result["checks"]["bridge"]["gb_per_s"] > 0


def test_the_sizes_survive_the_way_to_the_checks():
    for size in gpu_sizes.SIZES.values():
        back = build(gpu_sizes.Settings, json.loads(json.dumps(to_dict(size))))
        assert back == size
    assert gpu_sizes.SIZES["4b"].large_training().optimizer.moments == "bf16"


@pytest.mark.parametrize("name", gpu_sizes.VARIANTS)
def test_every_variant_is_one_that_a_gpu_takes(name):
    variant = gpu_sizes.VARIANTS[name]
    for size in gpu_sizes.SIZES.values():
        model = size.small_moe if variant.moe else size.small
        check_supported(model, variant.settings(size.small_training(), cuda=True), cuda=True)
        if variant.speed:
            check_supported(size.large, variant.settings(size.large_training(), cuda=True), cuda=True)
