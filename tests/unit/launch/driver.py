"""The program that test_nemo_run.py runs in the launch environment, since the tests' own has no NeMo-Run.

NEMORUN_HOME must be set.

driver.py golden FOLDER         write the job files of a four-node run, one in a container too, to FOLDER
driver.py dryrun FOLDER         dry-run all recipes for SLURM; write their tasks to FOLDER/tasks.json
driver.py failure FOLDER        run three trivial tasks on this machine; the second one fails
driver.py nodes FOLDER          give executors of several types a stage on 1 and 4 nodes; write FOLDER/nodes.json
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

import fiddle
import nemo_run as run

from megatron_dagger.config import override
from megatron_dagger.launch.executors import for_stage, slurm
from megatron_dagger.launch.rounds import RoundsExperiment, add_rounds
from megatron_dagger.recipes import RECIPES, find_recipe

WORK_DIR = Path("/shared/work")


def cluster(**settings):
    executor = fiddle.build(slurm())
    for name, value in {"account": "team", "gpus_per_node": 8, **settings}.items():
        setattr(executor, name, value)
    return executor


def dry_run(config, executor):
    """Return the experiment after its dry run."""
    with RoundsExperiment(config.name, executor=executor, id=f"{config.name}_0") as experiment:
        add_rounds(experiment, config, Path("runs/it"), work_dir=WORK_DIR)
        for number, job in enumerate(experiment.jobs):  # as NeMo-Run fills them in when it submits
            job.executor.dependencies = [f"slurm_tunnel://nemo_run/{number}"] if number else []
        experiment.dryrun(log=False, delete_exp_dir=False, exist_ok=True)
    return experiment


def sbatch(experiment, name):
    job = next(job for job in experiment.jobs if job.id == name)
    text = job._dryrun_info.request.materialize().replace(os.environ["NEMORUN_HOME"], "/home/me/.nemo_run")
    return text.rstrip() + "\n"


def golden(folder):
    config = override(find_recipe("qwen3_8b_swegym_4x8h100")(), ["dagger.rounds=1"])
    plain = dry_run(config, cluster())
    for name in ("round1-rollout", "round1-train"):
        (folder / f"{name}.sbatch").write_text(sbatch(plain, name))
    script = Path(plain._exp_dir) / "round1-train" / "scripts" / "round1-train.sh"
    (folder / "round1-train.sh").write_text(script.read_text())
    in_container = dry_run(config, cluster(container_image="team/image:1", container_mounts=["/shared:/shared"]))
    (folder / "round1-train-container.sbatch").write_text(sbatch(in_container, "round1-train"))


def dryrun(folder):
    tasks = {}
    for name in RECIPES:
        experiment = dry_run(find_recipe(name)(), cluster())
        tasks[name] = [
            {
                "name": job.id,
                "after": job.dependencies,
                "nodes": job.executor.nodes,
                "sbatch": sbatch(experiment, job.id),
                "script": job.task.inline,
            }
            for job in experiment.jobs
        ]
    (folder / "tasks.json").write_text(json.dumps(tasks))


def failure(folder):
    with RoundsExperiment("trivial", executor=run.LocalExecutor()) as experiment:
        ids = []
        for name, script in (
            ("first", f"touch {folder}/first"),
            ("second", "exit 3"),
            ("third", f"touch {folder}/third"),
        ):
            task = run.Script(inline=script)
            ids.append(experiment.add(task, executor=run.LocalExecutor(), name=name, dependencies=ids[-1:]))
        experiment.run()


@dataclasses.dataclass(kw_only=True)
class CloudExecutor(run.Executor):
    num_nodes: int = 1


@dataclasses.dataclass(kw_only=True)
class SingleExecutor(run.Executor):
    pass


def nodes(folder):
    outcomes = {}
    for executor in (cluster(), run.LocalExecutor(), CloudExecutor(), SingleExecutor()):
        for count in (1, 4):
            try:
                copy = for_stage(executor, count, hours=2)
                outcome = getattr(copy, "nodes", getattr(copy, "num_nodes", None))
            except ValueError as error:
                outcome = str(error)
            outcomes[f"{type(executor).__name__} {count}"] = outcome
    (folder / "nodes.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    {"golden": golden, "dryrun": dryrun, "failure": failure, "nodes": nodes}[sys.argv[1]](Path(sys.argv[2]))
