"""Training rounds with the real Megatron-Core on gloo: layouts, packing, kill -9 and resume."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_dagger.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainingConfig, YarnConfig
from megatron_dagger.training.data.episode_file import save_episodes
from megatron_dagger.training.job import TrainJob
from megatron_dagger.training.ranks.launch import LaunchError, launch
from megatron_dagger.types import LabelledEpisode, StateLabel
from megatron_dagger.weights.families import canonical_names

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = ModelConfig(num_layers=2, hidden_size=64, ffn_hidden_size=96, vocab_size=250)
TP2 = {"world_size": 2, "tensor_model_parallel_size": 2}
PP2 = {"world_size": 2, "pipeline_model_parallel_size": 2}
LAYOUTS = ("tp2", "dp2", "pp2_vpp2", "tp2_sp_after_pp2_vpp2", "moe_ep2", "moe_tp2_sp_ep2", "moe_pp2_after_ep2")


def make_episodes(count=20):
    rng = np.random.default_rng(3)
    episodes = []
    for _ in range(count):
        tokens = np.cumsum(rng.integers(1, 4, rng.integers(40, 120))).astype(np.int32) % 250
        labels = [
            StateLabel(position=20, tokens=tokens[20:30], weight=0.3),
            StateLabel(position=30, tokens=(tokens[30:38] + 1) % 250),
        ]
        episodes.append(LabelledEpisode(tokens=tokens, labels=tuple(labels)))
    return episodes


def write_job(folder, name, parallel, *, init=None, model=MODEL, **training):
    settings = {"sequence_length": 128, "global_batch_tokens": 512, "epochs": 6.0, "checkpoint_interval": 4}
    settings["packing"] = "shared_prefix"
    job = TrainJob(
        round_index=1,
        seed=3,
        model=model,
        training=TrainingConfig(parallel=ParallelConfig(**parallel), **{**settings, **training}),
        output_dir=str(folder / name),
        init_checkpoint=str(init) if init else None,
        weight_version=7,
    )
    job.save(folder / f"{name}.json")
    return folder / f"{name}.json"


def train(folder, *jobs, deadline_s=240.0):
    launch(
        ["megatron_dagger.training", str(folder / "episodes.npz"), *map(str, jobs)],
        ParallelConfig(world_size=2),
        folder / "logs",
        deadline_s,
        env={"PYTHONPATH": str(REPOSITORY)},
    )


def losses(folder, name):
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def manifest(folder, name):
    return json.loads((folder / name / "manifest.json").read_text())


def output_of(process):
    try:
        return os.readlink(process / "fd" / "1")
    except OSError:
        return ""


def kill_rank_one_after(folder, name, steps, rank_one):
    """Kill the second rank with SIGKILL once metrics.jsonl has ``steps`` lines; append its pid to ``rank_one``."""
    metrics = folder / name / "metrics.jsonl"
    end = time.monotonic() + 200
    while time.monotonic() < end:
        if metrics.exists() and len(metrics.read_text().splitlines()) >= steps:
            for process in Path("/proc").glob("[0-9]*"):
                if output_of(process) == str(folder / "logs" / "rank-1.log"):
                    os.kill(int(process.name), signal.SIGKILL)
                    rank_one.append(int(process.name))
                    return
        time.sleep(0.01)


def test_a_killed_round_resumes_with_the_same_losses_in_any_layout(tmp_path):
    save_episodes(tmp_path / "episodes.npz", make_episodes())
    job, killed = write_job(tmp_path, "killed", TP2), []
    killer = threading.Thread(target=kill_rank_one_after, args=(tmp_path, "killed", 6, killed))
    killer.start()
    with pytest.raises(LaunchError, match="rank 1 failed: was killed by SIGKILL"):
        train(tmp_path, job)
    killer.join()
    assert killed
    remaining = sorted(path.name for path in (tmp_path / "killed").iterdir() if path.is_dir())
    assert remaining[-1] in ("checkpoint-step-000004", "checkpoint-step-000008")
    subprocess.run(["cp", "-r", str(tmp_path / "killed"), str(tmp_path / "other")], check=True)
    half_written = tmp_path / "killed" / "checkpoint-step-000099"  # a save that was killed before its marker
    half_written.mkdir()
    other = write_job(tmp_path, "other", PP2)
    reference = write_job(tmp_path, "reference", TP2, checkpoint_interval=1000)
    following = write_job(
        tmp_path,
        "following",
        PP2,
        init=tmp_path / "reference" / "checkpoint",
        max_steps=2,
        optimizer=OptimizerConfig(reset_each_round=True),
    )
    train(tmp_path, job, other, reference, following)
    reference_losses = losses(tmp_path, "reference")
    assert len(reference_losses) > 8
    assert losses(tmp_path, "killed") == reference_losses  # bit by bit
    assert np.abs(np.array(losses(tmp_path, "other")) - reference_losses).max() < 1e-5
    assert reference_losses[-1] < reference_losses[0] - 0.2
    assert losses(tmp_path, "following")[0] < reference_losses[-1] + 0.1  # continues from the previous round

    expected, resumed = manifest(tmp_path, "reference"), manifest(tmp_path, "killed")
    assert expected["digests"] == resumed["digests"]
    assert list(expected["digests"]) == list(canonical_names(MODEL))
    assert expected["digests"] != manifest(tmp_path, "following")["digests"]
    assert (expected["round"], expected["weight_version"], expected["steps"]) == (
        1,
        7,
        len(reference_losses),
    )
    assert (expected["first_loss"], expected["last_loss"]) == (reference_losses[0], reference_losses[-1])
    assert expected["label_tokens"] == 6 * 20 * 18  # six passes over 18 label tokens of 20 episodes
    names = {path.name for path in (tmp_path / "killed").iterdir()}
    assert names == {"checkpoint", "manifest.json", "metrics.jsonl"}


def test_losses_do_not_depend_on_layout_or_packing_and_agree_with_transformers():
    finished = subprocess.run(
        [sys.executable, "-m", "tools.check.parallel", "--steps", "3", "--layouts", ",".join(LAYOUTS)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    keyword, _, text = finished.stdout.splitlines()[-1].partition(" ")
    result = json.loads(text)
    assert keyword == "RESULT"
    assert {*LAYOUTS, "packed_loss", "one_row_grad", "hf_grad", "moe_packed_loss", "moe_hf_grad"} <= result.keys()
    for name, value in result.items():
        assert name == "steps" or 0 <= value <= (1e-5 if name in LAYOUTS else 2e-6), name


def test_a_sequence_of_16k_tokens_is_trained(tmp_path):
    tokens = np.random.default_rng(5).integers(0, 250, 16_384).astype(np.int32)
    labels = [StateLabel(position=at, tokens=tokens[at : at + 500]) for at in (8_000, 15_800)]
    labels.append(StateLabel(position=12_000, tokens=(tokens[12_000:12_080] + 1) % 250))
    save_episodes(tmp_path / "episodes.npz", [LabelledEpisode(tokens=tokens, labels=tuple(labels))])
    model = replace(
        MODEL,
        num_layers=1,
        num_attention_heads=2,
        kv_channels=16,
        max_position_embeddings=16_384,
        yarn=YarnConfig(factor=4.0, original_max_position_embeddings=4_096),
    )
    settings = {"sequence_length": 16_384, "global_batch_tokens": 16_384, "epochs": 3.0}
    train(tmp_path, write_job(tmp_path, "long", TP2 | {"sequence_parallel": True}, model=model, **settings))
    first, _, last = losses(tmp_path, "long")
    assert last < first - 0.05
    result = manifest(tmp_path, "long")
    assert (result["too_long"], result["cut"], result["tokens"]) == (0, 0, 3 * (16_299 + 80))
    assert result["fill"] == result["tokens"] / (3 * 16_384)


def test_ranks_with_experts_send_their_own_weights(tmp_path):
    launch(
        ["tests.integration.expert_shards"],
        ParallelConfig(world_size=2),
        tmp_path,
        120.0,
        env={"PYTHONPATH": str(REPOSITORY)},
    )
