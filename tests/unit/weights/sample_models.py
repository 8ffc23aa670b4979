"""Small models of every family, for the tests of the weight map and of the plan."""

from typing import Any

from hypothesis import strategies as st

from megatron_dagger.config import ModelConfig

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe")


def sample_model(family: str, **settings: Any) -> ModelConfig:
    """A small model; the hidden size is the heads' unless ``settings`` say otherwise."""
    heads, head = settings.setdefault("num_attention_heads", 4), settings.setdefault("kv_channels", 2)
    defaults: dict[str, Any] = {"family": family, "hidden_size": heads * head, "num_layers": 2, "vocab_size": 70}
    if family == "qwen3_moe":
        defaults |= {"num_moe_experts": 4, "moe_ffn_hidden_size": 4, "moe_router_topk": 1}
    return ModelConfig(**(defaults | {"ffn_hidden_size": 8} | settings))


@st.composite
def sample_models(draw: Any) -> ModelConfig:
    """Any family, with odd sizes."""
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
