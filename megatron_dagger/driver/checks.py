"""Refuse a run that cannot work before any of its files is written."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_dagger.config import ConfigError, RepoRepairConfig, RunConfig, to_dict
from megatron_dagger.config.base import require
from megatron_dagger.config.teacher import TEACHERS
from megatron_dagger.config.trainer_support import check_supported
from megatron_dagger.envs.registry import find_environment
from megatron_dagger.envs.repo_repair import sources
from megatron_dagger.envs.repo_repair.pinned_packages import find_package
from megatron_dagger.gpus import has_gpus
from megatron_dagger.planning import GPUS, Assumptions, nearest_that_fits
from megatron_dagger.planning.gpus import ANY_GPU, DEFAULT_GPU
from megatron_dagger.planning.memory import GIB
from megatron_dagger.planning.run_plan import memory_of
from megatron_dagger.policies.registry import find_teacher
from megatron_dagger.weights.checkpoints import HF_FILES, MegatronFiles, model_of
from megatron_dagger.weights.errors import CheckpointReadError


def check_run(config: RunConfig, *, here: bool = False, gpu: str | None = None) -> None:
    """Raise ConfigError unless the run can work: trainer, memory of the GPUs, checkpoint, environment, teacher.

    ``here``: one process on this machine does all of the run, so the rules for a machine with or without GPUs apply,
    and trainer and engine must fit the GPUs together; otherwise the settings need to work on one of the two kinds.
    ``gpu``: the kind of GPU whose memory the run must fit (a name of ``planning.GPUS``, or ``any`` for no check;
    default: h100); not checked in fp32, which is for the CPU.
    """
    check_trainer(config, cuda=has_gpus(os.environ) if here else None)
    check_init_checkpoint(config)
    find_environment(config.environment)
    if config.teacher.source not in TEACHERS:
        find_teacher(config.teacher.source)
    if config.environment == "swe":
        _check_data_sets(config)
    elif config.environment == "repair":
        check_packages(config.repo_repair)
    check_memory(config, gpu, one_process=here)


def check_trainer(config: RunConfig, *, cuda: bool | None) -> None:
    """Raise ConfigError for settings that no trainer can run, with (``cuda``) or without GPUs; None: with either."""
    if cuda is not None:
        check_supported(config.model, config.training, cuda=cuda)
        return
    try:
        check_supported(config.model, config.training, cuda=True)
    except ConfigError:
        if config.training.precision != "fp32":
            raise
        check_supported(config.model, config.training, cuda=False)


def check_init_checkpoint(config: RunConfig) -> None:
    """Raise ConfigError unless ``init_checkpoint``, if there is one, is a whole checkpoint of the run's model.

    Reads no weights: their names, shapes and files are compared with the settings.
    """
    if config.init_checkpoint is None:
        return
    folder = Path(config.init_checkpoint)
    require(folder.is_dir(), f"init_checkpoint={folder}: no such directory")
    require(
        (folder / HF_FILES).is_dir(),
        f"init_checkpoint={folder} has no {HF_FILES}/ with the tokenizer: it must be a checkpoint made by "
        "`megatron-dagger convert hf-to-megatron`",
    )
    try:
        model = model_of(folder)
    except CheckpointReadError as error:
        raise ConfigError(f"init_checkpoint: {error}") from None
    checkpoint, configured = to_dict(model), to_dict(config.model)
    wrong = config.model.differing_from(model)
    require(
        not wrong,
        f"init_checkpoint={folder} is of another model: "
        + ", ".join(f"model.{name}={checkpoint[name]}, not {configured[name]}" for name in wrong[:3]),
    )
    try:
        MegatronFiles(folder, model)
    except CheckpointReadError as error:
        raise ConfigError(f"init_checkpoint: {error}") from None


def _check_data_sets(config: RunConfig) -> None:
    from megatron_dagger.envs.swe.rows import check_source

    for name, source in (("swe.train", config.swe.train), ("swe.heldout", config.swe.heldout)):
        if source:
            try:
                check_source(source)
            except ConfigError as error:
                raise ConfigError(f"{name}={error}") from None
    validation = config.swe.validation
    require(
        not validation or Path(validation).is_file(),
        f"swe.validation={validation}: no such file; `megatron-dagger validate {validation} ...` writes it",
    )


def check_packages(tasks: RepoRepairConfig) -> None:
    """Raise ConfigError if a package is not one that repair tasks are made of."""
    for setting in ("train_packages", "heldout_packages"):
        for name in getattr(tasks, setting):
            try:
                if tasks.source == "stdlib":
                    sources.stdlib_tree(name)
                else:
                    find_package(name)
            except ValueError as error:
                raise ConfigError(f"repo_repair.{setting}: {error}") from None


def check_memory(config: RunConfig, gpu_name: str | None, *, one_process: bool) -> None:
    """Raise ConfigError unless trainer and engine fit GPUs of a kind, at the same time in ``one_process``."""
    if gpu_name == ANY_GPU or config.training.precision == "fp32":
        return
    gpu, assumed = GPUS[gpu_name or DEFAULT_GPU], Assumptions()
    memory = memory_of(config, gpu, assumed)
    problems = memory.problems()
    if not problems:
        require(
            memory.fit_together or not one_process,
            f"trainer and engine do not fit {gpu.name} GPUs at the same time, as `megatron-dagger run` needs: run the "
            "stages as separate jobs (slurm/single_node_with_teacher.sbatch does); --gpu any skips this check",
        )
        return
    change = nearest_that_fits(config, gpu, assumed)
    advice = "take more GPUs, or a smaller model"
    if change is not None:
        advice = f"the nearest settings that fit: {' '.join(change.settings)}"
        advice += f" ({change.memory.fullest.total / GIB:.1f} GiB in training)"
    raise ConfigError(
        f"does not fit {config.training.parallel.world_size} x {gpu.name}: {'; '.join(problems)}; {advice}. "
        f"`megatron-dagger plan` shows the calculation; --gpu names another kind of GPU, --gpu {ANY_GPU} skips this"
    )
