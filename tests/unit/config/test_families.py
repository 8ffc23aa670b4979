"""The family table: an unknown family is refused, and every family has a weight map that follows the table."""

import pytest

from megatron_dagger.config import ConfigError, ModelConfig, RunConfig, override
from megatron_dagger.config.families import FAMILIES
from megatron_dagger.weights import families as weight_maps
from tests.unit.weights.sample_models import sample_model


def test_every_family_has_a_weight_map_and_every_map_a_family():
    assert set(weight_maps.WEIGHT_MAPS) == set(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_weight_maps_tensors_agree_with_the_table(name):
    model, family = sample_model(name), FAMILIES[name]
    for tensors in (weight_maps.canonical_names(model), weight_maps.WEIGHT_MAPS[name].vllm(model)):
        assert any("q_norm" in tensor for tensor in tensors) == model.qk_norm == family.qk_norm
        assert any("qkv_proj.bias" in x or "q_proj.bias" in x for x in tensors) == model.qkv_bias == family.qkv_bias
        assert any("experts" in tensor for tensor in tensors) == (model.num_moe_experts is not None) == family.experts


def test_an_unknown_family_is_refused_with_the_known_ones():
    message = r"model\.family='gpt': choose one of llama, qwen2, qwen3, qwen3_moe"
    with pytest.raises(ConfigError, match=message):
        ModelConfig(family="gpt")
    with pytest.raises(ConfigError, match=message):
        override(RunConfig(), ["model.family=gpt"])
