"""Logging of a process: readable on the console, complete in a file of the run directory."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

FORMAT = "%(asctime)s %(levelname)-7s %(name)s[%(process)d] %(message)s"
DRIVER = "driver"  # who works on a run alone, not as one of its workers
_OURS = "_megatron_dagger_handler"


def log_file(run_dir: Path, name: str) -> Path:
    """The log of the process that works on a run as ``name``."""
    return run_dir / "logs" / f"{name}.log"


def setup_logging(run_dir: Path | None = None, *, name: str = DRIVER, level: int | str = logging.INFO) -> Path | None:
    """Log to stderr at ``level`` and, with a run directory, to its ``log_file`` in full (DEBUG of ours).

    Returns the log file. Calling it again replaces what it set up before. Colours and rich's layout
    only on a terminal: a log that goes to a file or to SLURM stays plain lines.
    """
    root = logging.getLogger()
    for handler in [h for h in root.handlers if getattr(h, _OURS, False)]:
        root.removeHandler(handler)
        handler.close()
    console: logging.Handler
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        console = RichHandler(console=Console(stderr=True), show_path=False, markup=False, rich_tracebacks=True)
    else:
        console = logging.StreamHandler(sys.stderr)
        console.setFormatter(logging.Formatter(FORMAT))
    console.setLevel(level)
    handlers: list[logging.Handler] = [console]
    path = None
    if run_dir is not None:
        path = log_file(run_dir, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _LogFile(path, encoding="utf-8", errors="backslashreplace")
        file.setFormatter(logging.Formatter(FORMAT))
        handlers.append(file)
    for handler in handlers:
        setattr(handler, _OURS, True)
        root.addHandler(handler)
    root.setLevel(min(logging.INFO, console.level))
    logging.getLogger("megatron_dagger").setLevel(logging.DEBUG)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # else a line for each question to the teacher
    return path


class _LogFile(logging.FileHandler):
    """Says once that it cannot write: a full disk must not bury the console in tracebacks."""

    _said = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not self._said:
            self._said = True
            sys.stderr.write(f"cannot write {self.baseFilename}: {sys.exc_info()[1]}\n")
