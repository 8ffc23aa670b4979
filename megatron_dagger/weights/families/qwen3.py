"""Qwen3 (dense): Megatron-Core's GPTModel <-> Qwen3ForCausalLM, as one table.

Names are global: layer numbers count over all pipeline stages, tensors are whole (unsharded).
Three layouts differ between the two sides:

- ``linear_qkv`` holds, for each query group, that group's query heads, its key head, its value head;
- ``linear_fc1`` holds the gate's rows, then the up projection's;
- embedding and output layer may carry padding rows after the vocabulary.

With tied embeddings there is no output layer on either side (the last pipeline stage's copy of the
embedding is not a tensor of its own).
"""

from __future__ import annotations

from functools import lru_cache

from megatron_dagger.config.model import ModelConfig
from megatron_dagger.weights.families.base import Family, Layout, Part


@lru_cache(maxsize=16)
def layouts(model: ModelConfig) -> dict[str, Layout]:
    """Each global Megatron name (Transformer Engine's spelling) and its layout."""
    hidden, vocab = (model.hidden_size,), model.vocab_size
    table = {"embedding.word_embeddings.weight": _plain("model.embed_tokens.weight", vocab, hidden, padded=True)}
    for index in range(model.num_layers):
        table |= _layer(f"decoder.layers.{index}.", f"model.layers.{index}.", model)
    table["decoder.final_layernorm.weight"] = _plain("model.norm.weight", model.hidden_size)
    if not model.tie_embeddings:
        table["output_layer.weight"] = _plain("lm_head.weight", vocab, hidden, padded=True)
    return table


def _layer(ours: str, theirs: str, model: ModelConfig) -> dict[str, Layout]:
    head, groups = model.kv_channels, model.num_query_groups
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    attention, mlp = theirs + "self_attn.", theirs + "mlp."
    qkv = Layout(
        groups=groups,
        tail=(hidden,),
        parts=(
            Part(name=attention + "q_proj.weight", rows=model.num_attention_heads // groups * head),
            Part(name=attention + "k_proj.weight", rows=head),
            Part(name=attention + "v_proj.weight", rows=head),
        ),
    )
    gate_up = Layout(
        tail=(hidden,),
        parts=(Part(name=mlp + "gate_proj.weight", rows=ffn), Part(name=mlp + "up_proj.weight", rows=ffn)),
    )
    width = (model.num_attention_heads * head,)
    return {
        ours + "self_attention.linear_qkv.layer_norm_weight": _plain(theirs + "input_layernorm.weight", hidden),
        ours + "self_attention.linear_qkv.weight": qkv,
        ours + "self_attention.q_layernorm.weight": _plain(attention + "q_norm.weight", head),
        ours + "self_attention.k_layernorm.weight": _plain(attention + "k_norm.weight", head),
        ours + "self_attention.linear_proj.weight": _plain(attention + "o_proj.weight", hidden, width),
        ours + "mlp.linear_fc1.layer_norm_weight": _plain(theirs + "post_attention_layernorm.weight", hidden),
        ours + "mlp.linear_fc1.weight": gate_up,
        ours + "mlp.linear_fc2.weight": _plain(mlp + "down_proj.weight", hidden, (ffn,)),
    }


def _plain(name: str, rows: int, tail: tuple[int, ...] = (), *, padded: bool = False) -> Layout:
    return Layout(parts=(Part(name=name, rows=rows),), tail=tail, padded=padded)


FAMILY = Family(
    name="qwen3",
    layouts=layouts,
    alternatives={  # the local spec's own norms, which Transformer Engine fuses into the linear after them
        "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
        "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    },
)
to_canonical = FAMILY.to_canonical
from_canonical = FAMILY.from_canonical
canonical_names = FAMILY.canonical_names
