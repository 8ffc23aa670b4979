"""``report.html``: one page that holds everything it needs, and fetches nothing.

The page's style and script lie beside this file. Texts of models and commands are untrusted: they
travel as JSON in which no ``<`` occurs, the script puts them on the page as text only, and the page's
content policy admits no script but its own (by its hash) and no connection at all.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import logging
from importlib import resources
from pathlib import Path
from typing import Any

from megatron_dagger.observability.report_data import gather
from megatron_dagger.observability.rundir import read_run
from megatron_dagger.observability.source import EpisodeSource
from megatron_dagger.store.atomic import write_text

logger = logging.getLogger(__name__)


def write_report(
    run_dir: Path,
    *,
    data: EpisodeSource | None = None,
    evaluations: EpisodeSource | None = None,
    path: Path | None = None,
    max_episodes: int = 200,
) -> Path:
    """Write the page of a run, finished or not, to ``path`` (``report.html`` in it); returns the path.

    ``data`` and ``evaluations`` are the run's stores; without them the page has no episodes.
    Raises NoRunError if ``run_dir`` is no run directory.
    """
    run = read_run(run_dir)
    content = gather(run, data, evaluations, max_episodes=max_episodes)
    path = path or run.path / "report.html"
    write_text(path, render(content))
    logger.info("wrote %s: %d rounds, %d episodes of %d", path, len(content["rounds"]),
                len(content["episodes"]), content["episodes_in_all"])  # fmt: skip
    return path


def render(content: dict[str, Any]) -> str:
    """The page for what ``gather`` gave."""
    folder = resources.files("megatron_dagger.observability")
    template, style, script = (
        folder.joinpath(name).read_text(encoding="utf-8") for name in ("report.html", "report.css", "report.js")
    )
    # "<" would let a text end the script element; "<!--" would start a comment in it
    data = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
    checksum = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        "{{title}}": html.escape(content["name"]),
        "{{script-hash}}": f"sha256-{checksum}",
        "{{style}}": style,
        "{{script}}": script,
        "{{data}}": data,
    }
    page = template
    for name, part in parts.items():  # data goes in last: what is in it is not looked at again
        page = page.replace(name, part)
    return page
