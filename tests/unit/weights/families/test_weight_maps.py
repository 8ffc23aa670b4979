"""The weight maps between Megatron's and Hugging Face's tensors: names, shapes, round trips."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dagger.config import ModelConfig
from megatron_dagger.weights import families
from tests.unit.weights.sample_models import FAMILIES, sample_model, sample_models

LAYER = "decoder.layers.0."


@settings(max_examples=60, deadline=None)
@given(model=sample_models(), padding=st.integers(0, 3), seed=st.integers(0, 99))
def test_every_tensor_survives_the_round_trip_through_megatron(model, padding, seed):
    generator = np.random.default_rng(seed)
    names = families.canonical_names(model)
    tensors = {name: generator.random(shape, dtype=np.float32) for name, shape in names.items()}
    back = {}
    for name, entry in families.lookup(model).megatron_tensors(model).items():
        rows = entry.shape[0] + padding if entry.padded else None
        full = families.from_canonical(name, tensors, model, padded_rows=rows)
        assert full.shape[1:] == entry.tail
        if entry.padded:
            assert len(full) == entry.shape[0] + padding
            assert not full[entry.shape[0] :].any()
        as_torch = families.from_canonical(
            name, {key: torch.from_numpy(value) for key, value in tensors.items()}, model, padded_rows=rows
        )
        assert np.array_equal(as_torch.numpy(), full)
        back.update(families.to_canonical(name, full, model))
    assert list(back) == list(names)
    for name, tensor in tensors.items():
        assert np.array_equal(back[name], tensor), name


def test_qkv_rows_are_interleaved_by_query_group():
    model = ModelConfig(num_attention_heads=4, num_query_groups=2, kv_channels=2, hidden_size=1)
    group = [["q00", "q01", "q10", "q11", "k00", "k01", "v00", "v01"]]  # the head, then the row in it
    group += [["q20", "q21", "q30", "q31", "k10", "k11", "v10", "v11"]]
    rows = group[0] + group[1]
    fused = np.arange(16, dtype=np.float32).reshape(16, 1)
    parts = dict(families.to_canonical(LAYER + "self_attention.linear_qkv.weight", fused, model))
    for letter in "qkv":
        expected = sorted((row, i) for i, row in enumerate(rows) if row[0] == letter)
        got = parts[f"model.layers.0.self_attn.{letter}_proj.weight"][:, 0]
        assert got.tolist() == [i for _, i in expected]


def test_gate_comes_before_up():
    model = ModelConfig(ffn_hidden_size=2, hidden_size=1)
    fused = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    (gate, first), (up, second) = families.to_canonical(LAYER + "mlp.linear_fc1.weight", fused, model)
    assert (gate, up) == ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight")
    assert first.flatten().tolist() == [1, 2]
    assert second.flatten().tolist() == [3, 4]


@pytest.mark.parametrize(
    ("local", "engine"),
    [
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    ],
)
def test_norms_have_the_names_of_both_layer_specs(local, engine):
    model, norm = ModelConfig(), torch.arange(128.0)
    [(name, tensor)] = families.to_canonical(LAYER + local, norm, model)
    [(other, _)] = families.to_canonical(LAYER + engine, norm, model)
    assert name == other
    assert torch.equal(families.from_canonical(LAYER + local, {name: tensor}, model), norm)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_canonical_names_and_shapes_are_those_of_transformers(family, tied):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = sample_model(family, tie_embeddings=tied, num_attention_heads=6, num_query_groups=3)
    config = transformers.AutoConfig.for_model(**model.hf_config())
    with torch.device("meta"):
        reference = transformers.AutoModelForCausalLM.from_config(config)
    shapes = {}
    for name, parameter in reference.named_parameters():
        shapes |= _published(name, tuple(parameter.shape))
    assert families.canonical_names(model) == shapes


def _published(name, shape):
    """Return the tensor's shapes in published checkpoints; Transformers stacks experts, gate above up."""
    layer, _, kind = name.partition("mlp.experts.")
    if not kind:
        return {name: shape}
    experts, rows, columns = shape
    if kind == "down_proj":
        return {f"{layer}mlp.experts.{i}.down_proj.weight": (rows, columns) for i in range(experts)}
    names = [f"{layer}mlp.experts.{i}.{part}_proj.weight" for i in range(experts) for part in ("gate", "up")]
    return dict.fromkeys(names, (rows // 2, columns))


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("mlp.experts.local_experts.3.linear_fc1.weight", "mlp.experts.linear_fc1.weight3"),
        ("mlp.experts.local_experts.0.linear_fc2.weight", "mlp.experts.linear_fc2.weight0"),
        ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
    ],
)
def test_experts_have_the_names_of_both_layer_specs(spelling, name):
    model = sample_model("qwen3_moe")
    weight_map = families.lookup(model)
    assert weight_map.megatron_tensor(LAYER + spelling, model) == weight_map.megatron_tensors(model)[LAYER + name]


@pytest.mark.parametrize("family", FAMILIES)
def test_trainer_and_engine_have_the_same_canonical_tensors(family):
    model = sample_model(family, tie_embeddings=False)
    weight_map = families.lookup(model)
    megatron = [part.name for entry in weight_map.megatron(model).values() for part in entry.parts]
    vllm = [part.name for parameter in weight_map.vllm(model).values() for part in parameter.parts]
    assert sorted(megatron) == sorted(vllm)
    assert len(set(vllm)) == len(vllm)


@pytest.mark.parametrize(
    "name", ["decoder.layers.4.mlp.linear_fc1.weight", "output_layer.weight", "decoder.layers.0.mlp.bias"]
)
def test_an_unknown_tensor_is_named(name):
    with pytest.raises(families.WeightMapError, match=name.replace(".", r"\.")):
        families.to_canonical(name, torch.zeros(1), ModelConfig(num_layers=4))


@pytest.mark.parametrize("name", ["mlp.experts.linear_fc1.weight4", "mlp.linear_fc1.weight", "mlp.router.expert_bias"])
def test_an_unknown_expert_tensor_is_named(name):
    with pytest.raises(families.WeightMapError, match=name.replace(".", r"\.")):
        families.to_canonical(LAYER + name, torch.zeros(1), sample_model("qwen3_moe"))


def test_wrong_shapes_and_missing_tensors_are_named():
    model = ModelConfig()
    with pytest.raises(families.WeightMapError, match=r"linear_fc2.*\(128, 385\).*\(128, 384\)"):
        families.to_canonical(LAYER + "mlp.linear_fc2.weight", torch.zeros(128, 385), model)
    with pytest.raises(families.WeightMapError, match=r"gate_proj.*missing"):
        families.from_canonical(LAYER + "mlp.linear_fc1.weight", {}, model)
    norm = {"model.norm.weight": torch.zeros(128)}
    with pytest.raises(families.WeightMapError, match="cannot be padded"):
        families.from_canonical("decoder.final_layernorm.weight", norm, model, padded_rows=200)


def test_an_incomplete_set_of_weights_is_refused():
    model = ModelConfig()
    names = list(families.canonical_names(model))
    families.lookup(model).check_complete(names, model)
    with pytest.raises(families.WeightMapError, match=r"missing \['model\.norm\.weight'\]"):
        families.lookup(model).check_complete([n for n in names if n != "model.norm.weight"], model)
    with pytest.raises(families.WeightMapError, match=r"left over \['lm_head\.weight'\]"):
        families.lookup(model).check_complete([*names, "lm_head.weight"], model)
