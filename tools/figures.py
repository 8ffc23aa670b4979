"""Draw the pictures of the README from a run: SVG files and, with --report, screenshots of the report page.

    .venv/bin/python -m tools.figures --run runs/quickstart --out .github/assets
    .venv/bin/python -m tools.figures --run runs/quickstart --sft runs/quickstart-sft --out .github/assets

Each picture comes in a light and a dark version. --report needs Chromium (Debian: apt-get install chromium). The last
line is RESULT {json}, with the size of every file in bytes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_dagger.observability.report import write_report
from megatron_dagger.observability.rundir import read_run
from megatron_dagger.store.aggregated import DataStore
from megatron_dagger.store.atomic import write_text
from tools.figure_parts.loop import draw_loop
from tools.figure_parts.rounds import draw_rounds, read_curves
from tools.figure_parts.svg import DARK, LIGHT, Theme
from tools.figure_parts.tree import choose_episode, draw_tree

REPORT_SIZE = (1160, 748)  # pixels: the top third of the page
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER_TIMEOUT_S = 120


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, metavar="RUN", help="a run directory with results")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write the pictures")
    parser.add_argument("--sft", type=Path, metavar="RUN", help="a line for the SFT arm (tools.study.sft_arm)")
    parser.add_argument("--report", action="store_true", help="also take screenshots of the report page")
    arguments = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if arguments.report and browser is None:
        parser.error("--report needs chromium on the PATH (Debian: apt-get install chromium)")
    try:
        paths = write_figures(arguments.run, arguments.out, arguments.sft)
    except ValueError as error:
        parser.error(str(error))
    if arguments.report and browser is not None:
        paths += screenshot_report(arguments.run, arguments.out, browser)
    for path in paths:
        print(path)
    print("RESULT " + json.dumps({path.name: path.stat().st_size for path in paths}))
    return 0


def write_figures(run_dir: Path, out: Path, sft: Path | None = None) -> list[Path]:
    """Write the SVG files and return their paths. Raises ValueError if a run has no results to draw."""
    run = read_run(run_dir)
    store = DataStore.open(run_dir / "data.zarr")
    curves, sft_curves = read_curves(run), read_curves(read_run(sft)) if sft else None
    episode = choose_episode(episode for index in store.rounds() for episode in store.episodes(index))
    paths = []
    for theme in (LIGHT, DARK):
        drawings = {
            "rounds": draw_rounds(curves, theme, sft_curves),
            "loop": draw_loop(theme),
            "tree": draw_tree(episode, theme),
        }
        for name, drawing in drawings.items():
            paths.append(out / f"{name}-{theme.name}.svg")
            write_text(paths[-1], drawing.svg())
    return paths


def screenshot_report(run_dir: Path, out: Path, browser: str) -> list[Path]:
    """Write PNG files with the top of the run's report page, and return their paths."""
    out.mkdir(parents=True, exist_ok=True)
    data, evaluations = (DataStore.open(run_dir / f"{name}.zarr") for name in ("data", "evaluations"))
    with tempfile.TemporaryDirectory(prefix="figures-") as folder:
        page = write_report(run_dir, data=data, evaluations=evaluations, path=Path(folder) / "report.html")
        return [_screenshot(page, out / f"report-{theme.name}.png", theme, browser) for theme in (LIGHT, DARK)]


def _screenshot(page: Path, path: Path, theme: Theme, browser: str) -> Path:
    scheme = 0 if theme is DARK else 1  # Chromium's numbers of prefers-color-scheme
    subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            f"--blink-settings=preferredColorScheme={scheme}", f"--window-size={REPORT_SIZE[0]},{REPORT_SIZE[1]}",
            f"--user-data-dir={page.parent / 'browser'}", f"--screenshot={path.absolute()}", page.as_uri(),
        ],
        check=True, capture_output=True, timeout=BROWSER_TIMEOUT_S,
    )  # fmt: skip
    return path


if __name__ == "__main__":
    sys.exit(main())
