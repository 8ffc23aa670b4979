"""A vLLM engine in this process, with only the functions that the student needs.

Only this module, ``preload.py`` and ``weights/vllm/`` touch vLLM. The code is the same for vLLM's CPU and CUDA builds.
All methods must be called on one thread (``engine_thread``).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dagger.config import ModelConfig, VllmEngineConfig, to_dict
from megatron_dagger.gpus import check_torch
from megatron_dagger.policies.base import PolicyError
from megatron_dagger.policies.vllm.preload import import_vllm
from megatron_dagger.weights.errors import WeightMapError, WeightSyncError
from megatron_dagger.weights.families.fp8 import BLOCK
from megatron_dagger.weights.transports import WeightSource
from megatron_dagger.weights.verify.canary import Canary
from megatron_dagger.weights.verify.digest import compare, merge

logger = logging.getLogger(__name__)

_PREFILL_TOKENS = 2048  # per step, on the CPU


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The sampling parameters of one request. ``prompt_logprobs`` requests those of the prompt's tokens as well."""

    temperature: float
    top_p: float = 1.0
    max_tokens: int
    seed: int | None = None
    stop_token: int | None = None
    prompt_logprobs: bool = False


@dataclass(frozen=True, kw_only=True)
class Completion:
    """The sampled ids, (n,) int32 with the stop token, and their log-probs, (n,) float32.

    Log-probs are of the model's own distribution (temperature 1, no top-p). ``prompt_logprobs`` is
    (prompt length - 1,) float32 or None. ``weight_version`` names the weights that sampled the tokens,
    ``cached_tokens`` counts the prompt's tokens that came from the prefix cache.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    prompt_logprobs: np.ndarray | None
    weight_version: str
    cached_tokens: int


def quantization_settings(config: VllmEngineConfig) -> dict[str, Any]:
    """Return the config.json entries of an FP8 checkpoint, as in Qwen3's; lm_head is not quantised."""
    if config.quantization == "none":
        return {}
    block = [BLOCK, BLOCK]
    method = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block}
    return {"quantization_config": {**method, "modules_to_not_convert": ["lm_head"]}}


class VllmEngine:
    """vLLM, started on the config.json in ``model_dir``.

    It loads ``weights``, which ``accept`` then verifies. Without ``weights`` it starts with dummy weights, which
    ``load`` replaces. ``intact`` says whether all workers hold the same version of real weights.
    """

    def __init__(
        self,
        model_dir: Path,
        model: ModelConfig,
        config: VllmEngineConfig,
        *,
        seed: int,
        weights: WeightSource | None = None,
    ):
        self.intact = False
        import_vllm(config)
        import torch
        from vllm import EngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine

        from megatron_dagger.weights.vllm import plugin

        check_torch(torch, os.environ, needed=config.dtype != "float32")
        prefill: dict[str, Any] = {}
        if not torch.cuda.is_available():
            torch.set_num_threads(config.threads)  # of this thread; later vLLM makes it a no-op
            # With chunked prefill vLLM rewinds a seeded request's generator after each chunk. torch's CPU
            # generator cannot do that, and the engine dies. So on the CPU a prompt is never chunked.
            budget = max(config.max_model_len, _PREFILL_TOKENS)
            prefill = {"enable_chunked_prefill": False, "max_num_batched_tokens": budget}
        plugin.register()
        loader = {"checkpoint": None} if weights is None else {"source": to_dict(weights), "model": to_dict(model)}
        memory = config.kv_cache_memory_mib
        args = EngineArgs(
            model=str(model_dir),
            skip_tokenizer_init=True,  # ids in, ids out
            generation_config="vllm",  # no sampling settings of the checkpoint
            load_format=plugin.LOAD_FORMAT,
            model_loader_extra_config=loader,
            dtype=config.dtype,
            hf_overrides=quantization_settings(config),
            seed=seed,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            kv_cache_memory_bytes=None if memory is None else memory << 20,
            gpu_memory_utilization=config.gpu_memory_utilization,
            tensor_parallel_size=config.tensor_parallel_size,
            enforce_eager=config.enforce_eager,
            enable_prefix_caching=True,
            **prefill,
            logprobs_mode="raw_logprobs",
            disable_log_stats=True,
            weight_transfer_config={"backend": plugin.BACKEND},  # type: ignore[arg-type]
            worker_extension_cls=plugin.WORKER_EXTENSION,
        )
        # vLLM's number of tokens of a step suits the GPU in this context; in the default one it is 2,048 on all.
        self._engine = LLMEngine.from_engine_args(args, usage_context=UsageContext.LLM_CLASS)
        self._model, self._max_model_len = model, config.max_model_len
        self._precision = config.dtype if config.quantization == "none" else config.quantization
        self._engine.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": {"model": to_dict(model)}})

    def add(self, name: str, prompt: Sequence[int], sampling: Sampling) -> None:
        """Queue a request. Raises PolicyError if vLLM refuses it."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        try:
            params = SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_tokens,
                seed=sampling.seed,
                ignore_eos=True,  # only stop_token ends a turn, not the ids in a checkpoint's files
                stop_token_ids=None if sampling.stop_token is None else [sampling.stop_token],
                logprobs=0,  # of the sampled token only
                prompt_logprobs=0 if sampling.prompt_logprobs else None,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            self._engine.add_request(name, {"prompt_token_ids": prompt}, params)
        except (ValueError, TypeError) as error:
            raise PolicyError(f"vLLM refused the request: {error}") from error

    def step(self) -> list[tuple[str, Completion | PolicyError]]:
        """Compute one token for every running request, and return the requests that finished."""
        return [(output.request_id, _completion(output)) for output in self._engine.step() if output.finished]

    def abort(self, name: str) -> None:
        """Cancel a request."""
        self._engine.abort_request([name])

    def load(
        self, source: WeightSource, version: str, digests: Mapping[str, str], canary: Canary | None = None
    ) -> None:
        """Replace the weights while no request runs.

        Raises WeightSyncError if a worker fails, if the workers' weights differ from ``digests``, or if their
        log-probs of the ``canary`` differ from the trainer's. ``intact`` then says whether all workers still hold
        the previous version.
        """
        was_intact, self.intact = self.intact, False
        rpc = self._engine.collective_rpc
        rpc("start_weight_update")
        rpc("update_weights", kwargs={"update_info": {"source": to_dict(source)}})
        rpc("finish_weight_update")
        states = rpc("transfer_state")
        self.intact = was_intact and all(state.error and not state.touched for state in states)
        for rank, state in enumerate(states):
            if state.error is not None:
                raise WeightSyncError(state.error if len(states) == 1 else f"worker {rank}: {state.error}")
        self._check(states, digests)
        if not self._engine.reset_prefix_cache():  # it was computed with the old weights
            raise WeightSyncError("the prefix cache could not be emptied: requests are still running")
        self._serve(version, canary)

    def accept(self, version: str, digests: Mapping[str, str], canary: Canary | None = None) -> None:
        """Verify the weights the engine was started with, as ``load`` does."""
        self._check(self._engine.collective_rpc("transfer_state"), digests)
        self._serve(version, canary)

    def _serve(self, version: str, canary: Canary | None) -> None:
        if canary is not None and len(canary.tokens) < self._max_model_len:
            sampling = Sampling(temperature=0.0, max_tokens=1, prompt_logprobs=True)
            self.add("canary", list(canary.tokens), sampling)
            finished: list[tuple[str, Completion | PolicyError]] = []
            while not finished:
                finished = self.step()
            outcome = finished[0][1]
            if isinstance(outcome, PolicyError):
                raise WeightSyncError(f"the canary's log-probs could not be computed: {outcome}")
            problem = canary.problem(outcome.prompt_logprobs, self._precision)
            if problem is not None:
                raise WeightSyncError(problem)
        self._engine.set_weight_version(version)
        self.intact = True

    def _check(self, states: Sequence[Any], digests: Mapping[str, str]) -> None:
        try:
            problem = compare(digests, merge([state.shares for state in states], self._model))
        except WeightMapError as error:
            problem = str(error)
        if problem is not None:
            raise WeightSyncError(f"the workers' weights are not the trainer's: {problem}")

    def close(self) -> None:
        """Stop the workers and free their memory."""
        import torch

        set_num_threads = torch._C.set_num_threads
        self._engine.engine_core.shutdown()  # its process groups and caches too
        del self._engine
        torch.set_num_threads = set_num_threads  # vLLM's CPU worker had replaced it


def _completion(output: Any) -> Completion | PolicyError:
    [sample] = output.outputs
    if sample.finish_reason not in ("stop", "length"):
        return PolicyError(f"vLLM ended the request with {sample.finish_reason!r}")
    versions = sample.weight_versions or []
    if len(versions) > 1:
        return PolicyError(f"weights changed under the request: {versions}")
    tokens = np.asarray(sample.token_ids, dtype=np.int32)
    prompt = None
    if output.prompt_logprobs is not None:  # the first token has none
        pairs = zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
        prompt = np.asarray([row[token].logprob for row, token in pairs], dtype=np.float32)
    return Completion(
        tokens=tokens,
        logprobs=np.asarray(
            [row[token].logprob for row, token in zip(sample.logprobs, sample.token_ids, strict=True)],
            dtype=np.float32,
        ),
        prompt_logprobs=prompt,
        weight_version=versions[0].version if versions else "",
        cached_tokens=output.num_cached_tokens or 0,
    )
