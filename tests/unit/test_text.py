"""Text from outside becomes text that everything can encode, and lines are what git counts."""

import json
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dagger.text import encodable, parse_json, split_lines

ANY_TEXT = st.text(st.integers(0, 0x10FFFF).map(chr))  # with lone surrogates


@pytest.mark.parametrize(
    "text, expected",
    [("plain", "plain"), ("\ud83d", "\ufffd"), ("a\udc80b\ud800", "a\ufffdb\ufffd"), ("😀\0\x1b", "😀\0\x1b")],
)
def test_lone_surrogates_are_replaced(text, expected):
    assert encodable(text) == expected


@given(ANY_TEXT)
def test_every_text_can_be_encoded_and_good_text_is_unchanged(text):
    cleaned = encodable(text)
    assert len(cleaned) == len(text)
    assert cleaned.encode().decode() == cleaned
    if all(not 0xD800 <= ord(character) < 0xE000 for character in text):
        assert cleaned == text


@given(
    st.recursive(
        ANY_TEXT | st.integers() | st.booleans() | st.none(), lambda v: st.lists(v) | st.dictionaries(ANY_TEXT, v)
    )
)
def test_every_json_value_can_be_written_in_utf8(value):
    json.dumps(parse_json(json.dumps(value)), ensure_ascii=False).encode()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 5_000, "{", "", "nul", "1" * 5_000])
def test_what_is_no_json_is_a_value_error(text):
    with pytest.raises(ValueError):
        parse_json(text)


@pytest.mark.parametrize(
    "text, lines",
    [
        ("", []),
        ("a", ["a"]),
        ("a\n", ["a"]),
        ("a\r\nb\r\n", ["a", "b"]),
        ("a\x0cb\u2028c\x1cd\x85e\n\n", ["a\x0cb\u2028c\x1cd\x85e", ""]),
        ("a\rb", ["a\rb"]),
    ],
)
def test_only_a_line_feed_ends_a_line(text, lines):
    assert split_lines(text) == lines


@settings(max_examples=30, deadline=None)  # each starts a process
@given(st.text(st.sampled_from("a\n\r\x0b\x0c\x1c\u2028\x85")))
def test_lines_are_those_of_grep_and_none_is_lost(text):
    assert "".join(split_lines(text, keepends=True)) == text
    count = subprocess.run(["grep", "-c", ""], input=text.encode(), capture_output=True).stdout
    assert len(split_lines(text)) == int(count)
