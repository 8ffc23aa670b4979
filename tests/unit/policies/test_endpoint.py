"""The teacher behind an endpoint, against a real HTTP server: answers, failures, budgets, what is kept."""

import asyncio
import contextlib
import logging
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("httpx")

from megatron_dagger.config import ConfigError, SamplingConfig, TeacherConfig
from megatron_dagger.driver.environments import last_line
from megatron_dagger.envs.repo_repair.expert import next_command
from megatron_dagger.policies.base import BudgetSpent, NoAction, Policy, PolicyError, PolicyGone
from megatron_dagger.policies.openai.cache import Reply, ResponseCache
from megatron_dagger.policies.openai.policy import EndpointPolicy
from megatron_dagger.types import Message, State
from tools.support.chat_server import ChatServer, chat_server, expert

SECRET = "sk-a-secret-key"


def encode(text: str) -> np.ndarray:
    return np.frombuffer(text.encode() + b"\0", np.uint8).astype(np.int32)


def state(*texts: str, seed: int = 1) -> State:
    roles = ["system", "user", *["assistant", "user"] * len(texts)]
    messages = tuple(Message(role=r, content=t) for r, t in zip(roles, ("be an agent", *texts), strict=False))
    return State(messages=messages, tokens=np.zeros(1, np.int32), seed=seed)


def policy(folder, *servers: ChatServer, **settings) -> EndpointPolicy:
    defaults = {"request_timeout_s": 5.0, "patience_s": 5.0, "sampling": SamplingConfig(max_tokens=50)}
    config = TeacherConfig(urls=tuple(s.url for s in servers), model="teacher-30b", **{**defaults, **settings})
    return EndpointPolicy(config, ResponseCache(folder), read=last_line, encode=encode)


def act(teacher: EndpointPolicy, *states: State):
    async def all_of_them():
        return await asyncio.gather(*map(teacher.act, states))

    return asyncio.run(all_of_them())


def test_the_conversation_goes_there_as_messages_and_the_answer_comes_back_as_an_action(tmp_path):
    with chat_server(lambda request: "let me look\nview @1\n") as server:
        teacher = policy(tmp_path, server)
        assert isinstance(teacher, Policy)
        [action] = act(teacher, state("fix it", "locate", "@1 a.py:3"))
    assert (action.text, action.logprobs, action.weight_version) == ("view @1", None, -1)
    assert np.array_equal(action.tokens, encode("view @1"))
    [request] = server.requests
    assert request["messages"] == [
        {"role": "system", "content": "be an agent"},
        {"role": "user", "content": "fix it"},
        {"role": "assistant", "content": "locate"},
        {"role": "user", "content": "@1 a.py:3"},
    ]
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("teacher-30b", 0.7, 50)


def test_the_expert_behind_an_endpoint_answers_as_the_expert(tmp_path):
    states = [state("fix it"), state("fix it", "locate", "@1 a.py:3\nedits: 0"), state("fix it", "runtests", "PASS")]
    with chat_server(expert) as server:
        actions = act(policy(tmp_path, server), *states)
    assert [a.text for a in actions] == [next_command(s.messages) for s in states] == ["locate", "view @1", "submit"]


def test_a_resumed_round_asks_nothing_twice_even_after_a_torn_line(tmp_path):
    with chat_server(lambda request: "a") as server:
        act(policy(tmp_path, server), state("1"), state("2"))
        [file] = tmp_path.glob("*.jsonl")
        file.write_bytes(file.read_bytes() + b'{"key": "torn", "tex')
        again = policy(tmp_path, server)
        assert [a.text for a in act(again, state("1"), state("2"))] == ["a", "a"]
        assert len(server.requests) == 2
        act(again, state("1", seed=2))  # another draw in the same state
        assert len(server.requests) == 3


def test_no_more_requests_at_once_than_allowed_and_the_replicas_share_them(tmp_path):
    with chat_server(lambda request: "a") as one, chat_server(lambda request: "a") as two:
        one.delay_s = two.delay_s = 0.05
        act(policy(tmp_path, one, two, concurrent_requests=4), *(state(str(i)) for i in range(24)))
    assert one.most_at_once + two.most_at_once <= 4
    assert min(len(one.requests), len(two.requests)) >= 8


def test_more_than_a_hundred_requests_at_once_wait_for_no_connection(tmp_path):
    with chat_server(lambda request: "a") as server:
        server.delay_s = 1.5
        act(policy(tmp_path, server, concurrent_requests=120), *(state(str(i)) for i in range(120)))
    assert server.most_at_once > 100
    assert len(server.requests) == 120


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_endpoint_is_asked_again(tmp_path, status):
    answers = iter([status, status, "at last"])
    with chat_server(lambda request: next(answers)) as server:
        assert act(policy(tmp_path, server), state("x"))[0].text == "at last"


def test_a_replica_that_is_gone_does_not_hold_up_the_others(tmp_path):
    with chat_server(lambda request: "a") as alive:
        with chat_server(lambda request: "a") as gone:
            teacher = policy(tmp_path, gone, alive)
        assert {a.text for a in act(teacher, *(state(str(i)) for i in range(6)))} == {"a"}
    assert len(alive.requests) == 6


def test_a_teacher_that_dies_for_a_while_is_waited_for_and_found_soon_by_many(tmp_path):
    with chat_server(lambda request: "a") as first:
        port = first.server_address[1]
    teacher = policy(tmp_path, first, patience_s=20.0)

    def come_back():
        time.sleep(1.0)
        with chat_server(lambda request: "back again", port):
            done.wait(20)

    done = threading.Event()
    thread = threading.Thread(target=come_back)
    thread.start()
    began = time.monotonic()
    try:
        assert {a.text for a in act(teacher, *(state(str(i)) for i in range(32)))} == {"back again"}
        assert time.monotonic() - began < 6  # what they all see is one failure
    finally:
        done.set()
        thread.join()


def test_one_that_stays_away_is_an_error_within_the_patience(tmp_path):
    with chat_server(lambda request: "a") as server:
        pass
    began = time.monotonic()
    with pytest.raises(PolicyGone, match=r"no teacher answered within 1 s.*ConnectError"):
        act(policy(tmp_path, server, patience_s=1.0), state("x"))
    assert time.monotonic() - began < 5


def test_a_refusal_is_an_error_at_once_and_says_why(tmp_path):
    with chat_server(lambda request: 401) as server, pytest.raises(PolicyGone, match=r"refused.*401.*status 401"):
        act(policy(tmp_path, server), state("x"))
    assert len(server.requests) == 1


def test_a_request_that_alone_is_never_answered_is_no_sign_that_the_teacher_is_gone(tmp_path):
    def answer(request):
        return 500 if request["messages"][-1]["content"] == "endless" else "a"

    async def both(teacher):
        async def others():
            for number in range(12):
                await teacher.act(state(str(number)))
                await asyncio.sleep(0.1)

        return await asyncio.gather(teacher.act(state("endless")), others(), return_exceptions=True)

    with chat_server(answer) as server:
        error, others = asyncio.run(both(policy(tmp_path, server, patience_s=1.0)))
    assert (type(error), others) == (PolicyError, None)


TOO_LONG = {"error": {"message": "This model's maximum context length is 8192 tokens. However, you requested 9000"}}


@pytest.mark.parametrize(("body", "error"), [(TOO_LONG, NoAction), ({"error": "no such option"}, PolicyError)])
def test_a_conversation_too_long_for_the_teacher_has_no_action_and_another_refusal_is_an_error(tmp_path, body, error):
    with chat_server(lambda request: (400, body)) as server, pytest.raises(PolicyError, match="400") as refused:
        act(policy(tmp_path, server), state("x"))
    assert (refused.type, len(server.requests)) == (error, 1)


def test_an_answer_without_an_action_is_asked_for_again_with_another_seed(tmp_path):
    answers = iter(["", "  \n ", "view @2"])
    with chat_server(lambda request: next(answers)) as server:
        assert act(policy(tmp_path, server), state("x"))[0].text == "view @2"
        assert len({request["seed"] for request in server.requests}) == 3
    with chat_server(lambda request: "") as server:
        for _ in range(2):  # what is kept is read again after a restart: there is none, and nothing is asked
            with pytest.raises(NoAction, match="no action in 4 answers"):
                act(policy(tmp_path / "other", server), state("x"))
        assert len(server.requests) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"token_budget": 250}, r"330 tokens, teacher\.token_budget is 250"),
        (
            {"money_budget": 0.02, "price_per_million_prompt_tokens": 50, "price_per_million_completion_tokens": 250},
            r"has cost 0\.02, teacher\.money_budget is 0\.02",
        ),
    ],
)
def test_a_spent_budget_stops_it_also_after_a_restart_and_keeps_what_was_answered(tmp_path, settings, message):
    with chat_server(lambda request: "a") as server:
        teacher = policy(tmp_path, server, concurrent_requests=1, **settings)
        for number in range(3):
            act(teacher, state(str(number)))
        with pytest.raises(BudgetSpent, match=message):
            act(teacher, state("3"))
        asked = len(server.requests)
        again = policy(tmp_path, server, **settings)
        assert act(again, state("0"))[0].text == "a", "what is known costs nothing"
        with pytest.raises(BudgetSpent):
            act(again, state("new"))
        assert len(server.requests) == asked


def test_the_key_goes_to_the_endpoint_and_nowhere_else(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MY_TEACHER_KEY", SECRET)
    caplog.set_level(logging.DEBUG)
    statuses = iter([503, 401])
    with chat_server(lambda request: next(statuses, "a")) as server:
        teacher = policy(tmp_path, server, api_key_env="MY_TEACHER_KEY")
        with pytest.raises(PolicyError) as failure:
            act(teacher, state("x"))
        act(teacher, state("x"))
        assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {SECRET}"}
    assert SECRET not in str(failure.value) and SECRET not in caplog.text
    assert all(SECRET.encode() not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"urls": ("localhost:8000",), "model": "m"}, "is no http address"),
        ({"urls": ("http://x/v1",)}, r"teacher\.model is missing"),
        ({"urls": ("http://key@x/v1",), "model": "m"}, "must hold no key"),
        ({"money_budget": 5.0}, "needs teacher.price_per_million"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        TeacherConfig(**settings)


def test_replies_of_several_writers_are_all_read(tmp_path):
    with contextlib.closing(ResponseCache(tmp_path)) as one, contextlib.closing(ResponseCache(tmp_path)) as two:
        one.put("a", Reply(text="1", prompt_tokens=3))
        two.put("b", Reply(text="2", tool_calls=(("bash", '{"command": "ls"}'),), completion_tokens=4))
    store = ResponseCache(tmp_path)
    assert (store.get("a"), len(store), store.prompt_tokens, store.completion_tokens) == (
        Reply(text="1", prompt_tokens=3),
        2,
        3,
        4,
    )
    assert store.get("b") == replace(Reply(text="2"), tool_calls=(("bash", '{"command": "ls"}'),), completion_tokens=4)
