"""The teacher: a program, or a language model behind an OpenAI-compatible endpoint, with its prices and budgets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_dagger.config.base import check_numbers, number, require
from megatron_dagger.config.rollout import SamplingConfig

TEACHERS = ("expert", "endpoint")  # ours


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Who labels: the environment's expert, a model behind the chat completions API, or a policy of your own.

    A model (vLLM, SGLang, hosted ones) has one or several replicas. A policy of your own is a function
    ``package.module:name``, which gets a ``TeacherContext``; see megatron_dagger/policies/README.md.

    The key is not a setting: ``api_key_env`` names the environment variable that holds it. The variable
    MEGATRON_DAGGER_TEACHER_URLS (addresses, separated by blanks) overrides ``urls``, for jobs that start the replicas.
    """

    kind: str = ""  # expert, endpoint, or one of your own; empty: endpoint if urls are set, or else expert
    options: dict[str, Any] = field(default_factory=dict, hash=False)  # of one of your own
    urls: tuple[str, ...] = ()  # one per replica, e.g. http://node1:8000/v1; empty: the environment's expert
    model: str = ""  # the name that the endpoint serves
    api_key_env: str = "OPENAI_API_KEY"
    sampling: SamplingConfig = SamplingConfig(temperature=0.7, top_p=0.9, max_tokens=4096)
    omitted_parameters: tuple[str, ...] = ()  # of temperature, top_p, seed and max_tokens: what the server refuses
    max_tokens_parameter: str = "max_tokens"  # its name in requests, such as max_completion_tokens
    concurrent_requests: int = number(64, gt=0)  # over all replicas
    request_timeout_s: float = number(300.0, gt=0)  # for one answer
    patience_s: float = number(1800.0, gt=0)  # how long a request is repeated while no replica answers
    score_student_turns: bool = False  # also request log-probs of the student's tokens (vLLM, same vocabulary)
    malformed_retries: int = number(3, ge=0)  # answers without a valid action before a state is left without a label
    token_budget: int | None = number(None, ge=0)  # of the whole run: prompt and completion tokens
    price_per_million_prompt_tokens: float = number(0.0, ge=0)
    price_per_million_completion_tokens: float = number(0.0, ge=0)
    money_budget: float | None = number(None, ge=0)  # of the whole run, in the currency of the prices

    @property
    def source(self) -> str:
        """Where labels come from: ``expert``, ``endpoint``, or the name of a policy of the user's own."""
        return self.kind or ("endpoint" if self.urls else "expert")

    def __post_init__(self) -> None:
        check_numbers(self, "teacher")
        require(bool(self.urls) or self.kind != "endpoint", "teacher.kind=endpoint needs teacher.urls")
        require(not self.urls or self.kind != "expert", "teacher.kind=expert asks no endpoint: set teacher.urls=[]")
        own = self.source not in TEACHERS
        require(own or not self.options, f"teacher.options are for a policy of your own, not for {self.source}")
        for url in self.urls:
            require(url.startswith(("http://", "https://")), f"teacher.urls: {url!r} is not an http address")
            require(
                "@" not in url, "teacher.urls: an address must contain no key; name a variable in teacher.api_key_env"
            )
        parameters = ("temperature", "top_p", "seed", self.max_tokens_parameter)
        unknown = sorted(set(self.omitted_parameters) - set(parameters))
        require(not unknown, f"teacher.omitted_parameters: {', '.join(unknown)}: a request has {', '.join(parameters)}")
        require(
            self.max_tokens_parameter not in parameters[:3] and bool(self.max_tokens_parameter),
            f"teacher.max_tokens_parameter={self.max_tokens_parameter!r}: name a parameter of its own",
        )
        require(not self.urls or bool(self.model), "teacher.model is missing: the name the endpoint serves")
        require(
            self.source == "endpoint" or not self.score_student_turns, "teacher.score_student_turns needs teacher.urls"
        )
        prices = self.price_per_million_prompt_tokens + self.price_per_million_completion_tokens
        require(
            self.money_budget is None or prices > 0,
            "teacher.money_budget needs teacher.price_per_million_prompt_tokens or ..._completion_tokens",
        )
