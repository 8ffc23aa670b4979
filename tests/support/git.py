"""Git in a folder of a test, without the settings of whoever runs the tests."""

import os
import subprocess

_AUTHOR = {f"GIT_{who}_{what}": "test@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
ENVIRONMENT = {**os.environ, **_AUTHOR, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}


def commit_each(folder, states):
    """Make a repository with a commit for each of ``states``, the files' contents (bytes) by name.

    A name that is also the folder of another one is left out.
    """
    git(folder, "init", "-q")
    for files in states:
        git(folder, "rm", "-rq", "--ignore-unmatch", ".")
        for name, content in files.items():
            if not any(other.startswith(f"{name}/") for other in files):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
        git(folder, "add", "-A")
        git(folder, "commit", "-q", "--allow-empty", "-m", "state")


def git(folder, *arguments, **options):
    """Run git in ``folder`` and return its output as bytes; ``options`` are those of ``subprocess.run``."""
    command = ["git", *arguments]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, check=True, capture_output=True, **options).stdout
