"""Reading a teacher's response: the agent's format, whether or not the endpoint parsed the tool call."""

from __future__ import annotations

import json

from megatron_dagger.envs.swe.tool_calls import ToolCall, parse_tool_call
from megatron_dagger.envs.swe.tools import TOOLS
from megatron_dagger.policies.openai.cache import MalformedResponse, Response


def read_tool_call(response: Response) -> str:
    """Return a response's text with its one tool call written in it, as the student writes it.

    An endpoint may return the call as a field of its own or leave it in the text. Raises MalformedResponse if there is
    not exactly one valid call.
    """
    try:
        calls = [ToolCall(name=name, arguments=json.loads(arguments)) for name, arguments in response.tool_calls]
        text = "\n".join([response.text.strip(), *(call.text() for call in calls)]).strip()
        parse_tool_call(text, TOOLS)
    except ValueError as error:  # FormatError, or arguments that are not JSON
        raise MalformedResponse(str(error)) from error
    return text
