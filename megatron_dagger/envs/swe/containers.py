"""The containers of SWE tasks: one per episode and per judged patch, made from the task's image."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from megatron_dagger.config import SweConfig
from megatron_dagger.envs.swe.judge import OpenSandbox
from megatron_dagger.envs.swe.task import SweTask
from megatron_dagger.sandbox.docker.daemon import DockerHost
from megatron_dagger.sandbox.docker.images import ImageStore
from megatron_dagger.sandbox.docker.sandbox import DockerLimits, DockerSandbox

OUTPUT_BYTES_PER_CHARACTER = 4  # UTF-8's longest character: an observation's characters always fit


def open_containers(swe: SweConfig, owner: Path, stack: ExitStack) -> tuple[ImageStore, OpenSandbox]:
    """Connect to the Docker daemon; return the store of images, and a function that opens a task's container.

    Containers carry ``owner``, resolved, as a label. Containers of killed processes are removed at once, those of this
    process when ``stack`` closes. Raises EnvironmentBroken if the daemon cannot be reached.
    """
    host = stack.enter_context(DockerHost(str(owner.resolve()), swe.docker_url))
    host.reap()
    stack.callback(host.remove_own)
    images = stack.enter_context(ImageStore(host, disk_budget_mib=swe.image_budget_mib))
    limits = DockerLimits(
        timeout_s=swe.command_timeout_s,
        memory_mib=swe.memory_mib,
        disk_mib=swe.disk_mib,
        processes=swe.processes,
        cpus=swe.cpus,
        output_bytes=OUTPUT_BYTES_PER_CHARACTER * swe.observation_characters,
    )

    def open_sandbox(task: SweTask) -> DockerSandbox:
        return DockerSandbox(host, task.image, limits, root=task.workdir, images=images)

    return images, open_sandbox
