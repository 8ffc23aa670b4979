"""The small model of tools.check.swe_round as a teacher behind `vllm serve`."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dagger.config import SamplingConfig, TeacherConfig
from megatron_dagger.envs.swe.env import SYSTEM_MESSAGE
from megatron_dagger.envs.swe.responses import read_tool_call
from megatron_dagger.policies.base import PolicyError
from megatron_dagger.policies.openai.cache import ResponseCache
from megatron_dagger.policies.openai.endpoint_pool import EndpointPool
from megatron_dagger.policies.openai.policy import EndpointPolicy
from megatron_dagger.policies.openai.scoring import TeacherScores
from megatron_dagger.rollout.chat import ChatRenderer
from megatron_dagger.types import ActedBy, Action, Message, State, StopReason, Trajectory, Turn
from tools.support.ports import free_port

SERVED_NAME = "small"
MAX_MODEL_LEN = 8192
START_DEADLINE_S = 1800.0
END_DEADLINE_S = 30.0
SEED = 1234


def served(folder: Path) -> dict[str, Any]:
    """Use the small model behind `vllm serve` as a teacher: for a label, and for the log-probs of a student's tokens.

    A model with random weights calls no tool, which must be reported as an error. The log-probs are compared with those
    of Transformers.
    """
    with vllm_serve(folder) as url:
        renderer, cache = ChatRenderer.load(folder / "hf"), ResponseCache(folder / "teacher")
        teacher = TeacherConfig(urls=(url,), model=SERVED_NAME, sampling=SamplingConfig(max_tokens=32))
        pool = EndpointPool(teacher, cache)
        policy = EndpointPolicy(teacher, pool, cache, read=read_tool_call, encode=renderer.action)
        messages = (Message(role="system", content=SYSTEM_MESSAGE), Message(role="user", content="Repair it."))
        prompt = renderer.opening(*[message.content for message in messages])
        try:
            label = asyncio.run(policy.act(State(messages=messages, tokens=prompt, seed=SEED))).text
        except PolicyError as error:
            label = str(error)
        reply = renderer.action("I would look at the tests first.")
        turn = Turn(
            observation="",
            prompt_tokens=prompt,
            acted_by=ActedBy.STUDENT,
            action=Action(text="", tokens=reply),
            label=None,
        )
        episode = Trajectory(
            task_id="served", attempt=0, round_index=0, turns=(turn,), stop_reason=StopReason.SUBMITTED, solved=False
        )
        scores = TeacherScores(teacher, pool, cache, decode=renderer.text)
        logprobs = asyncio.run(scores.score(episode)).turns[0].teacher_logprobs
        pool.close()
        cache.close()
    expected = transformers_logprobs(folder / "hf", np.concatenate([prompt, reply]))[-len(reply) :]
    difference = float(np.abs(logprobs - expected).max())
    return {"replies": len(cache), "tokens": cache.completion_tokens, "label": label[:200], "scores_differ": difference}


@contextmanager
def vllm_serve(folder: Path) -> Iterator[str]:
    """Run `vllm serve` of the small model while the block runs; yield its URL."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder / "hf", "--port", port]
    command += [
        "--host",
        "127.0.0.1",
        "--max-model-len",
        MAX_MODEL_LEN,
        "--enforce-eager",
        "--served-model-name",
        SERVED_NAME,
    ]
    command += ["--dtype", "float32"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with (
        open(folder / "serve.log", "wb") as log,
        subprocess.Popen(list(map(str, command)), env=environment, stdout=log, stderr=log) as server,
    ):
        try:
            deadline = time.monotonic() + START_DEADLINE_S
            while not answers(f"http://127.0.0.1:{port}/health"):
                if server.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"vllm serve did not start: see {folder / 'serve.log'}")
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            try:
                server.wait(END_DEADLINE_S)
            except subprocess.TimeoutExpired:
                server.kill()


def transformers_logprobs(model: Path, tokens: np.ndarray) -> np.ndarray:
    """Return the log-probs, (n - 1,) float32, of each of the n tokens but the first."""
    import torch
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    with torch.no_grad():
        logits = network(ids).logits[0, :-1]
    logprobs: np.ndarray = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0].numpy()
    return logprobs


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except OSError:
        return False
