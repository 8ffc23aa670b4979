"""Kill the processes of a run at random moments, start what has ended again, and compare it with an undisturbed run.

At each moment one of the processes that are there is killed with SIGKILL: the driver, a training rank, a worker of the
engine, a sandbox, the teacher's server. The driver's command is repeated whenever it has ended, until the run is done;
if that is so before all kills, another run begins. With --docker the tasks are SWE tasks in containers, and the
container daemon is killed too; it needs root and starts a daemon of its own.

    .venv/bin/python -m tools.check.soak --kills 50               half an hour
    .venv/bin/python -m tools.check.soak --kills 20 --docker      half an hour

Every run must have the episodes of the undisturbed one, each once, with the same digests of data and weights, and leave
no process, container or mount behind. The last line is ``RESULT {json}``; the exit code is 1 if something is not so.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_dagger.config import RunConfig, override
from megatron_dagger.driver.run_dir import create_run
from megatron_dagger.sandbox.docker.daemon import DockerHost
from megatron_dagger.store.aggregated import DataStore
from megatron_dagger.store.atomic import read_json
from tools.check.soak_processes import Disturbed, Service, TeacherServer, daemon_service, leftover_processes
from tools.check.swe_mutants import GoldTeacher, build_images, write_rows
from tools.check.swe_round import cli, make_model, make_tasks, settings, swe_settings
from tools.support.chat_server import expert
from tools.support.docker_engine import IMAGE, docker_daemon, missing, mounts_below
from tools.virtual_slurm.runs import make_tasks as make_repair_tasks
from tools.virtual_slurm.runs import tiny_config

STORES = ("data", "evaluations", "references", "takeovers")
NONE = ("lost_episodes", "duplicate_episodes", "leftover_processes", "leftover_containers", "leftover_mounts")
REPAIR_SETTINGS = (
    "rollout.sampling.temperature=0.2",  # at higher ones the student runs commands such as w, which prints the time
    "rollout.engine.tensor_parallel_size=2",  # else the engine is a part of the driver
    "training.checkpoint_interval=2",
    "dagger.sft_tasks=4",
    "dagger.tasks_per_round=4",
    "teacher.model=expert",
)
SWE_SETTINGS = ("rollout.engine.tensor_parallel_size=2", "training.checkpoint_interval=2")
SWE_TASKS, SWE_HELDOUT = 6, 2


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--kills", type=int, default=50, help="how many (default %(default)s)")
    parser.add_argument("--docker", action="store_true", help="SWE tasks in containers; kill their daemon too")
    parser.add_argument("--pause", type=float, default=12.0, help="mean seconds between kills (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of victims and moments (default %(default)s)")
    parser.add_argument("--folder", type=Path, help="keep the runs in this folder (default: a temporary one)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends what was started
    if arguments.kills < 1:
        parser.error("--kills: write 1 or more")
    if arguments.docker and missing():
        sys.exit(f"no Docker daemon can be started: {missing()}")
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        folder = (arguments.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        result = (in_containers if arguments.docker else repairs)(folder, arguments)
    print("RESULT " + json.dumps(result))
    same = result["same_data_digest"] and result["same_weight_digests"]
    return 0 if same and not any(result[name] for name in NONE) else 1


def repairs(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Soak runs of repair tasks with a teacher behind an endpoint."""
    config = override(tiny_config(), list(REPAIR_SETTINGS))
    make_repair_tasks(config)
    with TeacherServer(expert) as teacher:
        config = override(config, [f"teacher.urls=[{teacher.url}]"])
        result = soak(folder, config, arguments, [teacher])
    return result | {"leftover_containers": 0, "leftover_mounts": len(mounts_below(folder))}


def in_containers(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Soak runs of SWE tasks in containers."""
    tasks = make_tasks("stdlib", SWE_TASKS, SWE_HELDOUT)
    everything = [*tasks.train, *tasks.heldout]
    gold = GoldTeacher(everything)
    with docker_daemon() as daemon, TeacherServer(gold) as teacher:
        with DockerHost("soak", daemon.url) as host:
            build_images(host, IMAGE, everything, tasks.repository)
        write_rows(folder / "train.jsonl", everything)
        write_rows(folder / "heldout.jsonl", tasks.heldout)
        config = settings(folder, make_model(folder, tasks, gold), tasks, daemon.url, teacher.url)
        cli("validate", config.swe.validation, "--repeats", 1, *swe_settings(config))
        halves = [f"dagger.sft_tasks={SWE_TASKS // 2}", f"dagger.tasks_per_round={SWE_TASKS // 2}"]
        mounts = set(mounts_below(daemon.home))
        with daemon_service(daemon) as dockerd:
            result = soak(folder, override(config, [*halves, *SWE_SETTINGS]), arguments, [teacher, dockerd])
        with DockerHost("soak", daemon.url) as host:
            containers = len(host.client.containers.list(all=True))
        return result | {
            "leftover_containers": containers,
            "leftover_mounts": len(set(mounts_below(daemon.home)) - mounts),
        }


def soak(folder: Path, config: RunConfig, arguments: argparse.Namespace, services: list[Service]) -> dict[str, Any]:
    """Do an undisturbed run, then disturbed ones until all kills are done; return the numbers of RESULT."""
    create_run(config, folder / "undisturbed")
    cli("run", folder / "undisturbed")
    disturbed = Disturbed(services, kills=arguments.kills, pause_s=arguments.pause, seed=arguments.seed)
    differences: list[dict[str, Any]] = []
    while disturbed.remaining:
        run = folder / f"killed-{len(differences)}"
        create_run(config, run)
        disturbed.finish(run)
        differences.append(compared(run, folder / "undisturbed"))
        print(f"run {run.name}: {differences[-1]}", flush=True)
    return {
        "kills": sum(disturbed.killed.values()),
        "by_process": dict(sorted(disturbed.killed.items())),
        "starts": disturbed.starts,
        "runs": len(differences),
        **{name: sum(d[name] for d in differences) for name in ("lost_episodes", "duplicate_episodes")},
        **{name: all(d[name] for d in differences) for name in ("same_data_digest", "same_weight_digests")},
        "leftover_processes": len(leftover_processes(services)),
    }


def compared(run: Path, undisturbed: Path) -> dict[str, Any]:
    """Return how a run's episodes and weights differ from those of the undisturbed one."""
    lost = duplicate = 0
    same = True
    for name in STORES:
        expected, actual = (DataStore.open(folder / f"{name}.zarr") for folder in (undisturbed, run))
        same = same and expected.digest() == actual.digest() and expected.sealed() == actual.sealed()
        for index in expected.rounds():
            keys = [[(e.task_id, e.attempt) for e in store.episodes(index)] for store in (expected, actual)]
            lost += len(set(keys[0]) - set(keys[1]))
            duplicate += len(keys[1]) - len(set(keys[1]))
    weights = [list(digests(folder)) for folder in (undisturbed, run)]
    return {
        "lost_episodes": lost,
        "duplicate_episodes": duplicate,
        "same_data_digest": same,
        "same_weight_digests": bool(weights[0]) and weights[0] == weights[1],
    }


def digests(run: Path) -> Iterator[Any]:
    """Yield the digests of the weights of each round."""
    for path in sorted(run.glob("rounds/*/train/manifest.json")):
        yield read_json(path)["digests"]


if __name__ == "__main__":
    sys.exit(main())
