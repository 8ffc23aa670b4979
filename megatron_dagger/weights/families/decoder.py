"""The decoder that the families share: Megatron-Core's GPTModel, Hugging Face's decoder and vLLM's.

Names are global: layer numbers count over all pipeline stages. Megatron's tensors differ from Hugging Face's in three
places:

- ``linear_qkv``, and its bias, hold for each query group the group's query heads, its key head and its value head
  (``megatron/core/transformer/attention.py``);
- ``linear_fc1`` holds the gate's rows above the up projection's, and a tensor-parallel rank holds a shard of each
  (``megatron/core/transformer/mlp.py``);
- the embedding and the output layer may have padding rows after the vocabulary.

With tied embeddings neither side has an output layer of its own: Megatron's last pipeline stage holds a copy of the
embedding under that name (``megatron/core/models/gpt/gpt_model.py``).

QK norms and QKV biases are there if ``model.qk_norm`` and ``model.qkv_bias`` say so. A family with another MLP passes
its own ``mlp`` functions, which take the prefixes of a layer's names.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_dagger.config.model import ModelConfig
from megatron_dagger.weights.blocks import ShardDim
from megatron_dagger.weights.families.megatron_tensor import FusedPart, MegatronTensor, Shape
from megatron_dagger.weights.families.vllm_tensor import StackedPart, VllmTensor

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"

# The local spec has norms of its own; Transformer Engine fuses them into the linear layer after them
# (megatron/core/models/gpt/gpt_layer_specs.py).
INPUT_NORM = {r"\.input_layernorm\.weight$": ".self_attention.linear_qkv.layer_norm_weight"}
MLP_NORM = {r"\.pre_mlp_layernorm\.weight$": ".mlp.linear_fc1.layer_norm_weight"}


def dense_mlp(mcore: str, hf: str, model: ModelConfig) -> dict[str, MegatronTensor]:
    """Return Megatron's tensors of a layer's MLP and the norm before it. The prefixes end with a dot."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    gate, up = (FusedPart(name=f"{hf}mlp.{name}_proj.weight", rows=ffn) for name in ("gate", "up"))
    norm, down = hf + "post_attention_layernorm.weight", hf + "mlp.down_proj.weight"
    return {
        mcore + "mlp.linear_fc1.layer_norm_weight": megatron_single(norm, hidden),
        mcore + "mlp.linear_fc1.weight": MegatronTensor(parts=(gate, up), tail=(hidden,), shard_dim=ShardDim.ROWS),
        mcore + "mlp.linear_fc2.weight": megatron_single(down, hidden, (ffn,), shard_dim=ShardDim.COLUMNS),
    }


def dense_mlp_parameters(layer: str, model: ModelConfig) -> dict[str, VllmTensor]:
    """Return vLLM's parameters of a layer's MLP."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    gate, up = (StackedPart(name=f"{layer}mlp.{name}_proj.weight", rows=ffn) for name in ("gate", "up"))
    return {
        layer + "mlp.gate_up_proj.weight": VllmTensor(parts=(gate, up), tail=(hidden,), shard_dim=ShardDim.ROWS),
        **vllm_single(layer + "mlp.down_proj.weight", hidden, (ffn,), shard_dim=ShardDim.COLUMNS),
    }


def megatron(
    model: ModelConfig,
    *,
    mlp: Callable[[str, str, ModelConfig], dict[str, MegatronTensor]] = dense_mlp,
) -> dict[str, MegatronTensor]:
    """Return Megatron's tensors by global name, as Transformer Engine's layer spec names them."""
    hidden, vocab = (model.hidden_size,), model.vocab_size
    table = {
        EMBEDDING: megatron_single("model.embed_tokens.weight", vocab, hidden, shard_dim=ShardDim.ROWS, padded=True)
    }
    for index in range(model.num_layers):
        mcore, hf = f"decoder.layers.{index}.", f"model.layers.{index}."
        table |= _attention(mcore + "self_attention.", hf, model)
        table |= mlp(mcore, hf, model)
    table["decoder.final_layernorm.weight"] = megatron_single("model.norm.weight", model.hidden_size)
    if not model.tie_embeddings:
        table[OUTPUT_LAYER] = megatron_single("lm_head.weight", vocab, hidden, shard_dim=ShardDim.ROWS, padded=True)
    return table


def vllm(
    model: ModelConfig,
    *,
    mlp: Callable[[str, ModelConfig], dict[str, VllmTensor]] = dense_mlp_parameters,
) -> dict[str, VllmTensor]:
    """Return vLLM's parameters by name. A tied ``lm_head`` is the embedding and not listed."""
    hidden, vocab = (model.hidden_size,), model.vocab_size
    table = vllm_single("model.embed_tokens.weight", vocab, hidden, shard_dim=ShardDim.ROWS, padded=True)
    for index in range(model.num_layers):
        layer = f"model.layers.{index}."
        table |= _attention_parameters(layer, model)
        table |= vllm_single(layer + "post_attention_layernorm.weight", model.hidden_size)
        table |= mlp(layer, model)
    table |= vllm_single("model.norm.weight", model.hidden_size)
    if not model.tie_embeddings:
        table |= vllm_single("lm_head.weight", vocab, hidden, shard_dim=ShardDim.ROWS, padded=True)
    return table


def megatron_single(
    name: str,
    rows: int,
    tail: Shape = (),
    *,
    shard_dim: ShardDim = ShardDim.NONE,
    padded: bool = False,
    experts: int = 0,
) -> MegatronTensor:
    """Return the entry of a Megatron tensor that is a single canonical tensor."""
    return MegatronTensor(
        parts=(FusedPart(name=name, rows=rows),), tail=tail, shard_dim=shard_dim, padded=padded, experts=experts
    )


def vllm_single(
    name: str,
    rows: int,
    tail: Shape = (),
    *,
    shard_dim: ShardDim = ShardDim.NONE,
    heads: int | None = None,
    padded: bool = False,
) -> dict[str, VllmTensor]:
    """Return the entry of a vLLM parameter that is a single canonical tensor with the same name."""
    return {
        name: VllmTensor(
            parts=(StackedPart(name=name, rows=rows),), tail=tail, shard_dim=shard_dim, heads=heads, padded=padded
        )
    }


def _attention(mcore: str, hf: str, model: ModelConfig) -> dict[str, MegatronTensor]:
    head, groups, hidden = model.kv_channels, model.num_query_groups, model.hidden_size
    attention, width = hf + "self_attn.", model.num_attention_heads * model.kv_channels

    def qkv(end: str, tail: Shape) -> MegatronTensor:
        rows = {"q": model.num_attention_heads // groups * head, "k": head, "v": head}
        parts = tuple(FusedPart(name=f"{attention}{letter}_proj.{end}", rows=n) for letter, n in rows.items())
        return MegatronTensor(groups=groups, parts=parts, tail=tail, shard_dim=ShardDim.GROUPS)

    table = {mcore + "linear_qkv.layer_norm_weight": megatron_single(hf + "input_layernorm.weight", hidden)}
    table[mcore + "linear_qkv.weight"] = qkv("weight", (hidden,))
    if model.qkv_bias:
        table[mcore + "linear_qkv.bias"] = qkv("bias", ())
    if model.qk_norm:
        table[mcore + "q_layernorm.weight"] = megatron_single(attention + "q_norm.weight", head)
        table[mcore + "k_layernorm.weight"] = megatron_single(attention + "k_norm.weight", head)
    table[mcore + "linear_proj.weight"] = megatron_single(
        attention + "o_proj.weight", hidden, (width,), shard_dim=ShardDim.COLUMNS
    )
    return table


def _attention_parameters(layer: str, model: ModelConfig) -> dict[str, VllmTensor]:
    heads, groups, head = model.num_attention_heads, model.num_query_groups, model.kv_channels
    attention, hidden = layer + "self_attn.", model.hidden_size

    def qkv(end: str, tail: Shape) -> VllmTensor:
        q = StackedPart(name=f"{attention}q_proj.{end}", rows=heads * head, heads=heads)
        k, v = (
            StackedPart(name=f"{attention}{letter}_proj.{end}", rows=groups * head, heads=groups, replicated=True)
            for letter in "kv"
        )
        return VllmTensor(parts=(q, k, v), tail=tail, shard_dim=ShardDim.ROWS)

    table = vllm_single(layer + "input_layernorm.weight", hidden)
    table[attention + "qkv_proj.weight"] = qkv("weight", (hidden,))
    if model.qkv_bias:
        table[attention + "qkv_proj.bias"] = qkv("bias", ())
    if model.qk_norm:
        table |= vllm_single(attention + "q_norm.weight", head) | vllm_single(attention + "k_norm.weight", head)
    return table | vllm_single(
        attention + "o_proj.weight", hidden, (heads * head,), shard_dim=ShardDim.COLUMNS, heads=heads
    )
