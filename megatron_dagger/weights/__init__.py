"""The bridge: the trainer's Megatron weights, in canonical Hugging Face names, brought to vLLM."""
