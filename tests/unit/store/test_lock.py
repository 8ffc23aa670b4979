"""Locks between processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_dagger.store.errors import StoreError
from megatron_dagger.store.lock import exclusive


def test_only_one_thread_holds_the_lock(tmp_path: Path) -> None:
    inside, peak = 0, 0

    def work() -> None:
        nonlocal inside, peak
        for _ in range(5):
            with exclusive(tmp_path / "lock"):
                inside += 1
                peak = max(peak, inside)
                time.sleep(0.001)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert peak == 1


def test_the_timeout_names_the_holder_and_a_dead_holder_frees_the_lock(tmp_path: Path) -> None:
    code = (
        "import sys, time; from megatron_dagger.store.lock import exclusive\n"
        "with exclusive(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "lock")],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with (
        pytest.raises(StoreError, match=rf"lock: still locked after 0\.05 s; the holder is process {holder.pid}"),
        exclusive(tmp_path / "lock", deadline_s=0.05),
    ):
        pass
    holder.kill()
    holder.communicate(timeout=30)
    with exclusive(tmp_path / "lock", deadline_s=0.05):
        pass
