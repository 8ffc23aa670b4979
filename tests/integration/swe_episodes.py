"""Tool calls in an episode of the task of tools/support/swe_image.py, and a task with a bug like SWE-smith's."""

import dataclasses

from megatron_dagger.envs.swe.swesmith import swesmith_task
from megatron_dagger.envs.swe.task import CONDA
from megatron_dagger.envs.swe.tool_calls import ToolCall
from tools.support import swe_image


def bash_call(command):
    return ToolCall(name="bash", arguments={"command": command}).text()


def bash(env, command):
    return answer(env, "bash", command=command)


def edit(env, command, path, **arguments):
    return answer(env, "str_replace_editor", command=command, path=path, **arguments)


def answer(env, name, **arguments):
    """Call a tool in ``env`` and return its response."""
    text = env.step(ToolCall(name=name, arguments=arguments).text()).text
    assert text.startswith("<tool_response>\n") and text.endswith("\n</tool_response>")
    return text.removeprefix("<tool_response>\n").removesuffix("\n</tool_response>")


BUG = """\
diff --git a/calc/__init__.py b/calc/__init__.py
--- a/calc/__init__.py
+++ b/calc/__init__.py
@@ -5,2 +5,2 @@ def mean(values):
 def spread(values):
-    return max(values) - min(values)
+    return max(values) + min(values)
"""


def smith_task():
    """Return a task with a bug like SWE-smith's, in the image of tools/support/swe_image.py."""
    row = {
        "instance_id": "example__calc.c0ffee00.func__1",
        "repo": "swesmith/example__calc.c0ffee00",
        "patch": BUG,
        "FAIL_TO_PASS": ["tests/test_calc.py::test_spread"],
        "PASS_TO_PASS": [],
        "image_name": "someone/unused",
        "problem_statement": "spread is wrong",
    }
    task = swesmith_task(row)
    script = task.eval_script.replace(f"{CONDA}\n", "")
    return dataclasses.replace(task, image=swe_image.SWE_IMAGE, eval_script=script)
