"""Tool calls in a teacher's response."""

import json

import pytest

from megatron_dagger.envs.swe.responses import read_tool_call
from megatron_dagger.envs.swe.tool_calls import ToolCall
from megatron_dagger.policies.openai.cache import MalformedResponse, Response


def test_a_parsed_call_is_read_like_a_call_in_the_text():
    call = ToolCall(name="bash", arguments={"command": "grep -n 'é' a.py"})
    separate = Response(text="Let me look.", tool_calls=(("bash", json.dumps(call.arguments)),))
    assert read_tool_call(separate) == read_tool_call(Response(text=f"Let me look.\n{call.text()}"))
    for calls in ((("bash", "{no json"),), (("bash", '{"cmd": "ls"}'),), 2 * (("submit", "{}"),), ()):
        with pytest.raises(MalformedResponse):
            read_tool_call(Response(text="", tool_calls=calls))
