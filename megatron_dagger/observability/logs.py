"""Logging of a process: INFO on the console, and everything in a file of the run directory."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

FORMAT = "%(asctime)s %(levelname)-7s %(name)s[%(process)d] %(message)s"
DRIVER = "driver"  # the name of a process that works on a run alone, not as a worker
_OURS = "_megatron_dagger_handler"


def log_file(run_dir: Path, name: str) -> Path:
    """Return the log file of the process that works on a run as ``name``."""
    return run_dir / "logs" / f"{name}.log"


def setup_logging(run_dir: Path | None = None, *, name: str = DRIVER, level: int | str = logging.INFO) -> Path | None:
    """Log to stderr at ``level`` and, with a run directory, to its ``log_file``. Return the log file.

    The file also gets this package's DEBUG messages. A second call replaces the handlers of the first. Colours and
    layout appear on a terminal only; a redirected log has plain lines.
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
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs a line for each request to the teacher
    return path


def current_log_file() -> Path | None:
    """Return the file that this process logs to; None if it logs to none."""
    files = [handler.baseFilename for handler in logging.getLogger().handlers if isinstance(handler, _LogFile)]
    return Path(files[0]) if files and Path(files[0]).is_file() else None


class _LogFile(logging.FileHandler):
    """Reports once that it cannot write, because on a full disk each line would print a traceback."""

    _reported = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # the file cannot be opened again: its folder is gone; a log must not end the run
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not self._reported:
            self._reported = True
            sys.stderr.write(f"cannot write {self.baseFilename}: {sys.exc_info()[1]}\n")
