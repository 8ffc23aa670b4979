"""Megatron-Core's own GPTModel, of every family, against the weight map (``python -m``).

With the local layer spec, the one that can be built without a GPU; Transformer Engine's names differ
from its as ``alternatives`` say.
"""

from __future__ import annotations

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_dagger.config import ModelConfig, ParallelConfig, TrainingConfig
from megatron_dagger.training.model import transformer_config
from megatron_dagger.training.ranks import process_groups as parallel
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
    family, rows = families.lookup(model), padded_vocab_size(model, 1)
    left = dict(family.layouts(model))
    for name, parameter in build(model).named_parameters():
        layout = family.layout(name, model)
        known = next(other for other, entry in left.items() if entry is layout)
        del left[known]  # StopIteration: two parameters for one tensor
        expected = (rows, *layout.tail) if layout.padded else layout.shape
        assert tuple(parameter.shape) == expected, f"{model.family}: {name} is {tuple(parameter.shape)}, not {expected}"
    assert not left, f"{model.family} has no {list(left)}"


def main() -> None:
    with parallel.process_groups(ParallelConfig(), seed=1, deadline_s=60, threads=1):
        for family in FAMILIES:
            for tied in (True, False):
                check(sample_model(family, tie_embeddings=tied, kv_channels=16))


if __name__ == "__main__":
    main()
