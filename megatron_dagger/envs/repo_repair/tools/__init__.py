"""What is mounted into the sandbox: these files import nothing of megatron_dagger."""
