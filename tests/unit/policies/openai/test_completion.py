"""Chat completions as servers send them: each becomes a response, or a failure of the right kind."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("httpx")

from megatron_dagger.policies.base import NoAction, PolicyError, PolicyGone
from megatron_dagger.policies.openai.cache import MalformedResponse, Response
from megatron_dagger.policies.openai.completion import check_complete, parse_completion
from megatron_dagger.policies.openai.failures import Forbidden, Unavailable, refusal, retry_after_s

URL = "http://teacher"


def parsed(message=None, usage=None, **choice):
    body = {"choices": [{"message": message, **choice}], "usage": usage or {"prompt_tokens": 7, "completion_tokens": 3}}
    return parse_completion(URL, body)


THINKING = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}


@pytest.mark.parametrize(
    "content, text",
    [
        ("view @1", "view @1"),
        (None, ""),
        ([THINKING, {"type": "text", "text": "view "}, {"type": "text", "text": "@1"}], "view @1"),
        ([{"type": "output_text", "text": "a"}, "b", {"type": "image_url", "image_url": {}}], "ab"),
        ([{"type": "text", "text": None}, None, 3], ""),
        ({"text": "not a form of the API"}, ""),
        ("half \ud83d", "half \ufffd"),
    ],
)
def test_content_in_all_its_forms(content, text):
    assert parsed({"role": "assistant", "content": content}).text == text


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ('{"command": "ls"}', '{"command": "ls"}'),
        ({"command": "ls"}, '{"command": "ls"}'),
        ("", "{}"),
        (" ", "{}"),
        (None, "{}"),
        ("null", "{}"),
        ({}, "{}"),
        ("not json", "not json"),  # the environment's reader says what is wrong
    ],
)
def test_a_tool_calls_arguments_in_all_their_forms(arguments, expected):
    call = {"id": "1", "type": "function", "function": {"name": "submit", "arguments": arguments}}
    assert parsed({"content": None, "tool_calls": [call]}).tool_calls == (("submit", expected),)


def test_a_call_without_arguments_without_a_name_and_of_the_older_form():
    assert parsed({"tool_calls": [{"function": {"name": "submit"}}]}).tool_calls == (("submit", "{}"),)
    assert parsed({"tool_calls": [{"function": {}}, {}]}).tool_calls == (("", "{}"), ("", "{}"))
    assert parsed({"function_call": {"name": "a", "arguments": ""}}).tool_calls == (("a", "{}"),)
    assert parsed({"tool_calls": None, "content": "x"}) == Response(text="x", prompt_tokens=7, completion_tokens=3)


@pytest.mark.parametrize(
    "reason, complete",
    [("stop", True), ("tool_calls", True), (None, True), ("eos", True), ("length", False), ("content_filter", False)],
)
def test_what_was_cut_off_is_not_complete(reason, complete):
    response = parsed({"content": "I will look at it.\nvie"}, finish_reason=reason)
    if complete:
        check_complete(response)
    else:
        with pytest.raises(MalformedResponse, match="cut"):
            check_complete(response)


@pytest.mark.parametrize(
    "usage, counts",
    [
        ({"prompt_tokens": 5, "completion_tokens": 2}, (5, 2)),
        ({"prompt_tokens": 5.0, "completion_tokens": None}, (5, 10)),  # estimated from the text
        ({"prompt_tokens": -1, "completion_tokens": "2"}, (0, 10)),
        ({"total_tokens": 9}, (0, 10)),
    ],
)
def test_tokens_that_a_server_does_not_count_are_estimated(usage, counts):
    response = parsed({"content": "x" * 40}, usage=usage)
    assert (response.prompt_tokens, response.completion_tokens) == counts


@pytest.mark.parametrize(
    "body, kind",
    [
        ({}, Unavailable),
        ({"choices": []}, Unavailable),
        ({"choices": None}, Unavailable),
        ({"choices": [None]}, Unavailable),
        ({"error": {"code": 429, "message": "slow down"}}, Unavailable),
        ({"error": {"code": "502", "message": "upstream"}, "choices": []}, Unavailable),
        ({"error": "something"}, Unavailable),
        ({"error": {"status": 401, "message": "bad key"}}, PolicyGone),
        ({"error": {"code": 400, "message": "prompt is too long: 210000 tokens > 200000 maximum"}}, NoAction),
        ({"error": {"code": 400, "message": "unknown field"}}, PolicyError),
    ],
)
def test_a_body_without_a_choice_is_a_failure_of_its_kind(body, kind):
    with pytest.raises(kind) as failure:
        parse_completion(URL, body)
    assert failure.type is kind


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504, 520, 524, 529, 598])
def test_failures_that_pass(status):
    assert type(refusal(URL, status, "busy")) is Unavailable


@pytest.mark.parametrize(
    "status, text, kind",
    [
        (401, "invalid key", PolicyGone),
        (402, "pay first", PolicyGone),
        (404, "no such model", PolicyGone),
        (308, "moved", PolicyGone),
        (429, "You exceeded your current quota, please check your plan", PolicyGone),
        (429, '{"code": "insufficient_quota"}', PolicyGone),
        (403, "no access", Forbidden),
        (403, "your input was flagged", NoAction),
        (400, "The response was filtered due to Azure's content management policy", NoAction),
        (413, "Payload Too Large", NoAction),
        (400, "This model's maximum context length is 8192 tokens", NoAction),
        (400, "the request exceeds the available context size", NoAction),
        (400, "The input token count (1) exceeds the maximum number of tokens allowed (0)", NoAction),
        (422, "`inputs` tokens + `max_new_tokens` must be <= 4096", NoAction),
        (400, "Input is too long for requested model.", NoAction),
        (400, "max_tokens is too large: 9000; at most 4096 completion tokens", PolicyError),
        (400, "unsupported parameter: seed", PolicyError),
    ],
)
def test_failures_that_stay(status, text, kind):
    failure = refusal(URL, status, text)
    assert type(failure) is kind
    assert f"{status}: {text}" in str(failure)


@pytest.mark.parametrize(
    "headers, seconds",
    [
        ({}, None),
        ({"retry-after": "20"}, 20.0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-3"}, None),
    ],
)
def test_how_long_to_wait(headers, seconds):
    assert retry_after_s(headers) == seconds


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text("a\ud83d😀", max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
NAMES = (
    "choices",
    "error",
    "usage",
    "message",
    "content",
    "tool_calls",
    "function",
    "name",
    "arguments",
    "text",
    "type",
)
BODY = st.recursive(
    JSON, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)
)


@given(st.dictionaries(st.sampled_from(NAMES), BODY))
def test_whatever_a_server_sends_is_a_response_or_a_failure(body):
    body = json.loads(json.dumps(body))
    try:
        response = parse_completion(URL, body)
    except (Unavailable, PolicyError):
        return
    json.dumps([response.text, *response.tool_calls], ensure_ascii=False).encode()
