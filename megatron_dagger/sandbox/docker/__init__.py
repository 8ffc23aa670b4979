"""The Docker engine: a container per sandbox."""

from megatron_dagger.sandbox.docker.daemon import DockerHost
from megatron_dagger.sandbox.docker.images import ImageStore
from megatron_dagger.sandbox.docker.sandbox import DockerLimits, DockerSandbox

__all__ = ["DockerHost", "DockerLimits", "DockerSandbox", "ImageStore"]
