"""DAgger for long-horizon language-model agents, on Megatron-Core and vLLM."""

__version__ = "0.1.0"
