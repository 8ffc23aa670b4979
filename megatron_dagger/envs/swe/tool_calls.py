"""Tool calls in Qwen3's chat format: the tools in the system message, and the strict parser.

A reply is any text followed by exactly one ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>`` and nothing
else. Text in a thinking block is no call. Any other reply raises a FormatError that says what is wrong; nothing is
guessed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_dagger.text import parse_json

OPEN, CLOSE = "<tool_call>", "</tool_call>"
THINK, THOUGHT = "<think>", "</think>"
_TYPES: dict[str, tuple[type, ...]] = {"string": (str,), "integer": (int,), "array": (list,)}
# Verbatim from Qwen3's chat template.
_HEAD = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
"""
_TAIL = """
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""


class FormatError(ValueError):
    """A reply is not a single, well-formed tool call; the message tells the agent what is wrong."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tool:
    """A tool's name and purpose, and by name the JSON schema of each parameter (``type``, ``enum``, ``items``)."""

    name: str
    description: str
    parameters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    required: tuple[str, ...] = ()

    def signature(self) -> dict[str, Any]:
        """Return the tool's schema, in the form of OpenAI's API and Qwen3's chat template."""
        schema = {"type": "object", "properties": dict(self.parameters), "required": list(self.required)}
        return {"type": "function", "function": {**_described(self), "parameters": schema}}

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Raise FormatError unless the arguments fit the tool's parameters."""
        unknown = sorted(arguments.keys() - self.parameters.keys())
        absent = [name for name in self.required if name not in arguments]
        if unknown or absent:
            raise FormatError(
                f"{self.name} takes {', '.join(self.parameters) or 'no arguments'}"
                + (f"; unknown: {', '.join(unknown)}" if unknown else "")
                + (f"; missing: {', '.join(absent)}" if absent else "")
            )
        for name, value in arguments.items():
            schema = self.parameters[name]
            if not isinstance(value, _TYPES[schema["type"]]) or isinstance(value, bool):
                raise FormatError(f"{self.name}: {name} must be of type {schema['type']}")
            if "enum" in schema and value not in schema["enum"]:
                raise FormatError(f"{self.name}: {name} must be one of {', '.join(schema['enum'])}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCall:
    """One call of a tool."""

    name: str
    arguments: dict[str, Any]

    def text(self) -> str:
        """Return the call as an agent writes it."""
        return f"{OPEN}\n{json.dumps({'name': self.name, 'arguments': self.arguments}, ensure_ascii=False)}\n{CLOSE}"


def tools_message(tools: tuple[Tool, ...]) -> str:
    """Return the part of the system message that describes the tools."""
    return _HEAD + "\n".join(json.dumps(tool.signature(), ensure_ascii=False) for tool in tools) + _TAIL


def tool_response(text: str) -> str:
    """Return the user message with a tool's response."""
    return f"<tool_response>\n{text}\n</tool_response>"


def parse_tool_call(reply: str, tools: tuple[Tool, ...]) -> ToolCall:
    """Return the one tool call of a reply. Raises FormatError."""
    answer = _after_thinking(reply)
    if answer.count(OPEN) != 1 or answer.count(CLOSE) != 1:
        count = max(answer.count(OPEN), answer.count(CLOSE))
        raise FormatError(f"a reply must hold exactly one {OPEN}...{CLOSE}, this one holds {count}")
    _, _, rest = answer.partition(OPEN)
    body, closed, after = rest.partition(CLOSE)
    if not closed:
        raise FormatError(f"{CLOSE} stands before {OPEN}")
    if after.strip():
        raise FormatError(f"nothing may follow {CLOSE}")
    try:
        call = parse_json(body, object_pairs_hook=_unique)
    except ValueError as error:
        raise FormatError(f"the tool call is not valid JSON: {error}") from error
    if not isinstance(call, dict) or call.keys() != {"name", "arguments"} or not isinstance(call["arguments"], dict):
        raise FormatError('a tool call is {"name": <function-name>, "arguments": <args-json-object>}')
    tool = next((tool for tool in tools if tool.name == call["name"]), None)
    if tool is None:
        raise FormatError(f"there is no tool {call['name']!r}; there are: {', '.join(tool.name for tool in tools)}")
    tool.check(call["arguments"])
    return ToolCall(name=tool.name, arguments=call["arguments"])


def _after_thinking(reply: str) -> str:
    """Return the text after the thinking block, whose opening tag may be part of the prompt instead of the reply."""
    if THOUGHT in reply:
        return reply.rpartition(THOUGHT)[2]
    if THINK in reply:
        raise FormatError(f"the thinking block is not closed by {THOUGHT}")
    return reply


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError("a name stands there twice")
    return dict(pairs)


def _described(tool: Tool) -> dict[str, str]:
    return {"name": tool.name, "description": tool.description}
