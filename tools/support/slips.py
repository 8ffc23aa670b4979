"""Commands that a student of the long repairs may say instead of the right one."""

from __future__ import annotations

import random
from collections.abc import Sequence


def slip(right: str, paths: Sequence[str], chance: random.Random) -> str:
    """Return a drawn command: the right one, one nearly right, another step's, or a damaging one.

    ``paths`` are files of the repository, at least one of them in a folder.
    """
    path = chance.choice([path for path in paths if "/" in path])
    folder, _, file = path.rpartition("/")
    line = chance.randint(1, 300)
    wrong, other = chance.choice([("<", "<="), ("1", "2"), ("and", "or"), ("True", "False"), ("==", "!="), ("(", "[")])
    digits = [position for position, letter in enumerate(right) if letter.isdigit()]
    position = chance.choice(digits) if digits else 0
    return chance.choice(
        [
            right,
            right,
            right[:-1],
            right[:position] + str(chance.randint(0, 9)) + right[position + 1 :],
            f"cd {folder}",
            f"cd ~/{folder}",
            "cd ..",
            "cd",
            "cd todo",
            "cd nowhere",
            "head -1 todo/list",
            "head -1 todo/more",
            f"sed -n {line}p {file}",
            f"sed -i '{line}s/{wrong}/{other}/' {file}",
            f"sed -i '{line}s/{wrong}/{other}/' {path}",
            f"sed -i '{line}s/{wrong}/ {file}",
            f"sed -i 's/{wrong}/{other}/' {path}",
            f"sed -i '{line}d' {path}",
            f"echo x >> {file}",
            f"echo x >> {path}",
            f"rm {path}",
            "git diff | grep ^[-+]",
            "git checkout :/",
            "git stash -q",
            "git reset -q --hard start",
            "git reset -q --hard HEAD~1",
            "git commit -qam fix",
            "sed -i 1d todo/* && git commit -qam fix",
            "sed -i 1d todo/list",
            "head -1 todo/tests | xargs pytest",
            "pytest @all.tests",
            "ls",
            "fix it",
        ]
    )
