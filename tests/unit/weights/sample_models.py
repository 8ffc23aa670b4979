"""Small models of every family and layouts of both sides, for the tests of the weight maps, plans and digests."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from megatron_dagger.config import ModelConfig, families
from megatron_dagger.weights.layouts import SourceLayout, TargetLayout

VOCAB, PADDED = 130, 144  # vLLM pads to 192
FAMILIES = tuple(families.FAMILIES)


def sample_model(family: str, **settings: Any) -> ModelConfig:
    """Return a small model. By default the hidden size is heads x head size."""
    heads, head = settings.setdefault("num_attention_heads", 4), settings.setdefault("kv_channels", 2)
    defaults: dict[str, Any] = {"family": family, "hidden_size": heads * head, "num_layers": 2, "vocab_size": 70}
    if family == "qwen3_moe":
        defaults |= {"num_moe_experts": 4, "moe_ffn_hidden_size": 4, "moe_router_topk": 2}
    return ModelConfig(**(defaults | {"ffn_hidden_size": 8} | settings))


@st.composite
def sample_models(draw: Any) -> ModelConfig:
    """Draw a model of any family, with odd sizes."""
    family, groups = draw(st.sampled_from(FAMILIES)), draw(st.integers(1, 4))
    heads, head = groups * draw(st.integers(1, 3)), 2 * draw(st.integers(1, 3))
    hidden = {"qwen2": heads * head, "llama": heads * draw(st.integers(1, 3))}.get(family) or draw(st.integers(1, 6))
    settings: dict[str, Any] = {}
    if family == "qwen3_moe":
        experts = draw(st.integers(1, 5))
        settings = {
            "num_moe_experts": experts,
            "moe_router_topk": draw(st.integers(1, experts)),
            "moe_ffn_hidden_size": draw(st.integers(1, 5)),
        }
    return sample_model(
        family,
        num_layers=draw(st.integers(1, 3)),
        hidden_size=hidden,
        ffn_hidden_size=draw(st.integers(1, 5)),
        num_query_groups=groups,
        num_attention_heads=heads,
        kv_channels=head,
        vocab_size=draw(st.integers(1, 9)),
        tie_embeddings=draw(st.booleans()),
        **settings,
    )


def sources(groups: int, experts: bool) -> Iterator[SourceLayout]:
    """Yield the trainer's layouts of the test matrix, for this many query groups."""
    tensor = [tp for tp in range(1, groups + 1) if groups % tp == 0]
    for tp, (pp, vp), dp in itertools.product(tensor, [(1, 1), (2, 2), (4, 1)], [1, 2]):
        layout = SourceLayout(
            padded_vocab_size=PADDED,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vp,
            data_parallel_size=dp,
        )
        yield layout
        if experts and dp == 2:
            yield replace(layout, expert_model_parallel_size=2)  # expert tensor parallelism as the dense one
            if tp > 1:
                yield replace(layout, expert_model_parallel_size=2 * tp, expert_tensor_parallel_size=1)


def targets(groups: int, experts: bool) -> Iterator[TargetLayout]:
    """Yield the engine's layouts of the test matrix: a single rank, a rank per KV head, more ranks than KV heads."""
    for tp in sorted({1, groups, 2 * groups}):
        yield TargetLayout(tensor_parallel_size=tp)
        yield TargetLayout(tensor_parallel_size=tp, replicas=3, enable_expert_parallel=experts)
    if experts:
        for parallel in (False, True):
            yield TargetLayout(tensor_parallel_size=groups, data_parallel_size=2, enable_expert_parallel=parallel)
