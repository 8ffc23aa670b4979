"""The agent's tools: mounted into the sandbox, they import nothing of megatron_dagger."""
