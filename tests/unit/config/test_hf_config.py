"""A config.json is read as Transformers reads it, or refused: whatever it holds, the model computes the same.

The reference is Transformers' own model, built from the config.json itself and from what our settings write for it.
"""

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from megatron_dagger.config import ConfigError, ModelConfig
from tests.unit.config.test_model import FAMILIES

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SHAPE = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "kv_channels": 8, "vocab_size": 96}
EXPERTS = {"num_moe_experts": 4, "moe_ffn_hidden_size": 24, "moe_router_topk": 2}
# Values that someone's config.json may have; those of the right type for an entry are tried most
VALUES = {
    bool: [True, False, None],
    int: [0, 1, 2, 4, 8, 16, 40, None],
    float: [0.0, 1e-6, 1e-5, 0.5, 1.0, 2.5, 10_000, 5e5, None],
    str: ["silu", "gelu", "relu", "default", "yarn", "linear", "x", None],
    list: [[], [0], [1], ["full_attention"] * 2, ["full_attention", "sliding_attention"], None],
    dict: [{}, None, {"0": {"num_attention_heads": 2}}, {"quant_method": "fp8"}],
}
ROPE = st.fixed_dictionaries(
    {},
    optional={
        "rope_type": st.sampled_from(["default", "yarn", "linear", "dynamic", "llama3", "proportional"]),
        "type": st.sampled_from(["default", "yarn", "mrope"]),
        "rope_theta": st.sampled_from([10_000, 10_000.0, 1e6, 5000.5]),
        "factor": st.sampled_from([1.0, 2.0, 4.0, None]),
        "original_max_position_embeddings": st.sampled_from([16, 4096, None]),
        "beta_fast": st.sampled_from([32.0, 16, None]),
        "beta_slow": st.sampled_from([1.0, 2, None]),
        "attention_factor": st.sampled_from([1.0, 0.7, None]),
        "mscale": st.sampled_from([1.0, 0.5]),
        "truncate": st.sampled_from([True, False]),
        "partial_rotary_factor": st.sampled_from([0.5, 1.0]),
        "full_attention": st.just({"rope_type": "default", "rope_theta": 5e5}),
    },
)
# Names that Transformers' classes do not declare, but their models read
UNDECLARED = {
    "head_dim": int,
    "num_experts": int,
    "sliding_window": int,
    "partial_rotary_factor": float,
    "layer_types": list,
    "per_layer_config": dict,
    "quantization_config": dict,
}


def base(family):
    moe = EXPERTS if family == "qwen3_moe" else {}
    return ModelConfig(family=family, **SHAPE, **moe).hf_config()


def entries(family):
    """Return the entries that change something, with the types of their values."""
    defaults = transformers.AutoConfig.for_model(family).to_dict()
    declared = {name: type(value) for name, value in defaults.items() if type(value) in VALUES and name != "model_type"}
    return UNDECLARED | declared


@st.composite
def configs(draw):
    family = draw(st.sampled_from(sorted(FAMILIES)))
    config, types = base(family), entries(family)
    for name in draw(st.lists(st.sampled_from(sorted(types)), max_size=3, unique=True)):
        config[name] = draw(st.sampled_from(VALUES[types[name]]))
    for name in draw(st.lists(st.sampled_from(sorted(config)), max_size=2, unique=True)):
        if name != "model_type":
            del config[name]
    if draw(st.booleans()):
        config[draw(st.sampled_from(["rope_scaling", "rope_parameters"]))] = draw(ROPE)
    if draw(st.integers(0, 7)) == 0:
        config["use_sliding_window"] = True
    return config


def model_of(config):
    """Return Transformers' model of a config.json, with random weights that are always the same."""
    read = transformers.AutoConfig.for_model(**config)
    model = transformers.AutoModelForCausalLM.from_config(read, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def logits(model):
    tokens = torch.arange(0, 280, 7)[None] % model.config.vocab_size
    with torch.no_grad():
        return model(tokens, use_cache=False, return_dict=True).logits


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_each_familys_own_file_is_read_and_computed(family):
    assert logits(model_of(ModelConfig.from_hf(base(family)).hf_config())).shape == (1, 40, 96)


@pytest.mark.parametrize(
    "entry", [{"layer_types": 3}, {"layer_types": [[]]}, {"rope_theta": 10**400}, {"rope_theta": float("inf")}]
)
def test_values_that_no_model_has_are_refused(entry):
    with pytest.raises(ConfigError):
        ModelConfig.from_hf(base("qwen3") | entry)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(configs())
def test_the_model_is_the_one_that_transformers_reads(config):
    try:
        ours = ModelConfig.from_hf(config)
    except ConfigError:
        event("refused")
        return
    try:
        theirs = model_of(config)
        expected = logits(theirs)
    except Exception as error:  # of any kind
        event(f"Transformers refuses it: {type(error).__name__}")
        return
    event("read")
    rebuilt = model_of(ours.hf_config())
    rebuilt.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(logits(rebuilt), expected, rtol=0, atol=0, equal_nan=True)
    assert ModelConfig.from_hf(ours.hf_config()) == ours
