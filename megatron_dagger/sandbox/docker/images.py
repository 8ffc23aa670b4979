"""The images that a run's containers are made of: pulled ahead, a few at a time, and evicted under a disk budget.

An image that is there is not pulled. Evicted are only images that were asked of this store, the least
recently used first, those that were pulled ahead and not used yet last, and none that a container is made of
or that somebody holds. Nothing is pulled ahead while the budget is spent.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

from megatron_dagger.envs.base import EnvironmentBroken
from megatron_dagger.sandbox.docker.daemon import DockerHost, broken_as, is_missing

PULL_ATTEMPTS = 3
FIRST_PAUSE_S = 2.0  # between attempts, doubled each time
DISK_USE_WAIT_S, DISK_USE_PAUSE_S = 120.0, 0.2

logger = logging.getLogger(__name__)


class ImageStore:
    """Images of one daemon; safe to use from many threads. ``disk_budget_mib`` is for all of its layers."""

    def __init__(self, host: DockerHost, *, disk_budget_mib: int = 200_000, concurrent_pulls: int = 4):
        self._host = host
        self._budget_bytes = disk_budget_mib << 20
        self._threads = ThreadPoolExecutor(concurrent_pulls, thread_name_prefix="pull")
        self._lock = threading.Lock()
        self._pulls: dict[str, Future[None]] = {}
        self._used: dict[str, float] = {}
        self._held: dict[str, int] = {}
        self._awaited: set[str] = set()  # pulled ahead, and held by nobody since

    def prefetch(self, images: Iterable[str]) -> None:
        """Begin to bring images here, and return at once; what fails is told to those who ask for the image."""
        for image in dict.fromkeys(images):
            self._pull(image, ahead=True)

    @contextlib.contextmanager
    def hold(self, image: str) -> Iterator[str]:
        """Have an image here for the length of a with block. EnvironmentBroken says why it cannot be had."""
        with self._lock:
            self._held[image] = self._held.get(image, 0) + 1
            self._awaited.discard(image)
        try:
            self._pull(image).result()
            if not is_here(self._host, image):  # evicted since it was pulled, or not pulled for want of room
                self._pull(image, again=True).result()
            yield image
        finally:
            with self._lock:
                self._held[image] -= 1
                self._used[image] = time.monotonic()

    def close(self) -> None:
        """Begin no more pulls; those under way go on in the daemon."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _pull(self, image: str, *, again: bool = False, ahead: bool = False) -> Future[None]:
        with self._lock:
            known = self._pulls.get(image)
            failed = known is not None and known.done() and known.exception() is not None
            if known is None or again or (failed and not ahead):
                self._used[image] = time.monotonic()
                if ahead:
                    self._awaited.add(image)
                known = self._pulls[image] = self._threads.submit(self._bring, image, ahead)
            return known

    def _bring(self, image: str, ahead: bool) -> None:
        if is_here(self._host, image) or (ahead and self._layers_bytes() > self._budget_bytes):
            return
        pause_s = FIRST_PAUSE_S
        for attempt in range(1, PULL_ATTEMPTS + 1):
            try:
                with broken_as(f"image {image} is not here and cannot be pulled"):
                    self._host.client.images.pull(*_name_and_tag(image))
                break
            except EnvironmentBroken as error:
                if is_missing(error) or attempt == PULL_ATTEMPTS:
                    raise
                logger.warning("%s; trying again in %.0f s", error, pause_s)
                time.sleep(pause_s)
                pause_s *= 2
        self.evict()

    def evict(self) -> list[str]:
        """Remove images until the budget is kept, or none is left that may go; their names."""
        evicted = []
        while self._layers_bytes() > self._budget_bytes:
            with self._lock:
                idle = [image for image in self._used if not self._held.get(image)]
                if not idle:
                    logger.warning("images take more than %d MiB, and all are in use", self._budget_bytes >> 20)
                    break
                image = min(idle, key=lambda image: (image in self._awaited, self._used[image]))
                del self._used[image]
                self._awaited.discard(image)
                self._pulls.pop(image, None)
            if self._remove(image):
                evicted.append(image)
        return evicted

    def _remove(self, image: str) -> bool:
        try:
            with broken_as(f"image {image} cannot be removed"):
                self._host.client.api.remove_image(image)
        except EnvironmentBroken as error:  # it is gone, or a container is made of it
            logger.info("%s", error)
            return False
        return True

    def _layers_bytes(self) -> int:
        deadline = time.monotonic() + DISK_USE_WAIT_S
        while True:
            try:
                with broken_as("the daemon's disk use cannot be read"):
                    usage: Mapping[str, Any] = self._host.client.api.df()
                return int(usage["LayersSize"] or 0)
            except EnvironmentBroken as error:  # the daemon answers one who asks for it at a time
                if "already running" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(DISK_USE_PAUSE_S)


def is_here(host: DockerHost, image: str) -> bool:
    """Whether the daemon has the image."""
    try:
        with broken_as(f"image {image} cannot be looked up"):
            host.client.api.inspect_image(image)
    except EnvironmentBroken as error:
        if is_missing(error):
            return False
        raise
    return True


def _name_and_tag(image: str) -> tuple[str, str | None]:
    """As the SDK wants them: a registry's port is no tag, and a digest stays with the name."""
    name, colon, tag = image.rpartition(":")
    if "@" in image or not colon or "/" in tag:
        return image, None if "@" in image else "latest"
    return name, tag
