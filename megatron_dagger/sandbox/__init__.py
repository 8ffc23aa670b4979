"""Sandboxes isolate the commands of an untrusted agent. This package holds the contract; each engine has a folder."""

from megatron_dagger.sandbox.base import CommandResult, EnvironmentBroken, FileSandbox, Sandbox, SandboxLimits

__all__ = ["CommandResult", "EnvironmentBroken", "FileSandbox", "Sandbox", "SandboxLimits"]
