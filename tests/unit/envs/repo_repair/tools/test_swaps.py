"""Token swaps: the candidate repairs of a line, and that they undo every mutation."""

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dagger.envs.repo_repair.mutate import sites
from megatron_dagger.envs.repo_repair.tools.swaps import Candidate, repairs, replace_token

SOURCE = '''
def clamp(value, low=0, high=5):
    """Return low <= value <= high."""
    if not low <= value and value is not None:  # a < b
        return max(low, value - 1)
    for item in range(3):
        if item in (1, 2) or item % 2 == 0:
            continue
        value += item * -1
    while value > high:
        value = value // 2
    return value.lower().startswith("a < b") is True
'''


def repairs_of(line):
    return {(c.old, c.new, c.nth) for c in repairs(line)}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("if not a <= b:", {("if not", "if", 1), ("<=", "<", 1)}),
        ("return x is not None", {("return", "return not", 1), ("is not", "is", 1)}),
        ("x = 'a < b'  # c < d", set()),
        ("f(*args, **kwargs)", set()),
        ("for a in b:", set()),
        ("y = x[1:-1] - 1", {("1", "0", 1), ("1", "0", 2), ("1", "0", 3), ("-", "+", 2)}),
        ("x = 0 + 12 + 9.5", {("+", "-", 1), ("+", "-", 2)}),
    ],
)
def test_repairs_of_a_line(line, expected):
    assert repairs_of(line) == expected


def test_replace_counts_tokens_not_characters():
    assert replace_token("a <= b < c < d", Candidate(old="<", new=">", nth=2)) == "a <= b < c > d"
    assert replace_token("a <= b", Candidate(old="<", new=">")) is None


def test_every_site_parses_differs_and_can_be_repaired():
    mutations = sites(SOURCE)
    assert {site.operator for site in mutations} == {
        "comparison", "arithmetic", "boolean", "condition", "return", "constant", "name",
    }  # fmt: skip
    original = ast.dump(ast.parse(SOURCE))
    for site in mutations:
        mutated = site.apply(SOURCE)
        assert ast.dump(ast.parse(mutated)) != original
        line = mutated.splitlines()[site.line - 1]
        assert SOURCE.splitlines()[site.line - 1] in [replace_token(line, fix) for fix in repairs(line)]


def test_sites_leave_strings_and_comments_alone():
    for site in sites(SOURCE):
        assert '"""Return low <= value <= high."""' in site.apply(SOURCE)
        assert "# a < b" in site.apply(SOURCE)


@given(st.text(alphabet="ab<>=!+-*/% ()'\"#1290notifreturnand\\", max_size=60))
def test_any_line_can_be_read(line):
    for candidate in repairs(line):
        changed = replace_token(line, candidate)
        assert changed is not None
        assert changed != line
