"""The cache of responses: one file per writer, all of them read, torn lines ignored."""

from contextlib import closing

import pytest

from megatron_dagger.policies.openai.cache import Response, ResponseCache

CALL = Response(text="2", tool_calls=(("bash", '{"command": "ls"}'),), completion_tokens=4)


def test_the_responses_of_all_writers_are_read(tmp_path):
    with closing(ResponseCache(tmp_path)) as first, closing(ResponseCache(tmp_path)) as second:
        first.put("a", Response(text="1", prompt_tokens=3))
        second.put("b", CALL)
    cache = ResponseCache(tmp_path)
    assert (len(cache), cache.prompt_tokens, cache.completion_tokens) == (2, 3, 4)
    assert (cache.get("a"), cache.get("b")) == (Response(text="1", prompt_tokens=3), CALL)


def test_a_torn_line_is_ignored(tmp_path):
    with closing(ResponseCache(tmp_path)) as cache:
        cache.put("a", CALL)
    [file] = tmp_path.glob("*.jsonl")
    file.write_bytes(file.read_bytes() + b'{"key": "torn", "tex')
    cache = ResponseCache(tmp_path)
    assert (len(cache), cache.get("a"), cache.get("torn")) == (1, CALL, None)


@pytest.mark.parametrize(
    "values",
    [
        b'"text": ["a", "b"], "tool_calls": []',
        b'"text": null, "tool_calls": []',
        b'"text": "", "tool_calls": [["bash", {"command": "ls"}]]',
        b'"text": "", "tool_calls": [["bash"]]',
        b'"text": "", "tool_calls": [], "prompt_tokens": -1',
        b'"text": "", "tool_calls": [], "prompt_tokens": 1.5',
        b'"text": "", "tool_calls": [], "other": 1',
        b"[" * 100_000,
    ],
)
def test_a_line_that_is_no_response_is_ignored(tmp_path, values):
    """What an earlier version kept without looking is asked for again, and no resumed run fails because of it."""
    line = b'{"key": "good", "text": "t", "tool_calls": []}\n'
    (tmp_path / "host.jsonl").write_bytes(b'{"key": "bad", ' + values + b"}\n" + line)
    cache = ResponseCache(tmp_path)
    assert (cache.get("bad"), cache.get("good")) == (None, Response(text="t"))


def test_the_format_on_disk_is_fixed(tmp_path):
    """Files of older runs are read."""
    line = (
        b'{"key": "k", "text": "t", "tool_calls": [["bash", "{}"]], "finish_reason": "", '
        b'"prompt_tokens": 1, "completion_tokens": 2}\n'
    )
    (tmp_path / "host-1-0123abcd.jsonl").write_bytes(line.replace(b'"finish_reason": "", ', b""))  # an older one
    response = Response(text="t", tool_calls=(("bash", "{}"),), prompt_tokens=1, completion_tokens=2)
    assert ResponseCache(tmp_path).get("k") == response
    with closing(ResponseCache(tmp_path / "new")) as cache:
        cache.put("k", response)
    [file] = (tmp_path / "new").glob("*.jsonl")
    assert file.read_bytes() == line
