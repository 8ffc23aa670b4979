"""The student: the model under training, served by vLLM.

Tokens in, tokens out: a prompt is token ids, and the sampled ids are kept verbatim, including the end-of-turn token.
Every action carries the version of the weights that sampled it. The student serves nothing before its first ``sync``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from megatron_dagger.config import ModelConfig, SamplingConfig, VllmEngineConfig
from megatron_dagger.policies.base import PolicyError
from megatron_dagger.policies.vllm.engine import Completion, Sampling, VllmEngine
from megatron_dagger.policies.vllm.engine_thread import EngineThread
from megatron_dagger.policies.vllm.preload import import_vllm, set_environment
from megatron_dagger.policies.vllm.served_weights import ServedWeights, Serving
from megatron_dagger.types import Action, State
from megatron_dagger.weights.errors import WeightSyncError
from megatron_dagger.weights.transports import WeightSource, checkpoint_source
from megatron_dagger.weights.verify.canary import Canary

logger = logging.getLogger(__name__)

_SEEDS = 2**63  # a torch generator takes a seed below this


@dataclass(frozen=True, kw_only=True)
class SyncReport:
    """The result of a ``sync``: ``tensors`` canonical tensors, all equal to the trainer's."""

    weight_version: int
    tensors: int
    duration_s: float


class VllmStudent:
    """The student's engine and its weights; ``with_sampling`` gives policies that sample from it.

    ``model_dir`` holds the model's config.json. ``decode`` turns ids (without the end-of-turn token) into text, and
    ``end_of_turn`` is the id that ends a turn: those of the run's ChatRenderer.
    """

    def __init__(
        self,
        model_dir: Path,
        model: ModelConfig,
        engine: VllmEngineConfig,
        *,
        seed: int,
        decode: Callable[[np.ndarray], str],
        end_of_turn: int,
    ):
        self.config, self.model = engine, model
        self.decode, self.end_of_turn = decode, end_of_turn
        self._weights = ServedWeights()
        self._thread = EngineThread(partial(import_vllm, engine))
        self._build = partial(VllmEngine, model_dir, model, engine, seed=seed)

    def preload(self) -> None:
        """Import vLLM in the background, before it is known whether an engine is needed."""
        set_environment(self.config)  # now, so every process started from here on inherits the same variables
        self._thread.preload()

    def start(self) -> None:
        """Start the engine in the background with dummy weights, instead of with the first ``sync``.

        The first ``sync`` waits for it, and reports a failed start.
        """
        self._thread.start(self._build)

    def close(self) -> None:
        """Stop the engine and free its memory. Running requests fail. May be called twice."""
        self._thread.close()

    def __enter__(self) -> VllmStudent:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def engine_busy_s(self) -> float:
        """Seconds the engine has spent computing since it was started."""
        return self._thread.busy_s

    def with_sampling(self, sampling: SamplingConfig) -> SampledStudent:
        """Return a policy that samples with these parameters from the weights that are served."""
        return SampledStudent(student=self, sampling=sampling)

    async def sample(self, state: State, sampling: SamplingConfig) -> Action:
        """Sample one turn. On the CPU the same state, seed and weights give the same tokens, whatever is being served.

        A turn ends with the end-of-turn token, or without one after ``sampling.max_tokens`` tokens or when the
        conversation reaches ``max_model_len``. Log-probs are the model's own (temperature 1, no top-p).
        Raises PolicyError if the conversation is too long or the deadline passes, PolicyGone if nothing is served.
        """
        remaining = self.config.max_model_len - len(state.tokens)
        if remaining < 1:
            raise PolicyError(
                f"the conversation has {len(state.tokens)} tokens, the engine's max_model_len is "
                f"{self.config.max_model_len}; lower rollout.limits.max_tokens or raise rollout.engine.max_model_len"
            )
        completion = await self._complete(
            state.tokens.tolist(),
            Sampling(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=min(sampling.max_tokens, remaining),
                seed=state.seed % _SEEDS,
                stop_token=self.end_of_turn,
            ),
        )
        tokens = completion.tokens
        complete = len(tokens) > 0 and tokens[-1] == self.end_of_turn
        return Action(
            text=self.decode(tokens[:-1] if complete else tokens),
            tokens=tokens,
            logprobs=completion.logprobs,
            weight_version=int(completion.weight_version),
        )

    async def _complete(self, prompt: list[int], sampling: Sampling) -> Completion:
        self._weights.require_serving()
        name, future = self._thread.submit(prompt, sampling)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self.config.request_deadline_s)
        except TimeoutError:
            raise PolicyError(
                f"no answer from vLLM within rollout.engine.request_deadline_s={self.config.request_deadline_s:.0f}"
            ) from None
        finally:
            if not future.done():
                self._thread.abort(name)

    def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        """Return the served model's log-probs of a sequence: (n,) ids -> (n - 1,) float32, of tokens[1:].

        At temperature 1, computed without the prefix cache. Raises ValueError unless 2 <= n < max_model_len.
        """
        self._weights.require_serving()
        if not 2 <= len(tokens) < self.config.max_model_len:
            raise ValueError(f"need 2 to {self.config.max_model_len - 1} tokens, got {len(tokens)}")
        sampling = Sampling(temperature=0.0, max_tokens=1, prompt_logprobs=True)
        name, future = self._thread.submit([int(token) for token in tokens], sampling)
        try:
            result = future.result(self.config.request_deadline_s).prompt_logprobs
        except TimeoutError:
            if not future.cancel():
                self._thread.abort(name)
            raise PolicyError(
                f"no answer from vLLM within rollout.engine.request_deadline_s={self.config.request_deadline_s:.0f}"
            ) from None
        assert result is not None, "the sampling asks for them"
        return result

    def sync(
        self, weights: Path | WeightSource, version: int, digests: Mapping[str, str], canary: Canary | None = None
    ) -> SyncReport:
        """Serve ``version`` of the weights, from a Megatron checkpoint or another source, once no request runs.

        ``digests`` describe the trainer's weights in memory (``weights.verify.digest``), ``canary`` the log-probs
        it computed with them. An engine that is not running is started with these weights; one that serves them
        already keeps them. Raises WeightSyncError, which names the tensor, file or rank at fault. The student then
        still serves the previous version, reloaded from its checkpoint if weights had changed already. If that
        is impossible it refuses to act until a ``sync`` succeeds.
        """
        began = time.monotonic()
        if self.serves(version, digests):
            return SyncReport(weight_version=version, tensors=len(digests), duration_s=0.0)
        try:
            source = weights if isinstance(weights, WeightSource) else checkpoint_source(weights, self.model)
            new = Serving(version=version, source=source, digests=digests)
            self._replace_weights(new, canary)
        except Exception as error:
            origin = weights.address if isinstance(weights, WeightSource) else weights
            raise WeightSyncError(
                f"the student could not load version {version} of the weights from {origin}: {error}; {self._weights}"
            ) from error
        report = SyncReport(weight_version=version, tensors=len(digests), duration_s=time.monotonic() - began)
        logger.info("weights %d: %d tensors in %.2f s", version, report.tensors, report.duration_s)
        return report

    def _replace_weights(self, new: Serving, canary: Canary | None) -> None:
        """Load ``new`` into the running engine, or start the engine with it."""
        starts = not self._thread.started
        if starts:
            self._thread.start(partial(self._build, weights=new.source))
        self._thread.wait_until_ready(timeout_s=self.config.start_deadline_s)
        replace = partial(self._weights.replace, new=new, canary=canary, loaded=starts)
        self._thread.run(replace, timeout_s=self.config.start_deadline_s)

    def serves(self, version: int, digests: Mapping[str, str]) -> bool:
        """Return whether exactly these weights are served."""
        return self._weights.serves(version, digests)


@dataclass(frozen=True, kw_only=True)
class SampledStudent:
    """A Policy: a student with sampling parameters. Several share one engine and its weights."""

    student: VllmStudent
    sampling: SamplingConfig
    name: str = "student"

    async def act(self, state: State) -> Action:
        """Sample the next turn; see VllmStudent.sample."""
        return await self.student.sample(state, self.sampling)
