"""Modules compiled ahead of test runs: they are used, never stale, and out of an agent's reach."""

import importlib.util
import marshal

import pytest

from megatron_dagger.envs.repo_repair.compiled import compile_modules
from megatron_dagger.envs.repo_repair.testing import TestBench, repair_sandbox
from megatron_dagger.envs.repo_repair.tools.code_cache import entry, pack
from megatron_dagger.sandbox.local import bubblewrap_works
from megatron_dagger.sandbox.local.bubblewrap import work_dir

TEST = "tests/test_two.py::test_two"
SETTINGS = {
    "tests": [TEST],
    "test_files": ["tests/test_two.py"],
    "source": ["two.py"],
    "paths": ["."],
    "pytest_args": [],
    "suspects": 9,
}
RIGHT, WRONG = b"def two():\n    return 1 + 1\n", b"def two():\n    return 1 - 1\n"
TREE = {
    "two.py": RIGHT,
    "tests/conftest.py": b"import pytest\n\n@pytest.fixture\ndef expected():\n    return 2\n",
    "tests/test_two.py": b"from two import two\n\ndef test_two(expected):\n    assert two() == expected\n",
    "tests/broken.py": b"def (",
}


@pytest.fixture
def folder(tmp_path):
    if not bubblewrap_works():
        pytest.skip("only the isolating sandbox has compiled modules")
    tmp_path.chmod(0o755)
    return tmp_path


@pytest.fixture
def sandbox(folder):
    with repair_sandbox(folder) as opened:
        yield opened


def outcome(bench):
    return bench.run(SETTINGS).outcomes[TEST]


def test_compiled_modules_are_used(sandbox, folder):
    path = f"{work_dir()}/two.py"
    content = pack(compile(RIGHT, path, "exec"))
    (folder / entry(path, WRONG)).write_bytes(content)
    bench = TestBench(sandbox, TREE | {"two.py": WRONG})
    assert outcome(bench) == "passed"
    for damaged in (b"", content[:-1], bytes(len(content))):
        (folder / entry(path, WRONG)).write_bytes(damaged)
        assert outcome(bench) == "failed"  # it is compiled


def test_a_changed_module_is_compiled_anew(sandbox, folder):
    compile_modules(TREE, folder)
    compile_modules(TREE, folder)
    assert len(list(folder.iterdir())) == len(TREE) - 1  # one does not compile
    bench = TestBench(sandbox, TREE)
    assert outcome(bench) == "passed"
    sandbox.run("touch -r two.py stamp; sed -i s/+/-/ two.py; touch -r stamp two.py")  # same size, same time
    assert outcome(bench) == "failed"
    bench.write({"two.py": RIGHT})
    assert outcome(bench) == "passed"
    bench.write({"tests/conftest.py": TREE["tests/conftest.py"].replace(b"2", b"3")})
    assert outcome(bench) == "failed"


def test_the_next_episode_has_its_own_modules(sandbox, folder):
    compile_modules(TREE, folder)
    assert outcome(TestBench(sandbox, TREE)) == "passed"
    sandbox.reset()
    changed = TREE | {"two.py": WRONG}
    compile_modules(changed, folder)
    assert outcome(TestBench(sandbox, changed)) == "failed"


def test_commands_cannot_change_compiled_modules(sandbox, folder):
    compile_modules(TREE, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for command in (
        "rm -f /sandbox/shared/*",
        "echo x > /sandbox/shared/x",
        "for f in /sandbox/shared/*; do echo > $f; done",
    ):
        assert sandbox.run(command).exit_code != 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_bytecode_in_the_work_tree_is_not_read(sandbox):
    """An agent could forge it: bytecode need not say which source it was compiled from."""
    bench = TestBench(sandbox, TREE | {"two.py": WRONG})
    unchecked = importlib.util.MAGIC_NUMBER + (0b01).to_bytes(4, "little") + bytes(8)
    forged = unchecked + marshal.dumps(compile(RIGHT, "two.py", "exec"))
    bench.write({importlib.util.cache_from_source("two.py"): forged})
    assert outcome(bench) == "failed"
