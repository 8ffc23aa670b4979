"""Weight sync: Megatron's weights, under canonical Hugging Face names, into vLLM. See the README of this folder."""
