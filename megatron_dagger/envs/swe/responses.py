"""Reading a teacher's response: its first tool call, as the student would write it.

A teacher is trained on a format of its own. An endpoint may parse the call into a field, or leave it in the text: as
JSON (Qwen3 and others) or as XML (Qwen3-Coder).
"""

from __future__ import annotations

import re
from typing import Any

from megatron_dagger.envs.swe.tool_calls import CLOSE, OPEN, THOUGHT, Tool, ToolCall, parse_tool_call
from megatron_dagger.envs.swe.tools import TOOLS
from megatron_dagger.policies.openai.cache import MalformedResponse, Response
from megatron_dagger.text import parse_json

_FUNCTION = re.compile(r"<function=(?P<name>[^>\s]+)>(?P<body>.*?)</function>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=(?P<name>[^>\s]+)>\n?(?P<value>.*?)\n?</parameter>", re.DOTALL)


def read_tool_call(response: Response) -> str:
    """Return a response's text up to its first tool call, and that call as the student writes it.

    A second call is dropped, as the agent makes one in a turn. Raises MalformedResponse if there is no valid call.
    """
    try:
        text = _with_first_call(response).strip()
        parse_tool_call(text, TOOLS)
    except ValueError as error:  # FormatError, or arguments that are not JSON
        raise MalformedResponse(str(error)) from error
    return text


def _with_first_call(response: Response) -> str:
    if response.tool_calls:
        name, arguments = response.tool_calls[0]
        call = ToolCall(name=name, arguments=parse_json(arguments))
        return f"{response.text.strip()}\n{call.text()}"
    after_thinking = response.text.rfind(THOUGHT) + 1
    function = _FUNCTION.search(response.text, after_thinking)
    if function is None:
        end = response.text.find(CLOSE, after_thinking)
        return response.text if end < 0 else response.text[: end + len(CLOSE)]
    before = response.text[: function.start()].rstrip().removesuffix(OPEN).rstrip()
    return f"{before}\n{_call_of(function['name'], function['body']).text()}"


def _call_of(name: str, body: str) -> ToolCall:
    """Return the call of an XML function; its parameters are text, and JSON where the tool wants another type."""
    tool = next((tool for tool in TOOLS if tool.name == name), Tool(name=name, description=""))

    def value(parameter: str, text: str) -> Any:
        is_text = tool.parameters.get(parameter, {}).get("type", "string") == "string"
        return text if is_text else parse_json(text)

    return ToolCall(name=name, arguments={m["name"]: value(m["name"], m["value"]) for m in _PARAMETER.finditer(body)})
