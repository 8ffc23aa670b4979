"""What the families share: Megatron-Core's GPTModel, the Hugging Face decoder, and vLLM's.

Names are global: layer numbers count over all pipeline stages. Three layouts differ between Megatron
and Hugging Face:

- ``linear_qkv`` holds, for each query group, that group's query heads, its key head, its value head
  (``megatron/core/transformer/attention.py``); its bias likewise;
- ``linear_fc1`` holds the gate's rows, then the up projection's, a tensor-parallel rank its share of
  each (``megatron/core/transformer/mlp.py``);
- embedding and output layer may carry padding rows after the vocabulary.

With tied embeddings no side has an output layer of its own: what Megatron's last pipeline stage has
under that name is a copy of the embedding (``megatron/core/models/gpt/gpt_model.py``).

A family that is a dense decoder is these tables with its switches; another gives its own ``mlp``.
Both take the prefixes of a layer's names on both sides.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_dagger.config.model import ModelConfig
from megatron_dagger.weights.blocks import Cut
from megatron_dagger.weights.families.megatron_tensor import Layout, Part, Shape
from megatron_dagger.weights.families.vllm_tensor import Parameter, Piece

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"

# The local spec's own norms, which Transformer Engine fuses into the linear after them
# (megatron/core/models/gpt/gpt_layer_specs.py).
INPUT_NORM = {r"\.input_layernorm\.weight$": ".self_attention.linear_qkv.layer_norm_weight"}
MLP_NORM = {r"\.pre_mlp_layernorm\.weight$": ".mlp.linear_fc1.layer_norm_weight"}


def dense_mlp(ours: str, theirs: str, model: ModelConfig) -> dict[str, Layout]:
    """Megatron's MLP of a layer and the norm before it."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    gate, up = (Part(name=f"{theirs}mlp.{name}_proj.weight", rows=ffn) for name in ("gate", "up"))
    norm, down = theirs + "post_attention_layernorm.weight", theirs + "mlp.down_proj.weight"
    return {
        ours + "mlp.linear_fc1.layer_norm_weight": plain(norm, hidden),
        ours + "mlp.linear_fc1.weight": Layout(parts=(gate, up), tail=(hidden,), cut=Cut.ROWS),
        ours + "mlp.linear_fc2.weight": plain(down, hidden, (ffn,), cut=Cut.COLUMNS),
    }


def dense_mlp_parameters(layer: str, model: ModelConfig) -> dict[str, Parameter]:
    """vLLM's MLP of a layer."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    gate, up = (Piece(name=f"{layer}mlp.{name}_proj.weight", rows=ffn) for name in ("gate", "up"))
    return {
        layer + "mlp.gate_up_proj.weight": Parameter(pieces=(gate, up), tail=(hidden,), cut=Cut.ROWS),
        **same(layer + "mlp.down_proj.weight", hidden, (ffn,), cut=Cut.COLUMNS),
    }


def megatron(
    model: ModelConfig,
    *,
    qkv_bias: bool = False,
    qk_norm: bool = False,
    mlp: Callable[[str, str, ModelConfig], dict[str, Layout]] = dense_mlp,
) -> dict[str, Layout]:
    """Each global Megatron name (Transformer Engine's spelling) and its layout."""
    hidden, vocab = (model.hidden_size,), model.vocab_size
    table = {EMBEDDING: plain("model.embed_tokens.weight", vocab, hidden, cut=Cut.ROWS, padded=True)}
    for index in range(model.num_layers):
        ours, theirs = f"decoder.layers.{index}.", f"model.layers.{index}."
        table |= _attention(ours + "self_attention.", theirs, model, qkv_bias=qkv_bias, qk_norm=qk_norm)
        table |= mlp(ours, theirs, model)
    table["decoder.final_layernorm.weight"] = plain("model.norm.weight", model.hidden_size)
    if not model.tie_embeddings:
        table[OUTPUT_LAYER] = plain("lm_head.weight", vocab, hidden, cut=Cut.ROWS, padded=True)
    return table


def vllm(
    model: ModelConfig,
    *,
    qkv_bias: bool = False,
    qk_norm: bool = False,
    mlp: Callable[[str, ModelConfig], dict[str, Parameter]] = dense_mlp_parameters,
) -> dict[str, Parameter]:
    """Each of vLLM's parameters and its make-up; a tied ``lm_head`` is the embedding and not listed."""
    hidden, vocab = (model.hidden_size,), model.vocab_size
    table = same("model.embed_tokens.weight", vocab, hidden, cut=Cut.ROWS, padded=True)
    for index in range(model.num_layers):
        layer = f"model.layers.{index}."
        table |= _attention_parameters(layer, model, qkv_bias=qkv_bias, qk_norm=qk_norm)
        table |= same(layer + "post_attention_layernorm.weight", model.hidden_size)
        table |= mlp(layer, model)
    table |= same("model.norm.weight", model.hidden_size)
    if not model.tie_embeddings:
        table |= same("lm_head.weight", vocab, hidden, cut=Cut.ROWS, padded=True)
    return table


def plain(
    name: str, rows: int, tail: Shape = (), *, cut: Cut = Cut.NONE, padded: bool = False, experts: int = 0
) -> Layout:
    """A Megatron tensor that is one canonical tensor."""
    return Layout(parts=(Part(name=name, rows=rows),), tail=tail, cut=cut, padded=padded, experts=experts)


def same(
    name: str, rows: int, tail: Shape = (), *, cut: Cut = Cut.NONE, heads: int | None = None, padded: bool = False
) -> dict[str, Parameter]:
    """A parameter of vLLM that is one canonical tensor, of the same name."""
    return {name: Parameter(pieces=(Piece(name=name, rows=rows),), tail=tail, cut=cut, heads=heads, padded=padded)}


def _attention(ours: str, theirs: str, model: ModelConfig, *, qkv_bias: bool, qk_norm: bool) -> dict[str, Layout]:
    head, groups, hidden = model.kv_channels, model.num_query_groups, model.hidden_size
    attention, width = theirs + "self_attn.", model.num_attention_heads * model.kv_channels

    def qkv(end: str, tail: Shape) -> Layout:
        rows = {"q": model.num_attention_heads // groups * head, "k": head, "v": head}
        parts = tuple(Part(name=f"{attention}{letter}_proj.{end}", rows=n) for letter, n in rows.items())
        return Layout(groups=groups, parts=parts, tail=tail, cut=Cut.GROUPS)

    table = {ours + "linear_qkv.layer_norm_weight": plain(theirs + "input_layernorm.weight", hidden)}
    table[ours + "linear_qkv.weight"] = qkv("weight", (hidden,))
    if qkv_bias:
        table[ours + "linear_qkv.bias"] = qkv("bias", ())
    if qk_norm:
        table[ours + "q_layernorm.weight"] = plain(attention + "q_norm.weight", head)
        table[ours + "k_layernorm.weight"] = plain(attention + "k_norm.weight", head)
    table[ours + "linear_proj.weight"] = plain(attention + "o_proj.weight", hidden, (width,), cut=Cut.COLUMNS)
    return table


def _attention_parameters(layer: str, model: ModelConfig, *, qkv_bias: bool, qk_norm: bool) -> dict[str, Parameter]:
    heads, groups, head = model.num_attention_heads, model.num_query_groups, model.kv_channels
    attention, hidden = layer + "self_attn.", model.hidden_size

    def qkv(end: str, tail: Shape) -> Parameter:
        q = Piece(name=f"{attention}q_proj.{end}", rows=heads * head, heads=heads)
        k, v = (
            Piece(name=f"{attention}{letter}_proj.{end}", rows=groups * head, heads=groups, replicated=True)
            for letter in "kv"
        )
        return Parameter(pieces=(q, k, v), tail=tail, cut=Cut.ROWS)

    table = same(layer + "input_layernorm.weight", hidden)
    table[attention + "qkv_proj.weight"] = qkv("weight", (hidden,))
    if qkv_bias:
        table[attention + "qkv_proj.bias"] = qkv("bias", ())
    if qk_norm:
        table |= same(attention + "q_norm.weight", head) | same(attention + "k_norm.weight", head)
    return table | same(attention + "o_proj.weight", hidden, (heads * head,), cut=Cut.COLUMNS, heads=heads)
