"""Sandboxes: isolated places in which an untrusted agent's commands run."""

from megatron_dagger.sandbox.local.bubblewrap import BubblewrapSandbox, bubblewrap_works
from megatron_dagger.sandbox.local.process import ProcessSandbox, SandboxLimits
from megatron_dagger.sandbox.pool import SandboxPool

__all__ = ["BubblewrapSandbox", "ProcessSandbox", "SandboxLimits", "SandboxPool", "bubblewrap_works"]
