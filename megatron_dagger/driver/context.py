"""Puts a run together: tasks, sandboxes, stores, the student's engine, the launch of the trainer."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from megatron_dagger.config import ConfigError, RunConfig, differing, dump_yaml, load_yaml, override
from megatron_dagger.config.run import CHANGEABLE, fixed_differences
from megatron_dagger.dagger.context import RunContext, Score, Student, train_manifest
from megatron_dagger.dagger.worker import Worker
from megatron_dagger.driver.environments import Environment, open_environment
from megatron_dagger.driver.training import train_with_progress
from megatron_dagger.observability.logs import DRIVER, log_file
from megatron_dagger.observability.metrics import Metrics
from megatron_dagger.observability.progress import track
from megatron_dagger.observability.status_file import failure_recorded
from megatron_dagger.policies.base import Policy
from megatron_dagger.rollout.chat import ChatRenderer
from megatron_dagger.rollout.tokenizer import take_tokenizer
from megatron_dagger.store.atomic import write_json, write_text
from megatron_dagger.store.fence import VARIABLE, claim
from megatron_dagger.store.lock import exclusive
from megatron_dagger.weights.checkpoints import HF_FILES

logger = logging.getLogger(__name__)

TEACHER_URLS = "MEGATRON_DAGGER_TEACHER_URLS"
PREPARE_TIMEOUT_S = 3600.0


def cache_dir() -> Path:
    """Where packages and tasks are kept between runs; ``MEGATRON_DAGGER_CACHE`` moves it."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "megatron-dagger"
    return Path(os.environ.get("MEGATRON_DAGGER_CACHE", default))


def create_run(config: RunConfig, run_dir: Path) -> RunConfig:
    """Write the resolved config to a new run directory, or check it against an existing one's.

    Settings that ``change_run`` can change stay as the existing run has them: a job's script may be an old one.
    """
    path = run_dir / "config.yaml"
    if config.init_checkpoint is not None:
        config = replace(config, init_checkpoint=str(Path(config.init_checkpoint).resolve()))
    if not path.exists():
        write_text(path, dump_yaml(config))
        return config
    existing = load_yaml(RunConfig, path)
    if others := fixed_differences(existing, config):
        raise ConfigError(
            f"{path} belongs to a run with other settings ({', '.join(others)}); resume it with "
            f"`megatron-dagger run {run_dir}` (no recipe), or name another directory"
        )
    if kept := differing(existing, config):
        logger.warning(
            "%s stays as it is in %s; `megatron-dagger run RUN NAME=VALUE` changes it", ", ".join(kept), path
        )
    return existing


def change_run(
    run_dir: Path, assignments: list[str], *, only_check: bool = False, take_over: bool = False
) -> RunConfig:
    """The config of an existing run with ``NAME=VALUE`` settings changed, and written to its directory so.

    Raises ConfigError where a setting changes what the run computes, LockedError while it is worked on.
    """
    existing = load_run_config(run_dir)
    config = override(existing, assignments)
    if others := fixed_differences(existing, config):
        raise ConfigError(
            f"{', '.join(others)}: what an existing run computes cannot be changed; start another with --recipe. "
            f"What can be: {', '.join(CHANGEABLE)}"
        )
    if config != existing and not only_check:
        with claim(run_dir, take_over=take_over):
            write_text(run_dir / "config.yaml", dump_yaml(config))
    return config


def load_run_config(run_dir: Path) -> RunConfig:
    """The config of an existing run."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run_dir} is no run directory (it has no config.yaml); start one with --recipe")
    return load_yaml(RunConfig, path)


@contextmanager
def open_run_context(
    config: RunConfig,
    run_dir: Path,
    *,
    trains: Iterable[int] = (),
    worker: Worker | None = None,
    take_over: bool = False,
) -> Iterator[RunContext]:
    """Everything a run needs, opened and, whatever happens, closed again; rounds ``trains`` will be trained.

    The run is claimed for this process alone, or for it as one ``worker``; ``take_over``: see store.fence.
    """
    from megatron_dagger.store.aggregated import DataStore
    from megatron_dagger.training.ranks.launch import warm_up

    with ExitStack() as stack:
        name = worker.name if worker else None
        token = stack.enter_context(claim(run_dir, worker=name, take_over=take_over))
        if not all(train_manifest(run_dir, index).exists() for index in trains):
            warm_up()  # while the first of them collects
        writer = name or DRIVER
        log = log_file(run_dir, writer)
        stack.enter_context(failure_recorded(run_dir, worker=name, log_file=log))
        tracked = functools.partial(track, run_dir=run_dir, worker=name, log_file=log)
        with exclusive(run_dir / ".prepare.lock", deadline_s=PREPARE_TIMEOUT_S):  # workers come at the same time
            environment = open_environment(config, run_dir, cache_dir(), tracked, stack)
            student_dir = prepare_student(config, run_dir, environment)
        renderer = ChatRenderer.load(student_dir)
        threads = stack.enter_context(ThreadPoolExecutor(environment.threads, thread_name_prefix="sandbox"))

        @functools.cache
        def student() -> Student:
            from megatron_dagger.policies.vllm.resident import ResidentStudent
            from megatron_dagger.policies.vllm.student import VllmStudent

            served = VllmStudent(student_dir, config.model, config.rollout.engine, seed=config.seed)
            stack.enter_context(served).prepare()
            return ResidentStudent(served, run_dir) if worker and worker.resident else served

        teacher, score = make_teacher(config, run_dir, environment, renderer, stack)
        yield RunContext(
            config=config,
            run_dir=run_dir,
            renderer=renderer,
            train_tasks=environment.train_tasks,
            heldout_tasks=environment.heldout_tasks,
            make_env=environment.make_env,
            prefetch=environment.prefetch,
            teacher=teacher,
            score=score,
            student=student,
            data=DataStore.create_or_open(run_dir / "data.zarr", writer=writer),
            evaluations=DataStore.create_or_open(run_dir / "evaluations.zarr", writer=writer),
            metrics=Metrics(run_dir, wandb_project=config.wandb_project),
            train=functools.partial(train_with_progress, config, run_dir, tracked, {VARIABLE: token}),
            track=tracked,
            threads=threads,
        )


def make_teacher(
    config: RunConfig, run_dir: Path, environment: Environment, renderer: ChatRenderer, stack: ExitStack
) -> tuple[Policy, Score | None]:
    """The environment's own expert, or a language model behind an endpoint, which can score the student's tokens.

    Where its servers are may change from job to job: TEACHER_URLS in the environment wins over the settings.
    """
    if not config.teacher.urls:
        assert environment.expert is not None, "RunConfig checks it"
        return environment.expert(renderer.action), None
    from megatron_dagger.policies.openai.cache import ResponseCache
    from megatron_dagger.policies.openai.policy import EndpointPolicy
    from megatron_dagger.policies.openai.scoring import TeacherScores

    replies = ResponseCache(run_dir / "teacher")
    stack.callback(replies.close)
    found = tuple(os.environ.get(TEACHER_URLS, "").split())
    teacher = replace(config.teacher, urls=found) if found else config.teacher
    policy = EndpointPolicy(teacher, replies, read=environment.read, encode=renderer.action)
    scores = TeacherScores(teacher, policy.replicas, replies, decode=renderer.text)
    return policy, scores.score if config.teacher.score_student_turns else None


def prepare_student(config: RunConfig, run_dir: Path, environment: Environment) -> Path:
    """Write what is kept of the tasks, and the student's config and tokenizer, once."""
    folder = run_dir / "student"
    if not (folder / "config.json").exists():
        environment.prepare(run_dir / "tasks", folder if config.init_checkpoint is None else None)
        if config.init_checkpoint is not None:
            take_tokenizer(Path(config.init_checkpoint) / HF_FILES, folder)
        write_json(folder / "config.json", config.model.hf_config())
    return folder
