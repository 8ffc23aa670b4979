"""Sandboxes: isolated places in which an untrusted agent's commands run."""

from megatron_dagger.envs.sandbox.bubblewrap import BubblewrapSandbox, bubblewrap_works
from megatron_dagger.envs.sandbox.pool import SandboxPool
from megatron_dagger.envs.sandbox.process import ProcessSandbox, SandboxLimits

__all__ = ["BubblewrapSandbox", "ProcessSandbox", "SandboxLimits", "SandboxPool", "bubblewrap_works"]
