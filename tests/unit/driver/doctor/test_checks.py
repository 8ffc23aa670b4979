"""Single checks of the doctor: what each finds on a machine with a fault."""

import shutil
import time
from collections import namedtuple
from contextlib import ExitStack

import pytest

from megatron_dagger.config import ParallelConfig, RoadConfig, RunConfig, SweConfig, TeacherConfig, TrainingConfig
from megatron_dagger.driver.doctor import examine, gpus, machine, parts, ranks
from megatron_dagger.driver.doctor.examination import Examination, Status
from megatron_dagger.envs.swe.tool_calls import ToolCall
from megatron_dagger.gpus import visible_gpus
from tools.support.chat_server import chat_server

BF16 = TrainingConfig(precision="bf16", parallel=ParallelConfig(world_size=2))
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def examination(tmp_path):
    with ExitStack() as stack:
        yield lambda config=None: Examination(
            config=config or RunConfig(), run_dir=tmp_path / "run", work_dir=tmp_path, cache_dir=tmp_path, stack=stack
        )


def swe(url="http://127.0.0.1:9/v1", **settings):
    return RunConfig(
        swe=SweConfig(train="rows.jsonl", heldout_of_train=1),
        teacher=TeacherConfig(urls=(url,), model="m", **settings),
        init_checkpoint="checkpoint",
    )


def test_a_check_that_hangs_is_warned_of_one_that_raises_is_a_problem_and_the_next_one_is_run(examination):
    subject = examination()
    hung = examine(subject, "hanging", lambda _: time.sleep(5), deadline_s=0.1)
    assert (hung.status, hung.text, subject.hanging) == (Status.WARNING, "no answer within 0 s", True)

    def fails(_):
        raise OSError("the cable is loose")

    assert examine(subject, "failing", fails, deadline_s=5).text == "the cable is loose"
    assert examine(subject, "locks", machine.locks, deadline_s=5).status is Status.OK
    assert subject.problems == ["failing"]


def test_missing_packages_are_named(examination, monkeypatch):
    assert machine.packages(examination()).status is Status.OK
    monkeypatch.setattr(machine, "_is_installed", lambda module: module not in ("vllm", "megatron.core"))
    finding = machine.packages(examination())
    assert (finding.status, finding.text) == (Status.PROBLEM, "not installed: megatron-core, vllm")


def test_little_disk_or_shared_memory_is_a_problem(examination, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(1, 0, 1 << 20))
    for check in (machine.disk, machine.shared_memory):
        assert check(examination()).status is Status.PROBLEM


def test_few_processors_for_gpus_are_warned_of(examination, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    assert machine.processors(examination()).status is Status.OK
    finding = machine.processors(examination(RunConfig(training=BF16)))
    assert (finding.status, "--cpus-per-task=8" in finding.advice) == (Status.WARNING, True)


@pytest.mark.skipif(visible_gpus({}) is not None, reason="this host has GPUs")
def test_engines_built_for_the_cpu_on_a_node_with_gpus_are_a_problem(examination, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(gpus, "visible_gpus", lambda environ: 8)
    finding = gpus.gpus(examination(RunConfig(training=BF16)))
    expected = "cannot use the 8 GPUs" if torch.version.cuda else "is built for the CPU"
    assert (finding.status, expected in finding.text) == (Status.PROBLEM, True)
    assert "tools/setup --cuda" in finding.advice


def test_a_file_system_that_lets_everybody_have_a_lock_is_a_problem(examination, monkeypatch):
    monkeypatch.setattr("fcntl.flock", lambda *_: None)
    assert "two processes hold the same lock" in machine.locks(examination()).text


@pytest.mark.skipif(visible_gpus({}) is not None, reason="this host has GPUs")
def test_ranks_meet_and_add_up(examination):
    pytest.importorskip("megatron.core")
    subject = examination(RunConfig(training=TrainingConfig(parallel=ParallelConfig(world_size=2))))
    finding = ranks.ranks(subject)
    assert (finding.status, finding.text.startswith("2 on 1 nodes by gloo")) == (Status.OK, True)
    elsewhere = TrainingConfig(parallel=ParallelConfig(world_size=2, nodes=2))
    assert ranks.ranks(examination(RunConfig(training=elsewhere))).status is Status.SKIPPED


def test_a_missing_checkpoint_and_missing_rows_come_with_advice(examination):
    finding = parts.model(examination(swe()))
    assert (finding.status, "no such directory" in finding.text) == (Status.PROBLEM, True)
    assert "megatron-dagger recipes NAME" in finding.advice
    finding = parts.tasks(examination(swe()))
    assert (finding.status, finding.text) == (Status.PROBLEM, "rows.jsonl: no such file")


def test_an_environment_without_a_sandbox_is_opened(examination):
    subject = examination(RunConfig(road=RoadConfig(stops=3)))
    assert parts.tasks(subject).status is Status.OK
    assert parts.sandbox(subject).status is Status.OK
    assert subject.prompt is not None


@pytest.mark.parametrize(
    ("answer", "status", "text"),
    [
        (ToolCall(name="bash", arguments={"command": "ls"}).text(), Status.OK, "m in "),
        ("Let me think.", Status.PROBLEM, "gave no action in 4 answers"),
        (401, Status.PROBLEM, "refused the request with 401"),
    ],
)
def test_the_teacher_is_asked_for_a_tool_call(examination, answer, status, text):
    pytest.importorskip("httpx")
    with chat_server(lambda request: answer) as server:
        finding = parts.teacher(examination(swe(server.url)))
        assert (finding.status, text in finding.text) == (status, True)
        assert "str_replace_editor" in server.requests[0]["messages"][0]["content"]


def test_a_teacher_that_is_down_is_warned_of_as_a_run_waits_for_it(examination, monkeypatch):
    pytest.importorskip("httpx")
    monkeypatch.setattr(parts, "TEACHER_PATIENCE_S", 0.5)
    finding = parts.teacher(examination(swe()))
    assert finding.status is Status.WARNING
    assert "no teacher answered" in finding.text
    assert "teacher.patience_s" in finding.advice
