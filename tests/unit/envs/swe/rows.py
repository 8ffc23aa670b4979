"""A row of every dataset, and a file of SWE-bench Verified rows, if the environment names one."""

import json
import os
from pathlib import Path

import pytest

ROWS_VARIABLE = "MEGATRON_DAGGER_TEST_ROWS"
VERIFIED = Path(os.environ.get(ROWS_VARIABLE, ""))  # gzipped JSON lines
needs_verified_rows = pytest.mark.skipif(
    ROWS_VARIABLE not in os.environ, reason=f"{ROWS_VARIABLE} is not set: it names a file of SWE-bench Verified rows"
)
PATCH = "diff --git a/pkg/a.py b/pkg/a.py\n--- a/pkg/a.py\n+++ b/pkg/a.py\n@@ -1 +1 @@\n-x = 1\n+x = 2\n"


TEST_PATCH = """\
diff --git a/tests/test_a.py b/tests/test_a.py
--- a/tests/test_a.py
+++ b/tests/test_a.py
@@ -1 +1 @@
-1
+2
diff --git a/tests/test_new.py b/tests/test_new.py
new file mode 100644
--- /dev/null
+++ b/tests/test_new.py
@@ -0,0 +1 @@
+3
diff --git a/tests/data.json b/tests/data.json
--- a/tests/data.json
+++ b/tests/data.json
@@ -1 +1 @@
-{}
+[]
"""


BENCH = {
    "instance_id": "Org__pkg-12",
    "repo": "Org/pkg",
    "base_commit": "c0ffee00" * 5,
    "problem_statement": "x is wrong",
    "patch": PATCH,
    "test_patch": TEST_PATCH,
    "version": "1.0",
    "FAIL_TO_PASS": '["tests/test_a.py::test_x"]',
    "PASS_TO_PASS": "[]",
    "image": "registry/image:1",
    "eval_script": "#!/bin/bash\npytest\n",
    "log_parser": "parse_log_pytest",
    "eval_type": "pass_and_fail",
}


GYM = {
    **{k: BENCH[k] for k in ("base_commit", "problem_statement", "patch", "test_patch", "version")},
    "instance_id": "getmoto__Moto-5",
    "repo": "getmoto/moto",
    "FAIL_TO_PASS": ["tests/test_a.py::test_x"],
    "PASS_TO_PASS": ["tests/test_a.py::test_y"],
}


SMITH = {
    "instance_id": "org__pkg.c0ffee00.func_basic__1",
    "repo": "swesmith/org__pkg.c0ffee00",
    "patch": PATCH,
    "FAIL_TO_PASS": ["tests/test_a.py::test_x"],
    "PASS_TO_PASS": ["tests/test_a.py::test_y", "tests/test_b.py::test_z"],
    "image_name": "swesmith.x86_64.Org__pkg.c0ffee00",
    "problem_statement": "x is wrong",
}


R2E = {
    "repo_name": "pkg",
    "docker_image": "someone/pkg_final:c0ffee",
    "commit_hash": "deadbeef" * 5,
    "problem_statement": "noise [ISSUE]\nx is wrong\n[/ISSUE] noise",
    "expected_output_json": json.dumps({"TestA.test_x": "PASSED", "TestA.test_y": "FAILED"}),
    "parsed_commit_content": json.dumps(
        {
            "file_diffs": [
                {"header": {"file": {"path": "pkg/a.py"}}, "old_file_content": "x = 1", "new_file_content": "x = 2"},
                {"header": {"file": {"path": "tests/test_a.py"}}, "old_file_content": "", "new_file_content": "1\n"},
            ]
        }
    ),
}


def without(row, *names):
    return {name: value for name, value in row.items() if name not in names}
