"""Tool calls in a teacher's response."""

import contextlib
import json

import hypothesis
import pytest
from hypothesis import strategies as st

from megatron_dagger.envs.swe.responses import read_tool_call
from megatron_dagger.envs.swe.tool_calls import ToolCall, parse_tool_call
from megatron_dagger.envs.swe.tools import TOOLS
from megatron_dagger.policies.openai.cache import MalformedResponse, Response

CALL = ToolCall(name="bash", arguments={"command": "grep -n 'é' a.py"})
XML = "<tool_call>\n<function=bash>\n<parameter=command>\ngrep -n 'é' a.py\n</parameter>\n</function>\n</tool_call>"
EXPECTED = f"Let me look.\n{CALL.text()}"


@pytest.mark.parametrize(
    "response",
    [
        Response(text="Let me look.", tool_calls=(("bash", json.dumps(CALL.arguments)),)),
        Response(text="Let me look.", tool_calls=(("bash", json.dumps(CALL.arguments)), ("submit", "{}"))),
        Response(text=f"Let me look.\n{CALL.text()}"),
        Response(text=f"Let me look.\n{CALL.text()}\n{CALL.text()}\nDone?"),
        Response(text=f"Let me look.\n{XML}"),
        Response(text=f"Let me look.\n\n{XML}\n{XML}"),
        Response(text="Let me look.\n" + XML.removeprefix("<tool_call>\n")),  # Qwen3-Coder leaves it out at times
    ],
)
def test_the_first_call_is_read_in_every_form(response):
    assert read_tool_call(response) == EXPECTED


@pytest.mark.parametrize(
    "response",
    [
        Response(text=""),
        Response(text="I am done."),
        Response(text="", tool_calls=(("bash", "{no json"),)),
        Response(text="", tool_calls=(("bash", "[" * 100_000),)),
        Response(text="", tool_calls=(("bash", '"ls"'),)),
        Response(text="", tool_calls=(("", "{}"),)),
        Response(text="", tool_calls=(("bash", '{"cmd": "ls"}'),)),
        Response(text="<tool_call>\n{no json}\n</tool_call>"),
        Response(text="<function=bash>\n</function>"),
        Response(text="<function=nosuch>\n<parameter=command>\nls\n</parameter>\n</function>"),
        Response(text=f"<think>{CALL.text()}</think>\nHm."),
        Response(text=f"<think>{XML}</think>\nHm."),
    ],
)
def test_a_response_without_a_valid_call_is_malformed(response):
    with pytest.raises(MalformedResponse):
        read_tool_call(response)


def test_numbers_and_lists_of_xml_are_json():
    text = (
        "<tool_call>\n<function=str_replace_editor>\n<parameter=command>\nview\n</parameter>\n"
        "<parameter=path>\na.py\n</parameter>\n<parameter=view_range>\n[1, 20]\n</parameter>\n</function>\n</tool_call>"
    )
    call = parse_tool_call(read_tool_call(Response(text=text)), TOOLS)
    assert call.arguments == {"command": "view", "path": "a.py", "view_range": [1, 20]}


@hypothesis.given(st.text())
def test_any_text_is_read_or_malformed(text):
    with contextlib.suppress(MalformedResponse):
        parse_tool_call(read_tool_call(Response(text=text)), TOOLS)
