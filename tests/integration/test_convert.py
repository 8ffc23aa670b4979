"""megatron-dagger convert for every family: Megatron computes Transformers' log-probs; converting back is bit-exact.

One test uses real weights: SmolLM2-135M-Instruct, which a Python package contains as a GGUF file.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("megatron.core", reason="Megatron-Core is not installed")
pytest.importorskip("transformers", reason="Transformers is not installed")

import torch
import transformers

from megatron_dagger.config import ModelConfig, YarnConfig
from megatron_dagger.config.base import ConfigError
from tests.integration.converted import convert, converted, run_megatron, transformers_logprobs
from tests.unit.weights.sample_models import sample_model

TOLERANCE = 1e-4  # of log-probs in fp32
MODELS = {
    "llama-kv1-tied": ("llama", {"num_attention_heads": 2, "num_query_groups": 1}),
    "llama-kv3-untied": ("llama", {"num_attention_heads": 3, "num_query_groups": 3, "tie_embeddings": False}),
    "qwen2-kv3-tied": ("qwen2", {"num_attention_heads": 6, "num_query_groups": 3}),
    "qwen2-kv2-untied": ("qwen2", {"num_attention_heads": 4, "num_query_groups": 2, "tie_embeddings": False}),
    "qwen3-kv1-untied-yarn": (
        "qwen3",
        {"num_attention_heads": 3, "num_query_groups": 1, "tie_embeddings": False, "max_position_embeddings": 512}
        | {"yarn": YarnConfig(factor=4.0, original_max_position_embeddings=128)},  # fewer than the tokens
    ),
    "qwen3-kv2-tied": ("qwen3", {"num_attention_heads": 4, "num_query_groups": 2}),
    "qwen3-moe": ("qwen3_moe", {"num_attention_heads": 4, "num_query_groups": 2, "tie_embeddings": False}),
}


def model_of(name: str) -> ModelConfig:
    family, settings = MODELS[name]
    heads = {"llama": 8, "qwen2": 8}.get(family, 16)
    hidden = settings["num_attention_heads"] * heads
    return sample_model(family, kv_channels=heads, hidden_size=hidden, vocab_size=131, ffn_hidden_size=24, **settings)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """For each name a directory with hf/ (written by Transformers), megatron/ and logprobs.npy (Megatron's)."""
    root = tmp_path_factory.mktemp("converted")
    for name in MODELS:
        model = model_of(name)
        torch.manual_seed(1)
        config = transformers.AutoConfig.for_model(**model.hf_config())
        reference = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in reference.parameters():
            torch.nn.init.normal_(parameter, std=0.3)  # biases and norms too
        reference.save_pretrained(root / name / "hf", max_shard_size="40KB")
        (root / name / "hf" / "tokenizer.json").write_text("{}")
        np.save(root / name / "tokens.npy", np.random.default_rng(0).integers(0, 131, 300).astype(np.int32))
        layout = ["--tensor-parallel", model.num_query_groups, "--pipeline-parallel", 2]
        converted("hf-to-megatron", root / name / "hf", root / name / "megatron", *layout, "--shard-mib", 1)
    run_megatron(*(root / name for name in MODELS))
    return root


@pytest.mark.parametrize("name", MODELS)
def test_megatron_computes_the_logprobs_of_transformers(models, name):
    megatron, reference = np.load(models / name / "logprobs.npy"), transformers_logprobs(models / name)
    assert np.ptp(reference) > 1, "the reference must be far from uniform to be meaningful"
    assert np.abs(megatron - reference).max() < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_converting_back_is_bit_exact(models, name, tmp_path):
    converted("reshard", models / name / "megatron", tmp_path / "one")
    converted("megatron-to-hf", tmp_path / "one", tmp_path / "back")
    assert "are equal, bit for bit" in converted("verify", models / name / "hf", tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}", "the tokenizer is copied too"
    before = transformers.AutoModelForCausalLM.from_pretrained(models / name / "hf").state_dict()
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_inspect_lists_tensors_and_verify_names_differences(models, tmp_path):
    shown = converted("inspect", models / "qwen3-kv2-tied" / "megatron", "--digests")
    assert "MegatronFiles, qwen3" in shown and "model.layers.1.mlp.down_proj.weight" in shown
    converted("megatron-to-hf", models / "qwen3-kv2-tied" / "megatron", tmp_path / "half", "--dtype", "bfloat16")
    done = convert("verify", models / "qwen3-kv2-tied" / "hf", tmp_path / "half")
    assert done.returncode == 1
    assert "model.norm.weight: torch.float32 and torch.bfloat16, largest difference 0.00" in done.stdout
    done = convert("verify", models / "qwen3-kv2-tied" / "hf", models / "qwen2-kv2-untied" / "hf")
    assert done.returncode == 1 and "different models" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "{nowhere}"], "holds neither .metadata (Megatron) nor config.json"),
        (["hf-to-megatron", "{hf}", "{hf}"], "exists already; remove it, or name another"),
        (["hf-to-megatron", "{hf}", "{new}", "--tensor-parallel", "3"], "cannot be split into 3 equal shares"),
        (["hf-to-megatron", "{hf}", "{new}", "--pipeline-parallel", "3"], "cannot be split evenly over 3 pipeline"),
    ],
)
def test_an_impossible_conversion_is_refused_with_the_reason(models, tmp_path, arguments, message):
    paths = {"nowhere": tmp_path, "hf": models / "qwen3-kv2-tied" / "hf", "new": tmp_path / "new"}
    done = convert(*(argument.format(**paths) for argument in arguments))
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2' is not known"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "rope_type='llama3' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7}}, "'mscale': 0.7} is not supported"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
    ],
)
def test_an_unsupported_model_is_refused(entry, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_hf(model_of("qwen3-kv2-tied").hf_config() | entry)


@pytest.mark.parametrize("name", MODELS)
def test_a_config_is_unchanged_after_a_round_trip_through_hugging_face(name):
    model = model_of(name)
    back = ModelConfig.from_hf(json.loads(json.dumps(model.hf_config())))
    assert back.hf_config() == model.hf_config()


@pytest.mark.slow
def test_real_weights_of_smollm2(smollm2, tmp_path):
    run_megatron(smollm2)
    logprobs = np.load(smollm2 / "logprobs.npy")
    assert np.abs(logprobs - transformers_logprobs(smollm2)).max() < TOLERANCE
    assert logprobs.mean() > -6, "these are the weights of a language model"
    converted("megatron-to-hf", smollm2 / "megatron", tmp_path / "back")
    assert "272 of 272 tensors are equal" in converted("verify", smollm2 / "hf", tmp_path / "back")
