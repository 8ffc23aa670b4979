"""The agent's tool calls: the tools as Qwen3's template shows them, and a strict parser of replies."""

import json

import pytest

from megatron_dagger.envs.swe.tool_calls import FormatError, ToolCall, parse_tool_call, tools_message
from megatron_dagger.envs.swe.tools import TOOLS

CALL = ToolCall(name="bash", arguments={"command": 'echo "é" && ls\n'})


@pytest.mark.parametrize(
    "reply",
    [
        CALL.text(),
        f"First I look around.\n{CALL.text()}\n",
        f"<think>\nperhaps <tool_call>{{}}</tool_call>?\n</think>\n\n{CALL.text()}",
        f"the template wrote the opening tag</think>{CALL.text()}",
        '<tool_call>{"arguments": {"command": "echo \\"\\u00e9\\" && ls\\n"}, "name": "bash"}</tool_call>',
    ],
)
def test_a_single_call_is_parsed(reply):
    assert parse_tool_call(reply, TOOLS) == CALL


def test_half_characters_of_a_call_are_replaced():
    reply = '<tool_call>{"name": "bash", "arguments": {"command": "cat \\ud83d; echo \\ud83d\\ude00"}}</tool_call>'
    assert parse_tool_call(reply, TOOLS).arguments == {"command": "cat \ufffd; echo 😀"}


def called(name, **arguments):
    return ToolCall(name=name, arguments=arguments).text()


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        ("ls", "exactly one .* holds 0"),
        ("", "holds 0"),
        (CALL.text() * 2, "holds 2"),
        (CALL.text() + " and so on", "nothing may follow"),
        (CALL.text().replace("</tool_call>", ""), "holds 1"),
        ("</tool_call>{}<tool_call>", "stands before"),
        (f"<think>\nI shall {CALL.text()}", "not closed"),
        (f"<think>{CALL.text()}</think> done", "holds 0"),
        ("<tool_call>{'name': 'bash'}</tool_call>", "not valid JSON"),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "not valid JSON: it is nested too deeply"),
        ("<tool_call>" + '{"a":' * 5_000 + "</tool_call>", "not valid JSON"),
        ('<tool_call>{"name": "\\ud83d", "arguments": {}}</tool_call>', "there is no tool '\ufffd'"),
        ("<tool_call>[]</tool_call>", "a tool call is"),
        ('<tool_call>{"name": "bash"}</tool_call>', "a tool call is"),
        ('<tool_call>{"name": "bash", "arguments": "ls"}</tool_call>', "a tool call is"),
        ('<tool_call>{"name": "bash", "arguments": {}, "id": 1}</tool_call>', "a tool call is"),
        ('<tool_call>{"name": "bash", "name": "submit", "arguments": {}}</tool_call>', "stands there twice"),
        (called("python", code="1"), "there is no tool 'python'; there are: bash, str_replace_editor, submit"),
        (called("bash"), "bash takes command; missing: command"),
        (called("bash", command="ls", timeout=3), "unknown: timeout"),
        (called("bash", command=["ls"]), "command must be of type string"),
        (called("submit", why="done"), "submit takes no arguments; unknown: why"),
        (called("str_replace_editor", command="delete", path="/a"), "must be one of view, create"),
        (called("str_replace_editor", command="insert", path="/a", insert_line=True), "of type integer"),
    ],
)
def test_a_reply_without_a_valid_call_is_an_error_with_the_reason(reply, why):
    with pytest.raises(FormatError, match=why):
        parse_tool_call(reply, TOOLS)


def test_tools_are_shown_as_qwen3s_template_shows_them():
    jinja = pytest.importorskip("jinja2")
    # The tools' part of tokenizer_config.json of Qwen/Qwen3-8B, chat_template.
    template = jinja.Environment().from_string(
        """\
{{- "# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n" }}
{{- "You are provided with function signatures within <tools></tools> XML tags:\\n<tools>" }}
{%- for tool in tools %}{{- "\\n" }}{{- tool }}{%- endfor %}
{{- "\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments " }}
{{- "within <tool_call></tool_call> XML tags:\\n<tool_call>\\n" }}
{{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call>' }}"""
    )
    signatures = [json.dumps(tool.signature(), ensure_ascii=False) for tool in TOOLS]
    assert template.render(tools=signatures) == tools_message(TOOLS)
