"""Test runs in a pytest session that the sandbox's server has started: the same outcomes as pytest's own."""

import pytest

from megatron_dagger.envs.repo_repair.testing import TestBench, repair_sandbox

CASES = b"""
import os, unittest, warnings
import pytest

@pytest.fixture(scope="module", params=["a", "b"])
def letter(request):
    yield request.param

@pytest.fixture
def broken_at_the_end():
    yield
    raise ValueError

@pytest.mark.parametrize("number", [1, 2, 3])
def test_numbers(number, letter):
    assert number != 2

def test_letters(letter):
    assert letter == "a"

def test_skipped():
    pytest.skip("on purpose")

def test_teardown(broken_at_the_end):
    pass

def test_output(capfd):
    os.write(1, b"direct")
    print("printed")
    assert capfd.readouterr().out == "directprinted\\n"

def test_captured():
    os.system("echo to the captured output")
    warnings.warn("a warning")

def test_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert list(tmp_path.iterdir()) == []

def test_version():
    assert os.environ["PYTEST_VERSION"] == pytest.__version__

class TestClass:
    def test_inside(self):
        assert False

    def test_inside_too(self):
        os.chdir("/")

class Case(unittest.TestCase):
    def setUp(self):
        self.value = 1

    def test_value(self):
        self.assertEqual(self.value, 1)

    @unittest.expectedFailure
    def test_expected(self):
        self.assertEqual(self.value, 2)
"""
WANTED = ["test_numbers[a-2]", "test_numbers[b-1]", "test_skipped", "TestClass::test_inside", "Case::test_value"]


@pytest.fixture(scope="module")
def sandbox():
    with repair_sandbox() as opened:
        yield opened


def run(sandbox, tests, *pytest_args, conftest=b""):
    sandbox.reset()
    bench = TestBench(sandbox, {"cases.py": CASES, **({"conftest.py": conftest} if conftest else {})})
    settings = {"tests": tests, "test_files": ["cases.py"], "source": [], "paths": ["."], "suspects": 9}
    return bench.run(settings | {"pytest_args": list(pytest_args)})


def every(sandbox):
    return run(sandbox, None, "-q").outcomes  # with an argument of its own a run starts pytest itself


def test_outcomes_are_those_of_pytest(sandbox):
    outcomes = every(sandbox)
    assert len(outcomes) == 18
    assert set(outcomes.values()) == {"passed", "failed", "skipped"}
    assert run(sandbox, None).outcomes == outcomes


def test_only_wanted_tests_have_an_outcome(sandbox):
    wanted = [f"cases.py::{name}" for name in WANTED]
    outcomes = every(sandbox)
    assert run(sandbox, wanted).outcomes == {test: outcomes[test] for test in wanted}
    assert run(sandbox, ["cases.py::test_number"]).outcomes == {}


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (("--deselect=cases.py::TestClass",), 16),
        (("-k", "letters or numbers and not 2"), 6),
        (("-k", "Class", "--deselect", "cases.py::TestClass::test_inside_too"), 1),
    ],
)
def test_options_that_choose_tests_are_those_of_pytest(sandbox, options, count):
    outcomes = run(sandbox, None, *options).outcomes
    assert len(outcomes) == count
    assert outcomes == run(sandbox, None, "-q", *options).outcomes


def test_a_conftest_with_early_hooks_is_respected(sandbox):
    conftest = b"def pytest_addoption(parser):\n    parser.addoption('--mine')\n\n"
    conftest += (
        b"def pytest_collection_modifyitems(config, items):\n    assert config.option.mine is None\n    del items[1:]\n"
    )
    assert len(run(sandbox, None, conftest=conftest).outcomes) == 1


def test_a_conftest_at_the_root_is_respected(sandbox):
    conftest = b"def pytest_collection_modifyitems(items):\n    del items[1:]\n"
    assert len(run(sandbox, None, conftest=conftest).outcomes) == 1


@pytest.mark.parametrize("code", [b"import os\nos._exit(0)\n", b"x = (\n", b"import pytest\npytest.exit('now')\n"])
def test_a_run_that_ends_early_has_no_outcomes(sandbox, code):
    sandbox.reset()
    settings = {"tests": ["cases.py::test_one"], "test_files": ["cases.py"], "source": [], "paths": ["."]}
    result = TestBench(sandbox, {"cases.py": code}).run(settings | {"pytest_args": [], "suspects": 9})
    assert result.outcomes == {}
