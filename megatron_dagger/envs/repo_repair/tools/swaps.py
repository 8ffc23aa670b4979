"""The family of bugs: pairs of tokens that programmers confuse.

A bug is one such swap, or an integer that is one too large, at one place; so is its repair. The mutator and the expert
read the same table, but the expert does not know where the mutator applied it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

# operator -> pairs of tokens, each the repair of the other
SWAPS: dict[str, tuple[tuple[str, str], ...]] = {
    "comparison": (("<", "<="), (">", ">="), ("==", "!="), ("is", "is not"), ("in", "not in")),
    "arithmetic": (("+", "-"), ("*", "/"), ("+=", "-="), ("%", "//")),
    "boolean": (("and", "or"), ("True", "False"), ("any", "all")),
    "condition": (("if", "if not"), ("while", "while not")),
    "return": (("return", "return not"),),
    "name": (("min", "max"), ("break", "continue"), ("startswith", "endswith"), ("lower", "upper")),
}
LARGEST_NUMBER = 9  # integers 0..8 become one larger; 1..9 may be one too large
REPLACEMENTS: dict[str, str] = {a: b for pairs in SWAPS.values() for x, y in pairs for a, b in ((x, y), (y, x))}
OPERATOR_OF: dict[str, str] = {token: name for name, pairs in SWAPS.items() for pair in pairs for token in pair}


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """Replace the ``nth`` (from 1) occurrence of the token ``old`` in a line by ``new``."""

    old: str
    new: str
    nth: int = 1


_STRING = re.compile(r"""(?i)[rbfu]*('''|\"\"\"|'|")(?:\\.|(?!\1).)*(?:\1|$)|\#.*""")
_TWO_WORDS = re.compile(r"\b(is not|not in|if not|while not|return not)\b")
_TOKEN = re.compile(
    r"\b(?:is not|not in|if not|while not|return not)\b|[A-Za-z_]\w*|\d[\w.]*|\*\*=?|//=?|->|:=|<<|>>"
    r"|[-+*/%<>=!&|^@]=|[-+*/%<>=&|^~@.,:;()\[\]{}]"
)
_RANK = {token: rank for rank, token in enumerate(OPERATOR_OF)}
_ARITHMETIC = frozenset(token for pair in SWAPS["arithmetic"] for token in pair if "=" not in token)
_OPERAND_END = re.compile(r"[\w)\]]$")


def tokens(line: str) -> Iterator[tuple[int, str]]:
    """Yield the (column, token) pairs of a line of code, without strings and comments.

    Two-word operators (``is not``) are one token.
    """
    blank = _STRING.sub(lambda match: " " * len(match.group()), line)
    for match in _TOKEN.finditer(blank):
        yield match.start(), match.group()


def repairs(line: str) -> list[Candidate]:
    """Return every repair that a line of code may need, in the order of the table, then from left to right."""
    seen: dict[str, int] = {}
    candidates = []
    before = ""
    in_loop_head = False
    for _, token in tokens(line):
        seen[token] = seen.get(token, 0) + 1
        if token in REPLACEMENTS:
            unary = token in _ARITHMETIC and not _OPERAND_END.search(before)
            loop = token == "in" and in_loop_head
            if not unary and not loop:
                candidates.append(Candidate(old=token, new=REPLACEMENTS[token], nth=seen[token]))
        elif token.isdigit() and 1 <= int(token) <= LARGEST_NUMBER:
            candidates.append(Candidate(old=token, new=str(int(token) - 1), nth=seen[token]))
        in_loop_head = token == "for" or (in_loop_head and token != "in")
        before = token
    return sorted(candidates, key=lambda candidate: _RANK.get(candidate.old, len(_RANK)))


def numbered(fixes: list[Candidate]) -> str:
    """Return the fixes as ``view`` shows them."""
    return ", ".join(f"{n} {fix.old} -> {fix.new}" for n, fix in enumerate(fixes, 1))


def replace_token(line: str, candidate: Candidate) -> str | None:
    """Return the line with the candidate applied; None if the line has no such token."""
    count = 0
    for column, token in tokens(line):
        if token == candidate.old:
            count += 1
            if count == candidate.nth:
                return line[:column] + candidate.new + line[column + len(token) :]
    return None
