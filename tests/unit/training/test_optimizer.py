"""Our optimizer settings as Megatron-Core's, whichever release is installed."""

import dataclasses

import pytest
import torch

from megatron_dagger.config import OptimizerConfig, TrainingConfig
from megatron_dagger.training import optimizer


@pytest.mark.parametrize(("moments", "dtype"), [("fp32", "float32"), ("bf16", "bfloat16"), ("fp8", "uint8")])
def test_moments_in_lower_precision(moments, dtype):
    settings = optimizer.settings(TrainingConfig(precision="bf16", optimizer=OptimizerConfig(moments=moments)))
    assert settings.keys() <= {field.name for field in dataclasses.fields(optimizer.MegatronOptimizerConfig)}
    assert settings["use_precision_aware_optimizer"] == (moments != "fp32")
    assert settings["exp_avg_dtype"] == settings["exp_avg_sq_dtype"] == getattr(torch, dtype)


def test_an_optimizer_in_the_hosts_memory():
    config = OptimizerConfig(cpu_offload_fraction=0.5)
    settings = optimizer.settings(TrainingConfig(precision="bf16", optimizer=config))
    assert settings["optimizer_cpu_offload"] and settings["overlap_cpu_optimizer_d2h_h2d"]
    assert (settings["optimizer_offload_fraction"], settings["use_precision_aware_optimizer"]) == (0.5, True)
    assert not optimizer.settings(TrainingConfig())["optimizer_cpu_offload"]
