"""Rules that the teacher of the long repairs knows by heart: a number stands for a wrong operator and the right one.

There are more numbers than a small student can learn, as there are more rules in a linter than anybody remembers. A
student that is told a number only has to guess, and to look at the longer comment once it has guessed wrong.
"""

from __future__ import annotations

import random
from functools import cache

from megatron_dagger.envs.repo_repair.tools.swaps import REPLACEMENTS

# Operators that mean themselves in sed's expression, with a space on either side
OPERATORS = frozenset({"<", "<=", ">", ">=", "==", "!=", "+", "-", "+=", "-=", "and", "or"})
PIECES = tuple((f" {wrong} ", f" {right} ") for wrong, right in REPLACEMENTS.items() if {wrong, right} <= OPERATORS)
NUMBERS = range(100, 1000)


def pieces(rule: int) -> tuple[str, str]:
    """Return the wrong and the right piece of text of a rule."""
    return random.Random(rule).choice(PIECES)


@cache
def rules_of(wrong: str, right: str) -> tuple[int, ...]:
    """Return the numbers of the rules with these pieces; none if the bug is of another kind."""
    return tuple(number for number in NUMBERS if pieces(number) == (wrong, right))
