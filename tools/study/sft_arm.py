"""Run the SFT arm beside a finished run: the same tasks, steps and label limits, but the teacher acts in every turn.

    .venv/bin/python -m tools.study.sft_arm runs/quickstart        writes runs/quickstart-sft; can be resumed

It continues from the run's round 0, which both arms share. ``tools.figures --sft`` draws both.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from megatron_dagger.config import ConfigError, differing, override, to_dict
from megatron_dagger.config.base import leaves
from megatron_dagger.driver.run_dir import load_origin, load_run_config
from megatron_dagger.recipes import find_recipe
from tools.study.plan import ARMS
from tools.study.runs import run_program
from tools.study.shared import shared, start_from

CHEAP = ("dagger.diagnose=false",)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="a finished run of a recipe")
    parser.add_argument("--out", type=Path, help="the arm's run directory (default: RUN-sft)")
    arguments = parser.parse_args()
    out = arguments.out or arguments.run.with_name(f"{arguments.run.name}-sft")
    try:
        run_sft_arm(arguments.run, out)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(out)
    return 0


def run_sft_arm(run: Path, out: Path) -> None:
    """Run the SFT arm of ``run`` in ``out``, or finish it. Raises ConfigError, OSError; RuntimeError if it fails."""
    recipe, config = load_origin(run).recipe, load_run_config(run)
    if recipe is None:
        raise ConfigError(f"{run} was not created from a recipe")
    base, values = find_recipe(recipe)(), dict(leaves(to_dict(config)))
    own = [f"{name}={json.dumps(values[name])}" for name in differing(config, base)]  # as they are now: JSON is YAML
    settings = [*own, *ARMS["sft"], *CHEAP]
    if not out.exists():
        start_from(run, shared(config, override(base, settings)), out, recipe, settings)
    run_program(["run", str(out), "--recipe", recipe, *settings], out.with_name(f"{out.name}.log"))


if __name__ == "__main__":
    sys.exit(main())
