"""The student: the model under training, served by vLLM.

Tokens in, tokens out: a prompt is ids, and the sampled ids come back verbatim, end-of-turn token
included. Every action carries the version of the weights that sampled it. The student serves nothing
before its first ``sync``, and nothing after a failed one that left its weights mixed for good.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dagger.config import ModelConfig, SamplingConfig, VllmEngineConfig
from megatron_dagger.policies.base import PolicyError, PolicyGone
from megatron_dagger.policies.vllm.engine import Completion, Sampling, VllmEngine
from megatron_dagger.policies.vllm.engine_thread import EngineThread
from megatron_dagger.policies.vllm.preload import import_vllm, set_environment
from megatron_dagger.types import Action, State
from megatron_dagger.weights.errors import WeightSyncError
from megatron_dagger.weights.transports import WeightSource, checkpoint_offer
from megatron_dagger.weights.verify.canary import Canary

logger = logging.getLogger(__name__)

END_OF_TURN = "<|im_end|>"
_SEEDS = 2**63  # a torch generator takes a seed below this


@dataclass(frozen=True, kw_only=True)
class SyncReport:
    """One take-over of weights: ``tensors`` canonical tensors, all found equal to the trainer's."""

    weight_version: int
    tensors: int
    duration_s: float


class VllmStudent:
    """A Policy. ``model_dir`` holds config.json and tokenizer.json, no weights.

    ``decode`` turns ids (without the end-of-turn token) into text and ``end_of_turn`` is the token that
    ends a turn; both come from tokenizer.json unless given.
    """

    name = "student"

    def __init__(
        self,
        model_dir: Path,
        model: ModelConfig,
        engine: VllmEngineConfig,
        *,
        seed: int,
        sampling: SamplingConfig | None = None,
        decode: Callable[[np.ndarray], str] | None = None,
        end_of_turn: int | None = None,
    ):
        self.config, self.model = engine, model
        self.sampling = sampling or SamplingConfig()
        self.weight_version = -1  # of the weights being served
        self._served: tuple[WeightSource, Mapping[str, str]] | None = None
        self._not_serving: str | None = "no weights were brought to it yet: call sync() first"
        self._first: WeightSource | None = None  # what to start with
        self._thread = EngineThread(
            lambda: VllmEngine(model_dir, model, engine, seed=seed, start=self._first), partial(import_vllm, engine)
        )
        if decode is None or end_of_turn is None:
            own_decode, own_end = _tokenizer(model_dir)
            decode, end_of_turn = decode or own_decode, own_end if end_of_turn is None else end_of_turn
        self._decode, self.end_of_turn = decode, end_of_turn

    def prepare(self) -> None:
        """Import what the engine needs, in the background; ``start`` or the first ``sync`` waits for the rest."""
        set_environment(self.config)  # now, so that what is started meanwhile inherits the same each time
        self._thread.prepare()

    def begin(self) -> None:
        """``start`` in the background: the first ``sync`` waits for it, and tells if it has failed."""
        self._thread.begin()

    def start(self) -> None:
        """Start the engine now, with no weights, rather than with the first ``sync``.

        Raises PolicyError; takes ``start_deadline_s`` at most.
        """
        self._thread.start(timeout_s=self.config.start_deadline_s)

    def close(self) -> None:
        """Stop the engine and free its memory; requests under way fail. May be called twice."""
        self._thread.close()

    def __enter__(self) -> VllmStudent:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def engine_busy_s(self) -> float:
        """Seconds that the engine spent computing since it was started."""
        return self._thread.busy_s

    def set_sampling(self, sampling: SamplingConfig) -> None:
        """How ``act`` samples from now on."""
        self.sampling = sampling

    def with_sampling(self, sampling: SamplingConfig) -> SampledStudent:
        """The same student as a policy of its own that samples so."""
        return SampledStudent(student=self, sampling=sampling)

    async def act(self, state: State) -> Action:
        """Sample one turn. The same state and seed give the same tokens, whatever else is being served.

        The turn ends with the end-of-turn token, or without one after ``sampling.max_tokens`` tokens or
        at ``max_model_len``. Log-probs are the model's own: temperature 1, no top-p.
        """
        return await self.sample(state, self.sampling)

    async def sample(self, state: State, sampling: SamplingConfig) -> Action:
        """``act`` with a sampling of the caller's."""
        room = self.config.max_model_len - len(state.tokens)
        if room < 1:
            raise PolicyError(
                f"the conversation has {len(state.tokens)} tokens, the engine's max_model_len is "
                f"{self.config.max_model_len}; lower limits.max_tokens or raise engine.max_model_len"
            )
        completion = await self._complete(
            state.tokens.tolist(),
            Sampling(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=min(sampling.max_tokens, room),
                seed=state.seed % _SEEDS,
                stop_token=self.end_of_turn,
            ),
        )
        tokens = completion.tokens
        ended = len(tokens) > 0 and tokens[-1] == self.end_of_turn
        return Action(
            text=self._decode(tokens[:-1] if ended else tokens),
            tokens=tokens,
            logprobs=completion.logprobs,
            weight_version=int(completion.weight_version),
        )

    async def _complete(self, prompt: list[int], sampling: Sampling) -> Completion:
        self._check_serving()
        name, future = self._thread.submit(prompt, sampling)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self.config.request_deadline_s)
        except TimeoutError:
            raise PolicyError(
                f"no answer from vLLM within request_deadline_s={self.config.request_deadline_s:.0f}"
            ) from None
        finally:
            if not future.done():
                self._thread.abort(name)

    def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        """The served log-probs of a given sequence: (n,) ids -> (n - 1,) float32, of tokens[1:].

        At temperature 1, computed afresh (the prefix cache is not read). At most max_model_len - 1 ids.
        """
        self._check_serving()
        if not 2 <= len(tokens) < self.config.max_model_len:
            raise ValueError(f"need 2 to {self.config.max_model_len - 1} tokens, got {len(tokens)}")
        sampling = Sampling(temperature=0.0, max_tokens=1, prompt_logprobs=True)
        name, future = self._thread.submit([int(token) for token in tokens], sampling)
        try:
            result = future.result(self.config.request_deadline_s).prompt_logprobs
        except TimeoutError:
            if not future.cancel():
                self._thread.abort(name)
            raise PolicyError(f"no answer within {self.config.request_deadline_s:.0f} s") from None
        assert result is not None, "they were asked for"
        return result

    def sync(
        self, weights: Path | WeightSource, version: int, digests: Mapping[str, str], canary: Canary | None = None
    ) -> SyncReport:
        """Take over weights, after the running requests have ended: a Megatron checkpoint's, or offered ones.

        An engine that has not been started is started with them; one that serves them already keeps them.

        ``digests`` are of what the trainer had in memory (``training.digests``), ``canary`` is what it computed
        with them. Raises WeightSyncError,
        naming the tensor, file or rank at fault. The student then goes on serving the version it had: if
        weights had changed already, it takes that one's checkpoint again. Only if there is none, or it
        cannot be read any more, does it refuse to act until a sync succeeds.
        """
        began = time.monotonic()
        if self.serves(version, digests):
            return SyncReport(weight_version=version, tensors=len(digests), duration_s=0.0)

        def load(engine: VllmEngine) -> None:
            try:
                if starts:
                    engine.accept(str(version), digests, canary)
                else:
                    engine.load(offer, str(version), digests, canary)
            except BaseException as error:
                if not engine.intact and self._served is not None:
                    self._not_serving = f"its weights are mixed since a sync failed ({error}); sync again"
                    self._take_back(engine, *self._served)
                raise
            self.weight_version, self._served, self._not_serving = version, (offer, digests), None

        starts = not self._thread.started
        try:
            offer = weights if isinstance(weights, WeightSource) else checkpoint_offer(weights, self.model)
            if starts:
                self._first = offer
                self._thread.start(timeout_s=self.config.start_deadline_s)
            self._thread.run(load, timeout_s=self.config.start_deadline_s)
        except Exception as error:
            now = "it does not serve" if self._not_serving else f"it serves version {self.weight_version} on"
            where = weights.address if isinstance(weights, WeightSource) else weights
            raise WeightSyncError(
                f"the student did not take over version {version} of the weights from {where}: {error}; {now}"
            ) from error
        report = SyncReport(weight_version=version, tensors=len(digests), duration_s=time.monotonic() - began)
        logger.info("weights %d: %d tensors in %.2f s", version, report.tensors, report.duration_s)
        return report

    def serves(self, version: int, digests: Mapping[str, str]) -> bool:
        """Whether these weights are being served."""
        held = self._served is not None and self._served[1] == digests
        return held and self._not_serving is None and self.weight_version == version

    def _take_back(self, engine: VllmEngine, offer: WeightSource, digests: Mapping[str, str]) -> None:
        """Serve the version before again, if it lies in a checkpoint."""
        if offer.kind != "checkpoint":
            return
        try:
            engine.load(offer, str(self.weight_version), digests)
        except Exception as error:
            logger.error("version %d cannot be served again: %s", self.weight_version, error)
        else:
            self._not_serving = None

    def _check_serving(self) -> None:
        if self._not_serving is not None:
            raise PolicyGone(f"the student does not serve: {self._not_serving}")


@dataclass(frozen=True, kw_only=True)
class SampledStudent:
    """A student with a sampling of its own, on the same engine and weights."""

    student: VllmStudent
    sampling: SamplingConfig
    name: str = "student"

    async def act(self, state: State) -> Action:
        return await self.student.sample(state, self.sampling)


def _tokenizer(model_dir: Path) -> tuple[Callable[[np.ndarray], str], int]:
    from tokenizers import Tokenizer

    path = Path(model_dir) / "tokenizer.json"
    if not path.is_file():
        raise PolicyError(f"{path} is missing; pass decode and end_of_turn, or put the tokenizer there")
    tokenizer: Any = Tokenizer.from_file(str(path))
    end = tokenizer.token_to_id(END_OF_TURN)
    if end is None:
        raise PolicyError(f"{path} has no {END_OF_TURN} token to end a turn with")

    def decode(tokens: np.ndarray) -> str:
        return str(tokenizer.decode(tokens.tolist(), skip_special_tokens=False))

    return decode, end
