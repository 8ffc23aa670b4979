"""Reading a chat completion, in the many forms in which servers send one."""

from __future__ import annotations

import json
from typing import Any

from megatron_dagger.policies.openai.cache import MalformedResponse, Response
from megatron_dagger.policies.openai.failures import check_body
from megatron_dagger.text import encodable

_TEXT_PARTS = ("text", "output_text")  # types of content; others are reasoning, refusals, images
_CHARACTERS_PER_TOKEN = 4  # of a response whose server counts nothing: a budget must not be without end
_CUT_OFF = {
    "length": "it was cut off: raise teacher.sampling.max_tokens",
    "max_tokens": "it was cut off: raise teacher.sampling.max_tokens",
    "content_filter": "the endpoint's content filter cut it off",
}


def parse_completion(url: str, body: dict[str, Any]) -> Response:
    """Return the first choice of a chat completion. Raises as ``failures.check_body`` if it has none.

    Whatever else is odd about the choice becomes a response that has no action.
    """
    check_body(url, body)
    choice = json_object(body["choices"][0])
    message = json_object(choice.get("message"))
    text = encodable(_text(message.get("content")))
    calls = tuple(_calls(message))
    written = len(text) + sum(len(name) + len(arguments) for name, arguments in calls)
    prompt, completion = token_counts(body)
    return Response(
        text=text,
        tool_calls=calls,
        finish_reason=str(choice.get("finish_reason") or ""),
        prompt_tokens=prompt,
        completion_tokens=written // _CHARACTERS_PER_TOKEN if completion is None else completion,
    )


def token_counts(body: dict[str, Any]) -> tuple[int, int | None]:
    """Return the tokens of prompt (0 if the body does not count them) and completion (None likewise)."""
    usage = json_object(body.get("usage"))
    prompt, completion = (_count(usage.get(f"{part}_tokens")) for part in ("prompt", "completion"))
    return prompt or 0, completion


def json_object(value: Any) -> dict[str, Any]:
    """Return ``value`` if it is an object; an empty one in place of anything else that a server sent."""
    return value if isinstance(value, dict) else {}


def check_complete(response: Response) -> None:
    """Raise MalformedResponse if the response ended before its end."""
    if problem := _CUT_OFF.get(response.finish_reason):
        raise MalformedResponse(problem)


def _text(content: Any) -> str:
    """Return the text of a message's content, which is a string, a list of parts, or nothing."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    parts = (part if isinstance(part, str) else _part(part) for part in content)
    return "".join(parts)


def _part(part: Any) -> str:
    is_text = isinstance(part, dict) and part.get("type", "text") in _TEXT_PARTS
    return part["text"] if is_text and isinstance(part.get("text"), str) else ""


def _calls(message: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the calls as (name, arguments as JSON text); a call without a name has the name ""."""
    calls = message.get("tool_calls")
    functions: list[Any] = []
    if isinstance(calls, list):
        functions = [call.get("function") for call in calls if isinstance(call, dict)]
    elif message.get("function_call"):  # the older form
        functions = [message["function_call"]]
    return [
        (encodable(str(function.get("name") or "")), _arguments(function.get("arguments")))
        for function in map(json_object, functions)
    ]


def _arguments(arguments: Any) -> str:
    """Return a call's arguments as JSON text: servers send them as text or as an object, and none in four ways."""
    if arguments is None or (isinstance(arguments, str) and arguments.strip() in ("", "null")):
        return "{}"
    return encodable(arguments) if isinstance(arguments, str) else json.dumps(arguments)


def _count(value: Any) -> int | None:
    """Return a number of tokens; None if the server did not count."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return int(value) if is_number and 0 <= value < 1 << 53 else None
