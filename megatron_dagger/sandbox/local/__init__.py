"""The local engine: a sandbox server on this machine, isolated by bubblewrap where that works."""

from megatron_dagger.sandbox.local.bubblewrap import BubblewrapSandbox, bubblewrap_works
from megatron_dagger.sandbox.local.pool import SandboxPool
from megatron_dagger.sandbox.local.process import ProcessSandbox

__all__ = ["BubblewrapSandbox", "ProcessSandbox", "SandboxPool", "bubblewrap_works"]
