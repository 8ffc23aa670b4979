"""Runs, checkpoints, engines and a SLURM cluster for several tests. A fixture skips the test if it lacks something."""

import os
import subprocess
from dataclasses import replace

import pytest

from megatron_dagger.store.lock import exclusive


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """Training outputs by name: a tied model's from one process (two versions) and PP=2, an untied one's from TP=2."""
    from tests.integration.served import ONE, PP2, TIED, TP2, UNTIED, write

    root = tmp_path_factory.mktemp("megatron")
    return {
        "one": write(root / "one", TIED, ONE, 2),
        "pp2": write(root / "pp2", TIED, PP2, 1),
        "tp2": write(root / "tp2", UNTIED, TP2, 1),
    }


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """A folder with SmolLM2-135M-Instruct's real weights as hf/ and megatron/, and tokens.npy."""
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    from tests.integration.converted import make_smollm2

    return make_smollm2(tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory):
    """A folder of the test session, shared by all of pytest-xdist's processes."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "session"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def cache(session_folder):
    """The cache directory of the tiny runs, which holds their tasks."""
    return session_folder / "cache"


@pytest.fixture(scope="session")
def undisturbed(cache, session_folder):
    """The directory of a finished tiny run, made when a test first needs it. Tests must not change it."""
    from tests.integration.tiny_run import DEADLINE_S, command, environment

    run = session_folder / "undisturbed"
    with exclusive(session_folder / "undisturbed.lock", deadline_s=DEADLINE_S):
        if not (run / "report.html").exists():
            done = subprocess.run(
                command(run), env=environment(cache), capture_output=True, text=True, timeout=DEADLINE_S, check=False
            )
            assert done.returncode == 0, done.stderr[-3000:]
    return run


@pytest.fixture(scope="session")
def calc_task(docker_host):
    """The SWE-bench task of tools/support/swe_image.py, whose image is built."""
    from megatron_dagger.envs.swe.swebench import swebench_task
    from tools.support import swe_image

    return swebench_task(swe_image.row(swe_image.build(docker_host)))


@pytest.fixture(scope="session")
def open_sandbox(docker_host):
    """A function that opens a container of a task's image."""
    from megatron_dagger.sandbox.docker import DockerLimits, DockerSandbox

    limits = DockerLimits(timeout_s=30, memory_mib=500, disk_mib=200, processes=64, cpus=1.0, output_bytes=20_000)
    return lambda task: DockerSandbox(docker_host, task.image, limits, root=task.workdir)


@pytest.fixture(scope="session")
def cluster():
    """A SLURM of two virtual nodes, with accounting if it is installed."""
    from tools.virtual_slurm.cluster import SlurmCluster
    from tools.virtual_slurm.packages import why_unavailable

    if reason := why_unavailable():
        pytest.skip(reason)
    with SlurmCluster(accounting=why_unavailable(accounting=True) is None) as slurm:
        yield slurm


@pytest.fixture(scope="session")
def batch_environment(cache, tmp_path_factory):
    """Environment variables for jobs of the tiny run, with the command line of tools.virtual_slurm.runs."""
    from tests.integration.tiny_run import environment
    from tools.virtual_slurm.runs import job_variables

    return {**environment(cache), **job_variables(tmp_path_factory.mktemp("venv"))}


@pytest.fixture
def clean_cluster(cluster):
    """Cancel jobs and restart nodes after the test, even if it failed."""
    yield
    cluster.restore()


@pytest.fixture(scope="module")
def tied_student(written):
    from tests.integration.served import start

    student = start(written["one"])
    yield student
    student.close()


@pytest.fixture
def student(tied_student, written):
    """The tied model's engine, serving version 0 of its weights; settings that a test changes are reset."""
    from tests.integration.served import END

    tied_student.sync(written["one"].checkpoint(), 0, written["one"].digests())
    yield tied_student
    tied_student.config = replace(tied_student.config, request_deadline_s=600.0)
    tied_student.end_of_turn = END
