"""Long repairs with a real sandbox, real git and real tests: tasks, the shell, the teacher, the way back."""

import random
import re
import shlex
from dataclasses import replace

import pytest

from megatron_dagger.config import RepoRepairConfig
from megatron_dagger.envs.repo_repair.episode import tree_diff
from megatron_dagger.envs.repo_repair.long.bugs import bug_pool
from megatron_dagger.envs.repo_repair.long.env import LongRepairEnv
from megatron_dagger.envs.repo_repair.long.expert import (
    DIFF,
    DISCARD,
    READ,
    READ_MORE,
    RESTART,
    TAKE,
    TEST,
    next_command,
    take_back,
)
from megatron_dagger.envs.repo_repair.long.rules import NUMBERS, PIECES, pieces, rules_of
from megatron_dagger.envs.repo_repair.long.tasks import TERSE_COMMENT, compose, repairs
from megatron_dagger.envs.repo_repair.repository import read_repository
from megatron_dagger.envs.repo_repair.testing import TestBench
from megatron_dagger.types import Message
from tests.unit.envs.repo_repair.conftest import TREE
from tools.support.slips import slip

BUGS = 2
CONFIG = RepoRepairConfig(bugs=BUGS)
TURNS_PER_BUG = 5


@pytest.fixture(scope="module")
def bugs(pool, tmp_path_factory):
    return bug_pool(TREE, pool, tmp_path_factory.mktemp("bugs") / "small.json")


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    return tmp_path_factory.mktemp("repositories")


@pytest.fixture(scope="module")
def tasks(bugs, pool, repositories):
    return list(compose(TREE, bugs, CONFIG, 4, 1, pool, repositories))


@pytest.fixture
def env(tasks, pool, repositories):
    with LongRepairEnv(tasks[0], read_repository(repositories / tasks[0].instance_id), pool) as opened:
        opened.reset()
        yield opened


def address(comment):
    """Return a comment's path, line, wrong token and right token."""
    line, wrong, right, path = re.fullmatch(r"'(\d+)s/(.+)/(.+)/' (\S+)\s*", comment).groups()
    return path, int(line), wrong, right


def play(env, commands=(), *, turns=80):
    """Run ``commands``, then let the teacher finish; return its commands and whether the task is solved."""
    system, problem = env.reset()
    messages = [Message(role="system", content=system), Message(role="user", content=problem)]
    said = []
    for turn in range(turns):
        command = commands[turn] if turn < len(commands) else next_command(tuple(messages))
        if callable(command):
            command = command(next_command(tuple(messages)))
        observation = env.step(command)
        said.append((command, observation.text))
        messages += [Message(role="assistant", content=command), Message(role="user", content=observation.text)]
        if observation.done:
            break
    return said[len(commands) :], env.judge()


def test_tests_of_a_bug_pass_once_it_and_those_before_it_are_repaired(tasks, pool, repositories):
    assert len({task.patch for task in tasks}) == len(tasks) >= 2
    for task in tasks:
        files = read_repository(repositories / task.instance_id)
        with pool.lend() as sandbox:
            bench = TestBench(sandbox, {k: v for k, v in files.items() if not k.startswith(".git/")})
            comments, named = (files[f"todo/{name}"].decode().splitlines() for name in ("list", "tests"))
            for said, line_of_tests in zip(comments, named, strict=True):
                path, line, wrong, right = address(said)
                tests = shlex.split(line_of_tests)
                settings = replace(task, FAIL_TO_PASS=str(tests).replace("'", '"'), PASS_TO_PASS="[]").tool_settings()
                assert set(bench.run(settings).outcomes.values()) == {"failed"}
                lines = files[path].decode().splitlines(keepends=True)
                lines[line - 1] = lines[line - 1].replace(wrong, right, 1)
                files[path] = "".join(lines).encode()
                bench.write({path: files[path]})
                assert bench.run(settings).passed(tests)
            assert bench.run(task.tool_settings()).passed(task.tests)


def test_repairs_are_the_states_that_the_teacher_leaves(env, tasks, repositories):
    files = read_repository(repositories / tasks[0].instance_id)
    states = list(repairs(files))
    assert len(states) == BUGS
    said, _ = play(env)
    assert sum(command.startswith("sed") and command != TAKE for command, _ in said) == BUGS
    final = {name: content for state in states for name, content in state.items()}
    assert tree_diff(files, {**files, **final}) == env.patch() == tasks[0].patch


def test_bugs_are_found_once_and_read_again(bugs, pool, tmp_path):
    again = bug_pool(TREE, pool, tmp_path / "small.json")
    assert again == bugs
    assert bug_pool(TREE, None, tmp_path / "small.json") == bugs
    assert len({(bug.path, bug.line) for bug in bugs.bugs}) == len(bugs.bugs) >= BUGS


def test_same_seed_same_tasks(bugs, pool, tasks, tmp_path):
    assert list(compose(TREE, bugs, CONFIG, 4, 1, pool, tmp_path / "again")) == tasks
    assert list(compose(TREE, bugs, CONFIG, 4, 2, pool, tmp_path / "other")) != tasks


def test_the_teacher_repairs_every_task_without_a_detour(tasks, pool, repositories):
    for task in tasks:
        with LongRepairEnv(task, read_repository(repositories / task.instance_id), pool) as env:
            said, solved = play(env)
            assert solved
            assert len(said) == TURNS_PER_BUG * BUGS + 3
            assert not {command for command, _ in said} & {DISCARD, RESTART}


def test_a_replayed_episode_prints_the_same(env):
    commands = [
        "git log --oneline | cat",
        "cd todo",
        "cat tests",
        "git commit -q --allow-empty -m x",
        "git log | head -1",
    ]
    first, _ = play(env, [], turns=1)
    runs = [[env.step(command).text for command in commands if env.reset() or True] for _ in range(2)]
    assert runs[0] == runs[1]
    assert play(env, [], turns=1)[0] == first


def test_the_working_directory_lasts(env):
    assert env.step("pwd").text == env.step("cd todo; cd ..; pwd").text
    env.step("cd todo")
    assert env.step("ls").text.split() == ["list", "more", "tests"]
    assert env.step("cd nowhere").text
    assert "list" in env.step("ls").text
    assert env.step("exit 3").text == ""
    assert "list" in env.step("ls").text
    assert env.step("if").text  # a syntax error
    assert "list" in env.step("ls").text
    env.step("cd /tmp")
    assert env.step("pwd").text == "/tmp"
    env.step("cd")
    assert "todo" in env.step("ls").text


def test_pytest_counts_as_pytest_does(env):
    assert env.step(TEST).text.endswith("failed")
    assert "passed" in env.step("pytest @all.tests").text
    assert env.step("pytest @todo/seven.tests").text == "ERROR: No such file or directory: todo/seven.tests"
    assert env.step("pytest nothing.py").text == "ERROR: file or directory not found: nothing.py"
    assert env.step("pytest").text == "no tests ran"
    path, *_ = address(env.step(READ).text)
    env.step(f"echo '(' >> {path}")
    assert env.step(TEST).text.endswith("error")
    assert env.step(f"{TEST} | cat").text.endswith("error")  # in a pipe it is the same program
    env.step("cd todo")
    assert env.step("pytest @../all.tests").text.startswith("ERROR: file or directory not found: tests/")


def test_changed_tests_do_not_solve_a_task(env):
    env.step("sed -i 's/assert/pass or/' tests/*.py")
    assert not env.judge()


WAYS_BACK = {
    "a wrong line edited": lambda path, line: [f"sed -i '{line + 1}s/^/0/' {path}"],
    "a file that no longer compiles": lambda path, line: [f"sed -i 's/def /de /' {path}"],
    "a file removed": lambda path, line: [f"rm {path}"],
    "a changed test": lambda path, line: ["sed -i 's/==/!=/' tests/test_small.py"],
    "another directory": lambda path, line: ["cd todo"],
    "out of the work tree": lambda path, line: ["cd /tmp"],
    "an edit in another directory": lambda path, line: ["cd tests", "sed -i '5s/a/b/' test_small.py"],
    "a new file in the way": lambda path, line: ["echo 'raise ValueError' > pytest.py", "echo '(' > conftest.py"],
    "a wrong commit": lambda path, line: [f"sed -i 's/return/pass; return/' {path}", "git commit -qam fix"],
    "an empty commit": lambda path, line: ["git commit -qam fix"],
    "a repair taken back that was right": lambda path, line: [*[str] * TURNS_PER_BUG, "git reset -q --hard start"],
    "a right commit undone": lambda path, line: [*[str] * TURNS_PER_BUG, "git reset -q --hard HEAD~1"],
    "a right edit discarded": lambda path, line: [str, str, "git checkout :/"],
    "a right edit stashed": lambda path, line: [str, str, "git stash -q"],
    "a right edit committed without a test": lambda path, line: [*[str] * 3, "git commit -qam fix"],
    "an edit twice": lambda path, line: [str, str, f"sed -i '{line}s/^/ /' {path}"],
    "another comment": lambda path, line: ["sed -n 2p todo/list"],
    "the tests before the repair": lambda path, line: [TEST],
    "all tests at once": lambda path, line: ["pytest @all.tests"],
    "a comment taken off the list": lambda path, line: ["sed -i 1d todo/list"],
    "a comment passed over": lambda path, line: [TAKE],
    "two comments passed over": lambda path, line: [READ, TAKE, TAKE],
    "all comments passed over": lambda path, line: [TAKE] * BUGS + [READ],
    "a repair passed over when it was tested": lambda path, line: [*[str] * (TURNS_PER_BUG - 1), TAKE, TAKE],
    "a repair taken off without a test": lambda path, line: [*[str] * 3, TAKE],
    "no command": lambda path, line: ["fix it", "'"],
}


@pytest.mark.parametrize("name", WAYS_BACK)
def test_the_teacher_knows_the_way_back(env, name):
    path, line, *_ = address(env.step(READ).text)
    said, solved = play(env, WAYS_BACK[name](path, line))
    assert solved, said


def test_the_teacher_does_not_repeat_a_verified_repair(env):
    said, solved = play(env, [*[str] * TURNS_PER_BUG, "cd todo", "cat tests", "cd .."])
    assert solved
    assert [command for command, _ in said].count(TAKE) == BUGS - 1


@pytest.mark.parametrize("commits", [1, 2])
def test_commits_that_break_the_tests_are_taken_back(env, commits):
    path, *_ = address(env.step(READ).text)
    wrong = [f"echo 'raise ValueError' >> {path}", "git commit -qam fix"]
    said, solved = play(env, [READ, *wrong * commits])
    assert solved
    commands = [command for command, _ in said]
    assert commands[1:3] == [take_back(commits), READ]
    assert RESTART not in commands


def test_a_diff_that_is_not_the_repair_is_discarded(env):
    path, *_ = address(env.step(READ).text)
    said, _ = play(env, [str, f"sed -i '1s/^/#/' {path}"])
    assert [command for command, _ in said[:2]] == [DIFF, DISCARD]


@pytest.fixture
def terse_env(bugs, pool, tmp_path):
    config = replace(CONFIG, terse=1.0)
    for task in compose(TREE, bugs, config, 4, 1, pool, tmp_path):
        files = read_repository(tmp_path / task.instance_id)
        if TERSE_COMMENT.fullmatch(files["todo/list"].decode().splitlines()[0]):
            with LongRepairEnv(task, files, pool) as opened:
                opened.reset()
                yield opened
            return
    pytest.fail("no operator to be repaired")


def test_the_teacher_knows_the_rules_by_heart(terse_env):
    said, solved = play(terse_env)
    assert solved
    assert len(said) == TURNS_PER_BUG * BUGS + 3
    assert not any(command == READ_MORE for command, _ in said)


@pytest.mark.parametrize("later", [(), (DIFF,), (DIFF, "cd", TEST), ("cd", READ)])
@pytest.mark.parametrize("token", ["nothing", "e"])
def test_after_a_wrong_guess_the_teacher_reads_on(terse_env, token, later):
    path, line, *_ = address(terse_env.step(READ_MORE).text)
    guess = f"sed -i '{line}s/{token}/e /' {path}"
    said, solved = play(terse_env, [str, guess, *later])
    assert solved
    assert [command for command, _ in said].count(READ_MORE) == 1


def test_rules_are_numbers_of_pairs_of_operators():
    assert len({pieces(number) for number in NUMBERS}) == len(PIECES) == 12
    for wrong, right in PIECES:
        assert all(pieces(number) == (wrong, right) for number in rules_of(wrong, right))
    assert rules_of("1", "2") == ()


@pytest.mark.parametrize("seed", range(12))
def test_the_teacher_finishes_after_random_turns(env, tasks, seed):
    chance = random.Random(seed)
    paths = [*tasks[0].source_files, "tests/test_small.py"]
    ahead = chance.randrange(TURNS_PER_BUG * BUGS)
    _, solved = play(env, [str] * ahead + [lambda right: slip(right, paths, chance)] * 6, turns=140)
    assert solved
