"""Hugging Face folders as others write them."""

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")

import torch
from safetensors.torch import load_file, save_file

from megatron_dagger.weights import families
from megatron_dagger.weights.errors import CheckpointReadError
from megatron_dagger.weights.hf_files import SINGLE, HfCheckpoint, write_hf
from tests.unit.weights.sample_models import sample_model

MODEL = sample_model("llama")


@pytest.fixture
def with_tensor(tmp_path):
    """Return a function that writes a model with one more tensor and returns its folder."""

    def write(name):
        tensors = {key: torch.randn(shape) for key, shape in families.canonical_names(MODEL).items()}
        write_hf(tmp_path, MODEL, tensors.__getitem__, "float32")
        save_file(load_file(tmp_path / SINGLE) | {name: torch.ones(8)}, tmp_path / SINGLE)
        return tmp_path

    return write


def test_the_computed_buffers_of_older_checkpoints_are_skipped(with_tensor):
    checkpoint = HfCheckpoint(with_tensor("model.layers.0.self_attn.rotary_emb.inv_freq"))
    assert [name for name, _ in checkpoint.canonical_tensors()] == list(families.canonical_names(MODEL))


def test_any_other_tensor_is_refused_by_name(with_tensor):
    with pytest.raises(CheckpointReadError, match=r"model\.layers\.0\.self_attn\.q_norm\.weight"):
        HfCheckpoint(with_tensor("model.layers.0.self_attn.q_norm.weight"))
