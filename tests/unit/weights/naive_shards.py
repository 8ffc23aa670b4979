"""The tensors of Megatron's and vLLM's ranks, computed naively: loops over heads, rows and ranks.

They follow the two libraries' sources and not the package's own geometry, which the tests check against them.
"""

import math

import numpy as np

PADDING = -1  # the value of Megatron's padding rows, which must not be transferred


def canonical_tensors(model, names, seed=0):
    """Return random canonical tensors that contain neither PADDING nor zeros."""
    generator = np.random.default_rng(seed)
    return {name: generator.integers(1, 2**31, size=shape, dtype=np.int32) for name, shape in names.items()}


def megatron_ranks(model, source, tensors):
    """Return each rank's tensors by global name, with a layer's local experts stacked."""
    tp, pp, vp = (
        source.tensor_model_parallel_size,
        source.pipeline_model_parallel_size,
        source.virtual_pipeline_model_parallel_size,
    )
    stage_layers = [[] for _ in range(pp)]
    layer = 0
    for _ in range(vp):
        for stage in range(pp):
            for _ in range(model.num_layers // (vp * pp)):
                stage_layers[stage].append(layer)
                layer += 1
    ranks = []
    for stage in range(pp):
        for _dp in range(source.data_parallel_size):
            for _cp in range(source.context_parallel_size):
                ranks += [
                    _dense_rank(model, tensors, stage, stage_layers[stage], t, source, last=stage == pp - 1)
                    for t in range(tp)
                ]
    if model.family == "qwen3_moe":
        etp, ep = source.expert_tensor_parallel_size or tp, source.expert_model_parallel_size
        rank, edp = 0, len(ranks) // (etp * ep * pp)
        for stage in range(pp):
            for _ in range(edp):
                for e in range(ep):
                    for t in range(etp):
                        for layer in stage_layers[stage]:
                            ranks[rank] |= _megatron_experts(model, tensors, layer, t, etp, e, ep)
                        rank += 1
        assert rank == len(ranks)
    return ranks


def _dense_rank(model, tensors, stage, layers, t, source, *, last):
    tp, shards = source.tensor_model_parallel_size, {}
    embedding = _padded(tensors["model.embed_tokens.weight"], source.padded_vocab_size)
    if stage == 0:
        shards["embedding.word_embeddings.weight"] = _rows(embedding, t, tp)
    if last:
        shards["decoder.final_layernorm.weight"] = tensors["model.norm.weight"]
        if not model.tie_embeddings:
            shards["output_layer.weight"] = _rows(_padded(tensors["lm_head.weight"], source.padded_vocab_size), t, tp)
        elif source.pipeline_model_parallel_size > 1:
            shards["output_layer.weight"] = _rows(embedding, t, tp)
    for layer in layers:
        mcore, hf = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        attention, norm = hf + "self_attn.", "self_attention.linear_qkv.layer_norm_weight"
        shards[mcore + norm] = tensors[hf + "input_layernorm.weight"]
        for end in ("weight", "bias"):
            if attention + "q_proj." + end in tensors:
                shards[mcore + "self_attention.linear_qkv." + end] = _qkv(model, tensors, attention, end, t, tp)
        for letter in "qk":
            if attention + letter + "_norm.weight" in tensors:
                shards[f"{mcore}self_attention.{letter}_layernorm.weight"] = tensors[f"{attention}{letter}_norm.weight"]
        shards[mcore + "self_attention.linear_proj.weight"] = _columns(tensors[attention + "o_proj.weight"], t, tp)
        norm = tensors[hf + "post_attention_layernorm.weight"]
        if model.family == "qwen3_moe":
            shards[mcore + "pre_mlp_layernorm.weight"] = norm
            shards[mcore + "mlp.router.weight"] = tensors[hf + "mlp.gate.weight"]
            continue
        shards[mcore + "mlp.linear_fc1.layer_norm_weight"] = norm
        gate, up = (tensors[f"{hf}mlp.{name}_proj.weight"] for name in ("gate", "up"))
        shards[mcore + "mlp.linear_fc1.weight"] = np.concatenate([_rows(gate, t, tp), _rows(up, t, tp)])
        shards[mcore + "mlp.linear_fc2.weight"] = _columns(tensors[hf + "mlp.down_proj.weight"], t, tp)
    return shards


def _qkv(model, tensors, attention, end, t, tp):
    """Return the rank's rows of the fused QKV, group by group: query heads, key head, value head."""
    q, k, v = (tensors[f"{attention}{letter}_proj.{end}"] for letter in "qkv")
    head, groups = model.kv_channels, model.num_query_groups
    per_group = model.num_attention_heads // groups
    rows = []
    for group in range(t * groups // tp, (t + 1) * groups // tp):
        for query in range(group * per_group, (group + 1) * per_group):
            rows += [q[query * head + i] for i in range(head)]
        rows += [k[group * head + i] for i in range(head)]
        rows += [v[group * head + i] for i in range(head)]
    return np.stack(rows)


def _megatron_experts(model, tensors, layer, t, etp, e, ep):
    local = model.num_moe_experts // ep
    fc1, fc2 = [], []
    for expert in range(e * local, (e + 1) * local):
        gate, up, down = _expert(tensors, layer, expert)
        fc1.append(np.concatenate([_rows(gate, t, etp), _rows(up, t, etp)]))
        fc2.append(_columns(down, t, etp))
    name = f"decoder.layers.{layer}.mlp.experts."
    return {name + "linear_fc1.weight{}": np.stack(fc1), name + "linear_fc2.weight{}": np.stack(fc2)}


def vllm_ranks(model, target, tensors):
    """Return each rank's parameters, with zeros as vocabulary padding."""
    ranks = []
    for _replica in range(target.replicas):
        for dp in range(target.data_parallel_size):
            for t in range(target.tensor_parallel_size):
                ranks.append(_vllm_rank(model, tensors, target, dp, t))
    return ranks


def _vllm_rank(model, tensors, target, dp, t):
    tp, shards = target.tensor_parallel_size, {}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            shards[name] = _rows(_padded(tensors[name], math.ceil(model.vocab_size / 64) * 64, value=0), t, tp)
    shards["model.norm.weight"] = tensors["model.norm.weight"]
    for i in range(model.num_layers):
        layer = f"model.layers.{i}."
        attention = layer + "self_attn."
        for name in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
            if layer + name + ".weight" in tensors:
                shards[layer + name + ".weight"] = tensors[layer + name + ".weight"]
        for end in ("weight", "bias"):
            if attention + "q_proj." + end in tensors:
                parts = [_heads(model, tensors[f"{attention}{letter}_proj.{end}"], letter, t, tp) for letter in "qkv"]
                shards[attention + "qkv_proj." + end] = np.concatenate(parts)
        shards[attention + "o_proj.weight"] = _columns(tensors[attention + "o_proj.weight"], t, tp)
        if model.family != "qwen3_moe":
            gate, up = (tensors[f"{layer}mlp.{name}_proj.weight"] for name in ("gate", "up"))
            shards[layer + "mlp.gate_up_proj.weight"] = np.concatenate([_rows(gate, t, tp), _rows(up, t, tp)])
            shards[layer + "mlp.down_proj.weight"] = _columns(tensors[layer + "mlp.down_proj.weight"], t, tp)
            continue
        shards[layer + "mlp.gate.weight"] = tensors[layer + "mlp.gate.weight"]
        rank, size = dp * tp + t, target.data_parallel_size * tp
        experts, cut = range(model.num_moe_experts), (rank, size)
        if target.enable_expert_parallel:
            local = model.num_moe_experts // size
            experts, cut = range(rank * local, (rank + 1) * local), (0, 1)
        w13, w2 = [], []
        for expert in experts:
            gate, up, down = _expert(tensors, i, expert)
            w13.append(np.concatenate([_rows(gate, *cut), _rows(up, *cut)]))
            w2.append(_columns(down, *cut))
        shards[layer + "mlp.experts.routed_experts.w13_weight"] = np.stack(w13)
        shards[layer + "mlp.experts.routed_experts.w2_weight"] = np.stack(w2)
    return shards


def _heads(model, tensor, letter, t, tp):
    """Return the rank's heads. A KV head is on several ranks if there are more ranks than KV heads."""
    total = model.num_attention_heads if letter == "q" else model.num_query_groups
    heads = [t * total // tp] if tp > total else range(t * total // tp, (t + 1) * total // tp)
    return np.concatenate([tensor[head * model.kv_channels : (head + 1) * model.kv_channels] for head in heads])


def _expert(tensors, layer, expert):
    name = f"model.layers.{layer}.mlp.experts.{expert}."
    return [tensors[f"{name}{kind}_proj.weight"] for kind in ("gate", "up", "down")]


def _rows(tensor, rank, size):
    n = len(tensor) // size
    return tensor[rank * n : (rank + 1) * n]


def _columns(tensor, rank, size):
    n = tensor.shape[1] // size
    return tensor[:, rank * n : (rank + 1) * n]


def _padded(tensor, rows, value=PADDING):
    whole = np.full((rows, *tensor.shape[1:]), value, tensor.dtype)
    whole[: len(tensor)] = tensor
    return whole
