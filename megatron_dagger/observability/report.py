"""``report.html``: one self-contained page, which loads nothing from anywhere.

The page's style and script lie beside this file. Texts of models and commands are untrusted. They are embedded as JSON
that contains no ``<``, and the script inserts them as text only. The page's content security policy admits only its
own script, by hash, and no connection.
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

from megatron_dagger.observability.episode_source import EpisodeSource
from megatron_dagger.observability.report_data import gather
from megatron_dagger.observability.rundir import read_run
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
    """Write the page of a run, finished or not, to ``path`` (default: RUN/report.html), and return the path.

    ``data`` and ``evaluations`` are the run's stores; without them the page has no episodes. At most ``max_episodes``
    episodes are embedded. Raises NoRunError if ``run_dir`` is not a run directory.
    """
    run = read_run(run_dir)
    content = gather(run, data, evaluations, max_episodes=max_episodes)
    path = path or run.path / "report.html"
    write_text(path, render(content))
    logger.info("wrote %s: %d rounds, %d of %d episodes", path, len(content["rounds"]),
                len(content["episodes"]), content["episodes_in_all"])  # fmt: skip
    return path


def render(content: dict[str, Any]) -> str:
    """Return the page that shows the output of ``gather``."""
    folder = resources.files("megatron_dagger.observability")
    template, style, script = (
        folder.joinpath(name).read_text(encoding="utf-8") for name in ("report.html", "report.css", "report.js")
    )
    # with "<" a text could end the script element or start a comment in it
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
    for name, part in parts.items():  # the data goes in last, so no placeholder in it is replaced
        page = page.replace(name, part)
    return page
