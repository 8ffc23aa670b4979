"""The entries of a Hugging Face config.json: read as Transformers reads them, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_dagger.config.base import ConfigError, require

# Entries that change the model, and the values with which they do not; a missing one and null do not either.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "hidden_act": ("silu",),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([],),
    "partial_rotary_factor": (1,),
    "original_max_position_embeddings": (),  # here it would take precedence over that of RoPE
    "per_layer_config": ({},),
    "quantization_config": (),
}
_ROPE_TYPES = ("default", "yarn")
_DEFAULT_THETA = 10_000.0
_NO_DEFAULT = object()


def check_plain(config: Mapping[str, Any]) -> None:
    """Raise ConfigError, naming the entry, for a feature that is not supported."""
    for name, plain in _PLAIN.items():
        value = config.get(name)
        require(value is None or value in plain, f"{name}={value!r} is not supported")
    kinds = config.get("layer_types") or []
    plain_kinds = isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)
    require(plain_kinds, f"layer_types={kinds!r} is not supported")


def entry(config: Mapping[str, Any], name: str, default: Any = _NO_DEFAULT) -> Any:
    """Return an entry, or its default where it is missing or null. Raises ConfigError if there is none."""
    value = config.get(name)
    if value is None:
        require(default is not _NO_DEFAULT, f"{name} is missing from the config.json")
        return default
    return value


def count(config: Mapping[str, Any], name: str) -> int:
    """Return an entry that counts something. Raises ConfigError unless it is a positive integer."""
    value = entry(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}={value!r} must be a positive integer")
    return value


def experts(config: Mapping[str, Any]) -> int:
    """Return the number of experts, which has two names. Raises ConfigError if they disagree."""
    names = [name for name in ("num_experts", "num_local_experts") if config.get(name) is not None] or ["num_experts"]
    numbers = {count(config, name) for name in names}
    require(len(numbers) == 1, f"num_experts and num_local_experts are {sorted(numbers)}")
    return numbers.pop()


def head_size(config: Mapping[str, Any]) -> int:
    """Return the size of an attention head: ``head_dim``, or the hidden size's share."""
    if config.get("head_dim") is None and config["model_type"] != "qwen3":  # where Transformers has another default
        return count(config, "hidden_size") // count(config, "num_attention_heads")
    return count(config, "head_dim")


def rope_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return RoPE's settings with ``rope_type`` and ``rope_theta``, from old and new files (PreTrainedConfig's rules).

    Raises ConfigError for a type other than plain RoPE and YaRN, for several types and for a base with a fraction.
    """
    stored = config.get("rope_scaling") or config.get("rope_parameters") or {}
    require(isinstance(stored, dict), f"rope_scaling={stored!r} is not supported")
    nested = [name for name, value in stored.items() if isinstance(value, dict)]
    require(not nested, f"rope_parameters by layer type ({', '.join(nested)}) are not supported")
    kind = stored.get("rope_type", stored.get("type", "default"))
    require(kind in _ROPE_TYPES, f"rope_type={kind!r} is not supported")
    theta = stored.get("rope_theta", config.get("rope_theta", _DEFAULT_THETA))
    if isinstance(theta, bool) or not isinstance(theta, int | float):
        raise ConfigError(f"rope_theta={theta!r} must be a number")
    require(isinstance(theta, int) or theta.is_integer(), f"rope_theta={theta!r} is not supported: it has a fraction")
    return {**stored, "rope_type": kind, "rope_theta": int(theta)}
