"""Logging of a process."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_dagger.observability.logs import setup_logging


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("megatron_dagger")
    before = (root.handlers[:], root.level, ours.level)
    yield
    for handler in root.handlers[:]:
        if handler not in before[0]:
            root.removeHandler(handler)
            with contextlib.suppress(OSError):  # /dev/full
                handler.close()
    root.setLevel(before[1])
    ours.setLevel(before[2])


def test_the_console_gets_plain_lines_and_the_file_gets_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = setup_logging(tmp_path, name="worker-1")
    assert path == tmp_path / "logs" / "worker-1.log"
    logger = logging.getLogger("megatron_dagger.somewhere")
    logger.debug("a detail")
    logger.info("[bold]not markup[/bold]")
    logging.getLogger("noisy.library").debug("not ours")
    content = path.read_text()
    assert "a detail" in content
    assert "[bold]not markup[/bold]" in content
    assert "not ours" not in content
    console = capsys.readouterr().err
    assert "a detail" not in console
    assert "INFO    megatron_dagger.somewhere" in console
    assert "\x1b" not in console


def test_a_second_call_replaces_the_handlers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):
        path = setup_logging(tmp_path)
    logging.getLogger("megatron_dagger").info("once")
    assert path is not None
    assert path.read_text().count("once") == 1
    assert capsys.readouterr().err.count("once") == 1


def test_an_unwritable_log_file_is_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "driver.log").symlink_to("/dev/full")
    setup_logging(tmp_path)
    for number in range(3):
        logging.getLogger("megatron_dagger").warning("line %d", number)
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "No space left" in line] == [lines[1]]
    assert "logs/driver.log" in lines[1]
    assert len(lines) == 4


def test_a_log_folder_that_is_removed_does_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(setup_logging(tmp_path / "run"))
    next(h for h in logging.getLogger().handlers if getattr(h, "baseFilename", "") == path).close()
    shutil.rmtree(tmp_path / "run")
    for _ in range(2):
        logging.getLogger("megatron_dagger").warning("still working")
    assert capsys.readouterr().err.count("cannot write") == 1
