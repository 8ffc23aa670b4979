"""Requests to an endpoint's servers, against real HTTP servers: balance, retries, errors, budgets, the key."""

import asyncio
import contextlib
import logging
import threading
import time

import pytest

pytest.importorskip("httpx")

from megatron_dagger.policies.base import BudgetSpent, NoAction, PolicyError, PolicyGone
from megatron_dagger.policies.clock import start_clock
from tests.unit.policies.openai.teachers import act, state, teacher
from tools.support.chat_server import chat_server

SECRET = "sk-a-secret-key"


def states(count):
    return [state(str(number)) for number in range(count)]


def pool_threads():
    return [thread for thread in threading.enumerate() if thread.name == "endpoint-pool"]


def test_requests_are_limited_and_spread_over_the_servers(tmp_path):
    with chat_server(lambda request: "a") as first, chat_server(lambda request: "a") as second:
        first.delay_s = second.delay_s = 0.05
        with teacher(tmp_path, first, second, concurrent_requests=4) as policy:
            act(policy, *states(24))
    assert first.max_concurrent + second.max_concurrent <= 4
    assert min(len(first.requests), len(second.requests)) >= 8


def test_more_than_a_hundred_concurrent_requests_do_not_wait_for_a_connection(tmp_path):
    with chat_server(lambda request: "a") as server, teacher(tmp_path, server, concurrent_requests=120) as policy:
        server.delay_s = 1.5
        act(policy, *states(120))
    assert server.max_concurrent > 100
    assert len(server.requests) == 120


def test_event_loops_share_the_connections_and_closing_the_pool_ends_them(tmp_path):
    with chat_server(lambda request: "a") as server, teacher(tmp_path, server) as policy:
        act(policy, state("1"))
        [thread], pool = pool_threads(), policy._pool
        client = pool._client
        act(policy, state("2"))  # in another event loop
        assert (pool._client, pool_threads()) == (client, [thread])
        pool.close()
        assert client.is_closed
        assert not thread.is_alive()
        act(policy, state("3"))  # opens it again
        assert len(server.requests) == 3
    assert not pool_threads()


def test_closing_the_pool_cancels_running_requests(tmp_path):
    async def close_while_waiting(policy):
        waiting = asyncio.create_task(policy.act(state("x")))
        while not server.requests:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(policy._pool.close)
        with pytest.raises((asyncio.CancelledError, PolicyError)):
            await waiting

    with chat_server(lambda request: "a") as server, teacher(tmp_path, server) as policy:
        server.delay_s = 1.0
        asyncio.run(close_while_waiting(policy))


BUSY = {"error": {"message": "Provider returned error", "code": 429}}


@pytest.mark.parametrize("failure", [429, 503, 529, BUSY, {"choices": []}])
def test_a_request_to_a_busy_server_is_retried(tmp_path, failure):
    answers = iter([failure, failure, "at last"])
    with chat_server(lambda request: next(answers)) as server, teacher(tmp_path, server) as policy:
        assert act(policy, state("x"))[0].text == "at last"


def test_a_server_that_says_when_to_come_back_is_left_alone_until_then(tmp_path):
    answers = iter([(429, {}, {"Retry-After": "2"}), "at last"])
    began = time.monotonic()
    with chat_server(lambda request: next(answers)) as server, teacher(tmp_path, server) as policy:
        assert act(policy, state("x"))[0].text == "at last"
        assert len(server.requests) == 2
    assert 2 <= time.monotonic() - began < 5


def test_forbidden_content_concerns_one_request_and_a_forbidden_key_all(tmp_path):
    def answer(request):
        return 403 if request["messages"][-1]["content"] == "forbidden" else "a"

    with chat_server(answer) as server, teacher(tmp_path, server) as policy:
        with pytest.raises(PolicyGone, match="403"):
            act(policy, state("forbidden"))
        act(policy, state("allowed"))
        with pytest.raises(PolicyError, match="403") as refused:
            act(policy, state("forbidden"))
    assert not isinstance(refused.value, PolicyGone)


def test_a_dead_server_does_not_delay_requests_to_the_others(tmp_path):
    with chat_server(lambda request: "a") as dead:
        pass
    with chat_server(lambda request: "a") as alive, teacher(tmp_path, dead, alive) as policy:
        assert {a.text for a in act(policy, *states(6))} == {"a"}
    assert len(alive.requests) == 6


@contextlib.contextmanager
def started_after(seconds, answer):
    """Yield a server that begins to listen after some seconds."""
    with chat_server(lambda request: answer) as down:
        port = down.server_address[1]

    def start():
        time.sleep(seconds)
        with chat_server(lambda request: answer, port):
            done.wait(20)

    done = threading.Event()
    thread = threading.Thread(target=start)
    thread.start()
    try:
        yield down
    finally:
        done.set()
        thread.join()


def test_a_teacher_that_restarts_is_awaited_and_soon_found_by_all_requests(tmp_path):
    began = time.monotonic()
    with started_after(1.0, "back again") as server, teacher(tmp_path, server, patience_s=20.0) as policy:
        assert {a.text for a in act(policy, *states(32))} == {"back again"}
        assert time.monotonic() - began < 6  # all requests together count as one failure


def test_an_episodes_clock_does_not_count_the_wait_for_a_teacher_that_starts(tmp_path):
    async def episode(policy):
        clock, began = start_clock(), time.monotonic()
        await asyncio.gather(policy.act(state("x")))  # asked in a child task, as a label is
        return clock.elapsed_s(), time.monotonic() - began

    with started_after(1.5, "a") as server, teacher(tmp_path, server, patience_s=20.0) as policy:
        counted_s, waited_s = asyncio.run(episode(policy))
    assert waited_s > 1.4
    assert counted_s < waited_s - 1.0


def test_a_teacher_that_does_not_return_is_an_error_after_the_patience(tmp_path):
    with chat_server(lambda request: "a") as server:
        pass
    began = time.monotonic()
    with (
        teacher(tmp_path, server, patience_s=1.0) as policy,
        pytest.raises(PolicyGone, match=r"no teacher answered within 1 s.*ConnectError"),
    ):
        act(policy, state("x"))
    assert time.monotonic() - began < 5


def test_a_refusal_is_an_immediate_error_with_the_reason(tmp_path):
    with chat_server(lambda request: 401) as server, teacher(tmp_path, server) as policy:
        with pytest.raises(PolicyGone, match=r"refused.*401.*status 401"):
            act(policy, state("x"))
        assert len(server.requests) == 1


def test_a_single_request_that_is_never_answered_does_not_mean_that_the_teacher_is_gone(tmp_path):
    def answer(request):
        return 500 if request["messages"][-1]["content"] == "endless" else "a"

    async def ask(policy):
        async def ask_others():
            for number in range(40):
                await policy.act(state(str(number)))
                await asyncio.sleep(0.1)

        return await asyncio.gather(policy.act(state("endless")), ask_others(), return_exceptions=True)

    # Pauses of 0.5 and 1 s must not fill the second half of the wait.
    with chat_server(answer) as server, teacher(tmp_path, server, patience_s=4.0) as policy:
        error, result_of_others = asyncio.run(ask(policy))
    assert (type(error), result_of_others) == (PolicyError, None)


TOO_LONG = {"error": {"message": "This model's maximum context length is 8192 tokens. However, you requested 9000"}}


@pytest.mark.parametrize(("body", "error"), [(TOO_LONG, NoAction), ({"error": "no such option"}, PolicyError)])
def test_a_conversation_too_long_for_the_teacher_has_no_action_and_other_refusals_are_errors(tmp_path, body, error):
    with chat_server(lambda request: (400, body)) as server, teacher(tmp_path, server) as policy:
        with pytest.raises(PolicyError, match="400") as refused:
            act(policy, state("x"))
        assert (refused.type, len(server.requests)) == (error, 1)


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
def test_a_spent_budget_stops_requests_also_after_a_restart_and_keeps_the_cache(tmp_path, settings, message):
    with chat_server(lambda request: "a") as server:
        with teacher(tmp_path, server, concurrent_requests=1, **settings) as policy:
            for number in range(3):
                act(policy, state(str(number)))
            with pytest.raises(BudgetSpent, match=message):
                act(policy, state("3"))
        requests_so_far = len(server.requests)
        with teacher(tmp_path, server, **settings) as restarted:
            assert act(restarted, state("0"))[0].text == "a", "cached responses cost nothing"
            with pytest.raises(BudgetSpent):
                act(restarted, state("new"))
        assert len(server.requests) == requests_so_far


def test_the_key_is_sent_to_the_endpoint_and_appears_nowhere_else(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MY_TEACHER_KEY", SECRET)
    caplog.set_level(logging.DEBUG)
    statuses = iter([503, 401])
    with (
        chat_server(lambda request: next(statuses, "a")) as server,
        teacher(tmp_path, server, api_key_env="MY_TEACHER_KEY") as policy,
    ):
        with pytest.raises(PolicyError) as failure:
            act(policy, state("x"))
        act(policy, state("x"))
        assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {SECRET}"}
    assert SECRET not in str(failure.value)
    assert SECRET not in caplog.text
    assert all(SECRET.encode() not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
