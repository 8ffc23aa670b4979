"""The architecture's settings: checks per family, and the conversion to and from Hugging Face's config.json."""

import pytest

from megatron_dagger.config import ConfigError, ModelConfig, build, to_dict

FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {"num_moe_experts": 8, "moe_ffn_hidden_size": 96, "moe_router_topk": 3, "norm_topk_prob": False},
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_face_accepts_every_setting(family, tied):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = ModelConfig(family=family, tie_embeddings=tied, rotary_base=123_000, **FAMILIES[family])
    values = model.hf_config()
    config = transformers.AutoConfig.for_model(**values)
    by_class = {
        "llama": transformers.LlamaConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
        "qwen3_moe": transformers.Qwen3MoeConfig,
    }
    assert type(config) is by_class[family]
    assert config.architectures == [type(config).__name__.removesuffix("Config") + "ForCausalLM"]
    assert config.rope_parameters["rope_theta"] == 123_000
    assert config.rope_parameters["rope_type"] == "default"
    for name in values.keys() - {"rope_theta", "torch_dtype", "model_type"}:
        assert getattr(config, name) == values[name], name
    known = set(type(config)().to_dict()) | set(config.attribute_map) | {"rope_theta", "torch_dtype"}
    if family == "qwen3_moe":
        known.add("head_dim")  # its model reads it; its config class does not declare it
    assert values.keys() <= known


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_unchanged_after_a_round_trip_through_its_file(family):
    model = ModelConfig(family=family, **FAMILIES[family])
    assert build(ModelConfig, to_dict(model)) == model


def test_old_settings_without_experts_are_read():
    values = {name: value for name, value in to_dict(ModelConfig()).items() if "moe" not in name and "topk" not in name}
    assert build(ModelConfig, values) == ModelConfig()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"family": "qwen3_moe"}, "model.num_moe_experts=None"),
        ({"family": "qwen3_moe", "num_moe_experts": 4}, "model.moe_ffn_hidden_size=None"),
        ({"family": "qwen3_moe", "num_moe_experts": 1, "moe_ffn_hidden_size": 8}, "model.moe_router_topk=2"),
        ({"family": "llama", "num_moe_experts": 4}, "model.num_moe_experts=4: family llama has no experts"),
        ({"family": "qwen2", "kv_channels": 64}, "model.kv_channels=64"),
        ({"family": "llama", "hidden_size": 130}, "model.num_attention_heads=4 must divide"),
    ],
)
def test_settings_that_a_family_does_not_allow_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**settings)


@pytest.mark.parametrize("original", [None, 4096])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_yarn_without_an_original_length_is_read_as_transformers_reads_it(key, original):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    scaling = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e6}
    if original is not None:
        scaling["original_max_position_embeddings"] = original
    config = ModelConfig(max_position_embeddings=8192).hf_config() | {key: scaling}
    config.pop("rope_theta", None)
    yarn = ModelConfig.from_hf(config).yarn
    theirs = transformers.Qwen3Config(**{k: v for k, v in config.items() if k != "model_type"}).rope_parameters
    expected = theirs["original_max_position_embeddings"], theirs["factor"]
    assert (yarn.original_max_position_embeddings, yarn.factor) == expected == (original or 8192, 2.0)


@pytest.mark.parametrize(
    "entries, reason",
    [
        ({"rope_scaling": {"rope_type": "yarn"}}, "no factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": None}}, "no factor"),
        ({"rope_theta": 10_000.5}, "rope_theta=10000.5 is not supported"),
    ],
)
def test_rope_that_would_be_read_otherwise_is_refused(entries, reason):
    with pytest.raises(ConfigError, match=reason):
        ModelConfig.from_hf(ModelConfig().hf_config() | entries)
