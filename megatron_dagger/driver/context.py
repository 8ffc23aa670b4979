"""Open everything a run needs: tasks, sandboxes, stores, the student's engine, the teacher, the trainer's launch."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from megatron_dagger.config import ConfigError, RunConfig, TeacherConfig
from megatron_dagger.dagger.context import RunContext, Score, Student, train_manifest
from megatron_dagger.dagger.worker import Worker
from megatron_dagger.driver.environments import open_environment
from megatron_dagger.driver.run_dir import COLLECTED, EVALUATED, REFERENCES, TAKEOVERS, cache_dir
from megatron_dagger.driver.training import train_with_progress
from megatron_dagger.envs.environment import Environment
from megatron_dagger.observability.logs import DRIVER, log_file
from megatron_dagger.observability.metrics import StageMetrics
from megatron_dagger.observability.progress import track
from megatron_dagger.observability.status_file import RunProcess, failure_recorded
from megatron_dagger.policies.base import Policy
from megatron_dagger.policies.registry import TeacherContext, find_teacher
from megatron_dagger.rollout.chat import ChatRenderer
from megatron_dagger.rollout.tokenizer import control_ids, take_tokenizer, train_tokenizer
from megatron_dagger.store.atomic import write_json
from megatron_dagger.store.fence import VARIABLE, claim
from megatron_dagger.store.lock import exclusive
from megatron_dagger.weights.checkpoints import HF_FILES
from megatron_dagger.weights.companions import token_ids_in

logger = logging.getLogger(__name__)

TEACHER_URLS = "MEGATRON_DAGGER_TEACHER_URLS"
PREPARE_TIMEOUT_S = 3600.0


@contextmanager
def open_run_context(
    config: RunConfig,
    run_dir: Path,
    *,
    trains: Iterable[int] = (),
    worker: Worker | None = None,
    take_over: bool = False,
) -> Iterator[RunContext]:
    """Yield a run's context, and close everything in it afterwards.

    ``trains``: the rounds that this process may train. The run is claimed by this process alone or, with ``worker``,
    as one of several. ``take_over``: see store.fence. Raises ConfigError, LockedError, EnvironmentBroken.
    """
    from megatron_dagger.store.aggregated import DataStore
    from megatron_dagger.training.ranks.launch import warm_up

    with ExitStack() as stack:
        name = worker.name if worker else None
        token = stack.enter_context(claim(run_dir, worker=name, take_over=take_over))
        if not all(train_manifest(run_dir, index).exists() for index in trains):
            warm_up()  # the trainer's imports run while the first round is collected
        writer = name or DRIVER
        process = RunProcess(run_dir=run_dir, worker=name, log_file=log_file(run_dir, writer))
        stack.enter_context(failure_recorded(process))
        progress = functools.partial(track, process=process)
        with exclusive(run_dir / ".prepare.lock", deadline_s=PREPARE_TIMEOUT_S):  # workers start at the same time
            environment = open_environment(config, run_dir, cache_dir(), progress, stack)
            student_dir = prepare_student(config, run_dir, environment)
        renderer = ChatRenderer.load(student_dir)
        renderer.check_vocabulary(config.model.vocab_size)
        threads = stack.enter_context(ThreadPoolExecutor(environment.threads, thread_name_prefix="sandbox"))

        @functools.cache
        def student() -> Student:
            from megatron_dagger.policies.vllm.resident import ResidentStudent
            from megatron_dagger.policies.vllm.student import VllmStudent

            vllm_student = VllmStudent(
                student_dir,
                config.model,
                config.rollout.engine,
                seed=config.seed,
                decode=renderer.text,
                end_of_turn=renderer.end_token,
            )
            stack.enter_context(vllm_student).preload()
            return ResidentStudent(vllm_student, run_dir) if worker and worker.resident else vllm_student

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
            data=DataStore.create_or_open(run_dir / COLLECTED, writer=writer),
            evaluations=DataStore.create_or_open(run_dir / EVALUATED, writer=writer),
            references=DataStore.create_or_open(run_dir / REFERENCES, writer=writer),
            takeovers=DataStore.create_or_open(run_dir / TAKEOVERS, writer=writer),
            metrics=StageMetrics(run_dir, wandb_project=config.wandb_project),
            train=functools.partial(train_with_progress, config, process, {VARIABLE: token}),
            track=progress,
            threads=threads,
        )


def make_teacher(
    config: RunConfig, run_dir: Path, environment: Environment, renderer: ChatRenderer, stack: ExitStack
) -> tuple[Policy, Score | None]:
    """Return the teacher, and the function that scores the student's tokens with it (None unless configured).

    The teacher is the environment's own expert, a language model behind endpoints, or a policy of the user's own.
    Raises ConfigError if there is no teacher.
    """
    if config.teacher.source == "expert":
        if environment.expert is None:
            raise ConfigError("teacher.urls is missing: this environment has no expert of its own")
        return environment.expert(renderer.action), None
    if config.teacher.source != "endpoint":
        context = TeacherContext(
            config=config, run_dir=run_dir, read=environment.read, encode=renderer.action, stack=stack
        )
        return find_teacher(config.teacher.source)(context), None
    from megatron_dagger.policies.openai.cache import ResponseCache
    from megatron_dagger.policies.openai.endpoint_pool import EndpointPool
    from megatron_dagger.policies.openai.policy import EndpointPolicy
    from megatron_dagger.policies.openai.scoring import TeacherScores

    cache = ResponseCache(run_dir / "teacher")
    stack.callback(cache.close)
    teacher = teacher_config(config)
    pool = stack.enter_context(EndpointPool(teacher, cache))
    policy = EndpointPolicy(teacher, pool, cache, read=environment.read, encode=renderer.action)
    scores = TeacherScores(teacher, pool, cache, decode=renderer.text)
    return policy, scores.score if config.teacher.score_student_turns else None


def teacher_config(config: RunConfig) -> TeacherConfig:
    """Return the teacher's settings, with the addresses of the environment variable TEACHER_URLS if it is set.

    Addresses may change from job to job.
    """
    urls = tuple(os.environ.get(TEACHER_URLS, "").split())
    return replace(config.teacher, urls=urls) if urls else config.teacher


def prepare_student(config: RunConfig, run_dir: Path, environment: Environment) -> Path:
    """Write the run's tasks and the student's config and tokenizer, once; return the student's folder."""
    folder = run_dir / "student"
    if not (folder / "config.json").exists():
        environment.prepare(run_dir / "tasks")
        if config.init_checkpoint is not None:
            files = Path(config.init_checkpoint) / HF_FILES
            take_tokenizer(files, folder)
            ids = token_ids_in(files)
        elif environment.tokenizer_texts is not None:
            train_tokenizer(environment.tokenizer_texts(), config.model.vocab_size, folder)
            ids = control_ids(folder)
        else:
            raise ConfigError("init_checkpoint is missing: this environment has no texts to train a tokenizer on")
        write_json(folder / "config.json", config.model.hf_config() | ids)
    return folder
