"""What a refusal of an endpoint means: it passes, concerns this request, or concerns all of them.

Gateways report the failures of the server behind them in a body with status 200 as well, so both are read here.
"""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Mapping
from typing import Any

from megatron_dagger.policies.base import NoAction, PolicyError, PolicyGone

_PASSING = {408, 409, 425, 429}  # and all from 500 on
_FATAL = {401, 402, 404, 405}  # wrong key, no credit, wrong model name or address: every request would be refused
_FORBIDDEN, _TOO_LARGE = 403, 413
_NO_CREDIT = re.compile(r"insufficient[ _](quota|balance|credits?|funds)|exceeded your current quota", re.IGNORECASE)
# In the words of OpenAI, vLLM, SGLang, llama.cpp, TGI, Anthropic, Bedrock, Gemini, Mistral, Cohere
_TOO_LONG = re.compile(
    r"context[ _-](length|window|size)|max(imum|_)[ _-]?(model|context)[ _-]?len|maximum number of tokens"
    r"|(prompt|input|request) (is )?too (long|large)|too (long|many( input)? tokens)|reduce the length|longer than the"
    r"|`inputs` tokens \+",
    re.IGNORECASE,
)
_FILTERED = re.compile(r"content[ _](filter|management)|flagged|moderation|safety", re.IGNORECASE)


class Unavailable(Exception):
    """The server cannot answer now, and may later. ``retry_after_s``: when, if it said so."""

    def __init__(self, message: str, retry_after_s: float | None = None):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Forbidden(PolicyError):
    """The request is refused: as all are, or only this one. The caller knows whether others succeed."""


def refusal(url: str, status: int, text: str, headers: Mapping[str, str] | None = None) -> Exception:
    """Return the exception for a response that is no answer, by its status and text.

    Unavailable if it passes; NoAction if the conversation is too long or filtered, which asking again does not change;
    PolicyGone if every request would be refused; Forbidden; else PolicyError.
    """
    message = f"{url} refused the request with {status}: {text[:500]}"
    if _NO_CREDIT.search(text):
        return PolicyGone(message)
    if status in _PASSING or status >= 500:
        return Unavailable(message, retry_after_s(headers or {}))
    if status in _FATAL or 300 <= status < 400:
        return PolicyGone(message)
    if status == _TOO_LARGE or _TOO_LONG.search(text) or _FILTERED.search(text):
        return NoAction(message)
    return Forbidden(message) if status == _FORBIDDEN else PolicyError(message)


def check_body(url: str, body: dict[str, Any]) -> None:
    """Raise the exception for a body with status 200 that holds no choice: an error, or nothing at all."""
    choices, error = body.get("choices"), body.get("error")
    if isinstance(choices, list) and choices and choices[0] is not None:
        return
    if not error:
        raise Unavailable(f"{url} answered without a choice: {str(body)[:500]}")
    status = next((int(code) for code in _codes(error) if _is_status(code)), 500)  # unnamed: it may pass
    raise refusal(url, status, str(error))


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that headers ask to wait: ``retry-after-ms``, or Retry-After (RFC 9110, section 10.2.3)."""
    try:
        if milliseconds := headers.get("retry-after-ms"):
            return max(0.0, float(milliseconds) / 1000)
        if not (value := headers.get("retry-after")):
            return None
        if re.fullmatch(r"\d+(\.\d*)?", value.strip()):
            return float(value)
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _codes(error: Any) -> list[Any]:
    return [error.get(name) for name in ("code", "status", "status_code")] if isinstance(error, dict) else []


def _is_status(code: Any) -> bool:
    return not isinstance(code, bool) and str(code).isdecimal() and 400 <= int(code) < 600
