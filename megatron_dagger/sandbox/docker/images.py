"""The images of a run's containers: pulled ahead of time, a few at a time, and evicted under a disk budget.

An image that the daemon already has is not pulled. Only images requested from this store are evicted: the least
recently used first, those prefetched but not yet used last, and never one that is held or that a container is made
from. Nothing is prefetched while the budget is exceeded.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

from megatron_dagger.sandbox.base import EnvironmentBroken
from megatron_dagger.sandbox.docker.daemon import DockerHost, broken_as, is_missing

PULL_ATTEMPTS = 3
FIRST_PAUSE_S = 2.0  # between attempts, doubled each time
REFUSED_PAUSE_S = 60.0  # if the registry asks to wait
REFUSED_PATIENCE_S = 3600.0
_REFUSED = re.compile(r"toomanyrequests|too many requests|rate limit", re.IGNORECASE)
DISK_USE_WAIT_S, DISK_USE_PAUSE_S = 120.0, 0.2

logger = logging.getLogger(__name__)


class ImageStore:
    """The images of one daemon; safe to use from many threads. ``disk_budget_mib`` covers all of its layers."""

    def __init__(self, host: DockerHost, *, disk_budget_mib: int = 200_000, concurrent_pulls: int = 4):
        self._host = host
        self._budget_bytes = disk_budget_mib << 20
        self._threads = ThreadPoolExecutor(concurrent_pulls, thread_name_prefix="pull")
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._pulls: dict[str, Future[None]] = {}
        self._used: dict[str, float] = {}
        self._held: dict[str, int] = {}
        self._awaited: set[str] = set()  # prefetched and not held since

    def prefetch(self, images: Iterable[str]) -> None:
        """Start to pull images and return at once; a failure is raised by ``hold``."""
        for image in dict.fromkeys(images):
            self._pull(image, ahead=True)

    @contextlib.contextmanager
    def hold(self, image: str) -> Iterator[str]:
        """Keep an image on this machine during a with block. Raises EnvironmentBroken if it cannot be pulled."""
        with self._lock:
            self._held[image] = self._held.get(image, 0) + 1
            self._awaited.discard(image)
        try:
            self._pull(image).result()
            if not has_image(self._host, image):  # evicted since, or not prefetched for lack of space
                self._pull(image, again=True).result()
            yield image
        finally:
            with self._lock:
                self._held[image] -= 1
                self._used[image] = time.monotonic()

    def close(self) -> None:
        """Start no more pulls; the daemon finishes those in progress."""
        self._closed.set()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _pull(self, image: str, *, again: bool = False, ahead: bool = False) -> Future[None]:
        with self._lock:
            pull = self._pulls.get(image)
            failed = pull is not None and pull.done() and pull.exception() is not None
            if pull is None or again or (failed and not ahead):
                self._used[image] = time.monotonic()
                if ahead:
                    self._awaited.add(image)
                pull = self._pulls[image] = self._threads.submit(self._fetch, image, ahead)
            return pull

    def _fetch(self, image: str, ahead: bool) -> None:
        if has_image(self._host, image) or (ahead and self._layers_bytes() > self._budget_bytes):
            return
        pauses = [FIRST_PAUSE_S * 2**attempt for attempt in range(PULL_ATTEMPTS - 1)]
        end = time.monotonic() + REFUSED_PATIENCE_S
        while True:
            try:
                with broken_as(f"image {image} is missing and cannot be pulled"):
                    self._host.client.images.pull(*_name_and_tag(image))
                break
            except EnvironmentBroken as error:
                refused = _REFUSED.search(str(error)) and time.monotonic() < end
                if is_missing(error) or not (refused or pauses):
                    raise
                pause_s = REFUSED_PAUSE_S if refused else pauses.pop(0)
                advice = " (docker login, or swe.image_prefix for a mirror)" if refused else ""
                logger.warning("%s; trying again in %.0f s%s", error, pause_s, advice)
                self._closed.wait(pause_s)
                if self._closed.is_set():
                    raise
        self.evict()

    def evict(self) -> list[str]:
        """Remove images until the budget is met or no image may be removed; return the removed images."""
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
        except EnvironmentBroken as error:  # it is gone, or a container uses it
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
            except EnvironmentBroken as error:  # the daemon computes it for one caller at a time
                if "already running" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(DISK_USE_PAUSE_S)


def has_image(host: DockerHost, image: str) -> bool:
    """Return whether the daemon has the image."""
    try:
        with broken_as(f"image {image} cannot be looked up"):
            host.client.api.inspect_image(image)
    except EnvironmentBroken as error:
        if is_missing(error):
            return False
        raise
    return True


def _name_and_tag(image: str) -> tuple[str, str | None]:
    """Split an image's name for the SDK's ``pull``: a registry's port is no tag, and a digest stays in the name."""
    name, colon, tag = image.rpartition(":")
    if "@" in image or not colon or "/" in tag:
        return image, None if "@" in image else "latest"
    return name, tag
