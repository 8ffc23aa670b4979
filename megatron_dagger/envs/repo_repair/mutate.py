"""Put bugs into real code by swapping one token.

``sites`` walks the syntax tree of a module and finds every place where a swap of the bug family (tools/swaps.py)
changes the code's meaning: operators, conditions, returned values, constants.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_dagger.envs.repo_repair.tools.swaps import (
    LARGEST_NUMBER,
    OPERATOR_OF,
    REPLACEMENTS,
    Candidate,
    repairs,
    replace_token,
    tokens,
)
from megatron_dagger.text import split_lines


@dataclass(frozen=True, kw_only=True, slots=True)
class Mutation:
    """One bug: the new text, without its line ending, of line number ``line`` (from 1) of a module."""

    line: int
    operator: str
    bug: Candidate
    mutated: str

    def apply(self, source: str) -> str:
        """Return the module's source with the bug."""
        lines = split_lines(source, keepends=True)
        ending = lines[self.line - 1][len(lines[self.line - 1].rstrip("\r\n")) :]
        lines[self.line - 1] = self.mutated + ending
        return "".join(lines)


def sites(source: str) -> list[Mutation]:
    """Return every mutation of a module's source, by position. Each one has a repair (swaps.repairs) that undoes it."""
    tree = ast.parse(source)
    lines = split_lines(source)  # as the syntax tree counts them
    mutations: dict[tuple[int, int], Mutation] = {}
    for node in ast.walk(tree):
        for line, column in _places(node):
            text = lines[line - 1] if line <= len(lines) else ""
            if not text.isascii():  # the syntax tree counts columns in bytes
                continue
            mutation = _mutate(text, line, column)
            if mutation is not None:
                mutations[line, column] = mutation
    return [mutations[place] for place in sorted(mutations)]


def _places(node: ast.AST) -> Iterator[tuple[int, int]]:
    """Yield (line, column) positions from which to look for a token to swap in ``node``."""
    match node:
        case ast.Compare(left=left, ops=[_]):
            yield left.end_lineno or 0, left.end_col_offset or 0
        case ast.BinOp(left=left):
            yield left.end_lineno or 0, left.end_col_offset or 0
        case ast.AugAssign(target=target):
            yield target.end_lineno or 0, target.end_col_offset or 0
        case ast.BoolOp(values=[first, *_]):
            yield first.end_lineno or 0, first.end_col_offset or 0
        case ast.If() | ast.While() | ast.Break() | ast.Continue():
            yield node.lineno, node.col_offset
        case ast.Return(value=value) if value is not None and not _is_none(value):
            yield node.lineno, node.col_offset
        case ast.Constant(value=bool()):
            yield node.lineno, node.col_offset
        case ast.Constant(value=int(value)) if 0 <= value < LARGEST_NUMBER:
            yield node.lineno, node.col_offset
        case ast.Call(func=ast.Name(id=name)) if name in REPLACEMENTS:
            yield node.lineno, node.col_offset
        case ast.Call(func=ast.Attribute(attr=name, value=value)) if name in REPLACEMENTS:
            yield value.end_lineno or 0, value.end_col_offset or 0


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _mutate(text: str, line: int, column: int) -> Mutation | None:
    """Swap the first token at or after ``column``, past brackets, dots and spaces; None if it is not of the family."""
    seen: dict[str, int] = {}
    for start, token in tokens(text):
        seen[token] = seen.get(token, 0) + 1
        if start < column or token in (")", "]", "."):
            continue
        if token in REPLACEMENTS:
            operator, new = OPERATOR_OF[token], REPLACEMENTS[token]
        elif token.isdigit() and int(token) < LARGEST_NUMBER:
            operator, new = "constant", str(int(token) + 1)
        else:
            return None
        bug = Candidate(old=token, new=new, nth=seen[token])
        mutated = replace_token(text, bug)
        if mutated is None or not any(replace_token(mutated, fix) == text for fix in repairs(mutated)):
            return None
        return Mutation(line=line, operator=operator, bug=bug, mutated=mutated)
    return None
