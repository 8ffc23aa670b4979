"""A run that starts from a converted checkpoint: round 0 trains its weights, and the student gets its tokenizer."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("megatron.core", reason="Megatron-Core is not installed")
pytest.importorskip("transformers", reason="Transformers is not installed")

import torch
import transformers

from megatron_dagger.config import ConfigError, ModelConfig, OptimizerConfig, RunConfig, TrainingConfig
from megatron_dagger.driver.run_dir import create_run
from megatron_dagger.driver.training import train_job
from megatron_dagger.rollout.tokenizer import take_tokenizer, train_tokenizer
from megatron_dagger.training.data.episode_file import save_episodes
from megatron_dagger.types import LabelledEpisode, StateLabel
from megatron_dagger.weights.checkpoints import open_checkpoint
from tools.support.checkpoints import write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
MODEL = ModelConfig(num_layers=2, hidden_size=64, ffn_hidden_size=96, vocab_size=300)
CONVERT = ("-m", "megatron_dagger.cli.main", "convert")


def run_python(*command):
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=variables, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small Transformers model with a tokenizer, converted by ``megatron-dagger convert``."""
    folder = tmp_path_factory.mktemp("init")
    torch.manual_seed(1)
    settings = MODEL.hf_config() | {"head_dim": MODEL.kv_channels}
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**settings))
    model.save_pretrained(folder / "hf")
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data = parameter.data.bfloat16()
    model.save_pretrained(folder / "mixed")
    for name in ("hf", "mixed"):
        train_tokenizer(["some text to learn from, and more of it"] * 3, MODEL.vocab_size, folder / name)
        run_python(*CONVERT, "hf-to-megatron", folder / name, folder / f"megatron-{name}")
    return folder / "megatron-hf"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["hf", "mixed"])
def test_round_zero_starts_from_the_checkpoints_weights(checkpoint, tmp_path, precision):
    """With a learning rate too small to change any weight, the trained weights equal the checkpoint's bit for bit.

    Also if only its norms are in float32.
    """
    checkpoint = checkpoint.with_name(f"megatron-{precision}")
    optimizer = OptimizerConfig(lr=1e-14, warmup_steps=0, decay="constant", weight_decay=0.0)
    config = RunConfig(
        model=MODEL,
        init_checkpoint=str(checkpoint),
        training=TrainingConfig(optimizer=optimizer, max_steps=1, epochs=1, sequence_length=4096),
    )
    config = create_run(config, tmp_path / "run")
    tokens = np.arange(100, dtype=np.int32) % MODEL.vocab_size
    episode = LabelledEpisode(tokens=tokens, labels=(StateLabel(position=20, tokens=tokens[20:]),))
    save_episodes(tmp_path / "episodes.npz", [episode])
    job = train_job(config, tmp_path / "run", 0)
    job.save(tmp_path / "job.json")
    run_python("-m", "megatron_dagger.training", tmp_path / "episodes.npz", tmp_path / "job.json")
    trained = Path(job.output_dir)
    assert json.loads((trained / "manifest.json").read_text())["steps"] == 1
    first, second = (
        dict(open_checkpoint(folder).canonical_tensors()) for folder in (trained / "checkpoint", checkpoint)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name].float()) for name in first)
    assert {str(tensor.dtype) for tensor in second.values()} == {
        "hf": {"torch.float32"}, "mixed": {"torch.float32", "torch.bfloat16"}
    }[precision]  # fmt: skip
    assert train_job(config, tmp_path / "run", 1).init_checkpoint == str(trained / "checkpoint")


def test_all_small_files_of_the_checkpoint_are_copied(checkpoint, tmp_path):
    (checkpoint / "hf" / "chat_template.jinja").write_text("{{ messages[0].content }} only")
    take_tokenizer(checkpoint / "hf", tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (checkpoint / "hf" / name).read_bytes()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x only"
    with pytest.raises(ConfigError, match=r"tokenizer\.json is missing; make the checkpoint with"):
        take_tokenizer(tmp_path / "nowhere", tmp_path)


def test_a_relative_path_of_a_checkpoint_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "converted", RunConfig().model)
    config = create_run(replace(RunConfig(), init_checkpoint="converted"), tmp_path / "run")
    assert config.init_checkpoint == str(tmp_path / "converted")
