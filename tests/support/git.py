"""Git in a folder of a test, without the settings of whoever runs the tests."""

import os
import subprocess

_AUTHOR = {f"GIT_{who}_{what}": "test@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
ENVIRONMENT = {**os.environ, **_AUTHOR, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}


def git(folder, *arguments, **options):
    """Run git in ``folder`` and return its output as bytes; ``options`` are those of ``subprocess.run``."""
    command = ["git", *arguments]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, check=True, capture_output=True, **options).stdout
