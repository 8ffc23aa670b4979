"""The teacher behind an endpoint as a Policy, against a real HTTP server."""

import numpy as np
import pytest

pytest.importorskip("httpx")

from megatron_dagger.envs.repo_repair.expert import next_command
from megatron_dagger.policies.base import NoAction, Policy
from tests.unit.policies.openai.teachers import act, encode, state, teacher
from tools.support.chat_server import chat_server, expert


def test_the_conversation_is_sent_as_messages_and_the_response_becomes_an_action(tmp_path):
    with chat_server(lambda request: "let me look\nview @1\n") as server, teacher(tmp_path, server) as policy:
        assert isinstance(policy, Policy)
        [action] = act(policy, state("fix it", "locate", "@1 a.py:3"))
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


def test_the_expert_behind_an_endpoint_acts_like_the_expert(tmp_path):
    states = [state("fix it"), state("fix it", "locate", "@1 a.py:3\nedits: 0"), state("fix it", "runtests", "PASS")]
    with chat_server(expert) as server, teacher(tmp_path, server) as policy:
        actions = act(policy, *states)
    assert [a.text for a in actions] == [next_command(s.messages) for s in states] == ["locate", "view @1", "submit"]


def test_a_resumed_round_repeats_no_request_even_after_a_torn_line(tmp_path):
    with chat_server(lambda request: "a") as server:
        with teacher(tmp_path, server) as policy:
            act(policy, state("1"), state("2"))
        [file] = tmp_path.glob("*.jsonl")
        file.write_bytes(file.read_bytes() + b'{"key": "torn", "tex')
        with teacher(tmp_path, server) as resumed:
            assert [a.text for a in act(resumed, state("1"), state("2"))] == ["a", "a"]
            assert len(server.requests) == 2
            act(resumed, state("1", seed=2))  # the same state in another draw
        assert len(server.requests) == 3


@pytest.mark.parametrize(
    "body",
    [
        {"choices": [{"message": {"content": "view @1\nvie"}, "finish_reason": "length"}]},
        {"choices": [{"message": {"content": {"a": "form of its own"}}}]},
        {"choices": [{"message": None}]},
        {"choices": ["text"]},
        {"choices": [{"message": {"content": [{"type": "text", "text": 3}]}}]},
    ],
)
def test_an_odd_response_is_asked_for_again_and_a_resumed_round_goes_on(tmp_path, body):
    answers = iter([body])
    with chat_server(lambda request: next(answers, "view @1")) as server:
        for _ in range(2):
            with teacher(tmp_path, server) as policy:
                assert act(policy, state("x"))[0].text == "view @1"
        assert len(server.requests) == 2


def test_a_reader_that_fails_on_a_response_is_a_malformed_response(tmp_path, caplog):
    def read(response):
        raise AttributeError("the author did not think of it")

    with chat_server(lambda request: "a") as server, teacher(tmp_path, server, malformed_retries=0) as policy:
        policy._read = read
        with pytest.raises(NoAction, match="AttributeError: the author did not think of it"):
            act(policy, state("x"))
    assert "Traceback" in caplog.text


def test_a_fence_of_code_is_no_command(tmp_path):
    with chat_server(lambda request: "so:\n```bash\nview @1\n```") as server, teacher(tmp_path, server) as policy:
        assert act(policy, state("x"))[0].text == "view @1"


def test_parameters_that_a_server_does_not_take_are_not_sent_and_empty_messages_neither(tmp_path):
    settings = {"omitted_parameters": ("seed", "top_p"), "max_tokens_parameter": "max_completion_tokens"}
    with chat_server(lambda request: "a") as server, teacher(tmp_path, server, **settings) as policy:
        act(policy, state("fix it", "", "error: no command"))
    [request] = server.requests
    assert request.keys() == {"model", "messages", "temperature", "max_completion_tokens"}
    assert [message["content"] for message in request["messages"]][2:] == ["(no text)", "error: no command"]


def test_a_response_without_an_action_is_requested_again_with_another_seed(tmp_path):
    answers = iter(["", "  \n ", "view @2"])
    with chat_server(lambda request: next(answers)) as server, teacher(tmp_path, server) as policy:
        assert act(policy, state("x"))[0].text == "view @2"
        assert len({request["seed"] for request in server.requests}) == 3
    with chat_server(lambda request: "") as server:
        for _ in range(2):  # after a restart the cache gives the same result, without a request
            with teacher(tmp_path / "other", server) as policy, pytest.raises(NoAction, match="no action in 4 answers"):
                act(policy, state("x"))
        assert len(server.requests) == 4
