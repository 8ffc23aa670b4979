"""Sandboxes: isolated places in which an untrusted agent's commands run. The contract; each engine has a folder."""

from megatron_dagger.sandbox.base import CommandResult, EnvironmentBroken, FileSandbox, Sandbox, SandboxLimits

__all__ = ["CommandResult", "EnvironmentBroken", "FileSandbox", "Sandbox", "SandboxLimits"]
