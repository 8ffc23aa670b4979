"""Check the weight map of every family against Megatron-Core's own GPTModel (``python -m``).

The model uses the local layer spec, which needs no GPU. ``WeightMap.alternatives`` maps its names to those of
Transformer Engine's.
"""

from __future__ import annotations

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_dagger.config import ModelConfig, ParallelConfig, TrainingConfig
from megatron_dagger.training.megatron_config import transformer_config
from megatron_dagger.training.ranks.process_groups import process_groups
from megatron_dagger.weights import families
from megatron_dagger.weights.layouts import padded_vocab_size
from tests.unit.weights.sample_models import FAMILIES, sample_model


def build(model: ModelConfig) -> GPTModel:
    settings = transformer_config(model, TrainingConfig())
    spec = get_gpt_layer_local_spec(
        qk_layernorm=settings.qk_layernorm, normalization="RMSNorm", num_experts=model.num_moe_experts
    )
    return GPTModel(
        config=settings,
        transformer_layer_spec=spec,
        vocab_size=padded_vocab_size(model, 1),
        max_sequence_length=64,
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="rope",
    )


def check(model: ModelConfig) -> None:
    weight_map, rows = families.lookup(model), padded_vocab_size(model, 1)
    remaining = dict(weight_map.megatron_tensors(model))
    for name, parameter in build(model).named_parameters():
        entry = weight_map.megatron_tensor(name, model)
        key = next(key for key, value in remaining.items() if value is entry)
        del remaining[key]  # StopIteration above: two parameters for the same tensor
        expected = (rows, *entry.tail) if entry.padded else entry.shape
        assert tuple(parameter.shape) == expected, f"{model.family}: {name} is {tuple(parameter.shape)}, not {expected}"
    assert not remaining, f"{model.family} has no {list(remaining)}"


def main() -> None:
    with process_groups(ParallelConfig(), seed=1, timeout_s=60, threads=1):
        for family in FAMILIES:
            for tied in (True, False):
                check(sample_model(family, tie_embeddings=tied, kv_channels=16))


if __name__ == "__main__":
    main()
