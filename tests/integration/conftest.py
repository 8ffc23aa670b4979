"""Runs, checkpoints and engines that several tests share. Tests that need vLLM or Megatron skip without them."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_dagger.store.lock import exclusive


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """By name: the tied model from one process (two versions) and from PP2, the untied one from TP2."""
    from tests.integration.served import ONE, PP2, TIED, TP2, UNTIED, write

    root = tmp_path_factory.mktemp("megatron")
    return {
        "one": write(root / "one", TIED, ONE, 2),
        "pp2": write(root / "pp2", TIED, PP2, 1),
        "tp2": write(root / "tp2", UNTIED, TP2, 1),
    }


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """SmolLM2-135M-Instruct's real weights: hf/, megatron/, tokens.npy."""
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    from tests.integration.converted import make_smollm2

    return make_smollm2(tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="session")
def all_tasks(tmp_path_factory):
    """A folder of this session, the same one in all processes that share its tests."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "all_tasks"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def cache(all_tasks):
    """Where the tiny runs keep their tasks."""
    return all_tasks / "cache"


@pytest.fixture(scope="session")
def undisturbed(cache, all_tasks):
    """The tiny run, from beginning to end in one process; whoever wants it first makes it, and it is not changed."""
    from tests.integration.tiny_run import DEADLINE_S, command, environment

    run = all_tasks / "undisturbed"
    with exclusive(all_tasks / "undisturbed.lock", deadline_s=DEADLINE_S):
        if not (run / "report.html").exists():
            done = subprocess.run(
                command(run), env=environment(cache), capture_output=True, text=True, timeout=DEADLINE_S, check=False
            )
            assert done.returncode == 0, done.stderr[-3000:]
    return run


@pytest.fixture(scope="session")
def cluster():
    """A SLURM of two virtual nodes, with accounting where that is installed."""
    from tools.virtual_slurm.cluster import SlurmCluster
    from tools.virtual_slurm.packages import lacking

    if why := lacking():
        pytest.skip(why)
    with SlurmCluster(accounting=lacking(accounting=True) is None) as started:
        yield started


@pytest.fixture(scope="session")
def batch_environment(cache, tmp_path_factory):
    """For jobs: an environment's folder with the command line, and addresses for two nodes that are one host."""
    from tests.integration.slurm_runs import ROOT
    from tests.integration.tiny_run import environment

    folder = tmp_path_factory.mktemp("venv")
    script = folder / "bin" / "megatron-dagger"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m megatron_dagger.cli.main "$@"\n')
    script.chmod(0o755)
    network = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    return {**environment(cache), "VENV": str(folder), "PYTHONPATH": str(ROOT), **network}


@pytest.fixture
def in_order(cluster):
    """What a test that failed has left must not hold up the next one."""
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
    """The tied model's engine, serving version 0 of its weights."""
    from tests.integration.served import END

    tied_student.sync(written["one"].checkpoint(), 0, written["one"].digests())
    yield tied_student
    tied_student.config = replace(tied_student.config, request_deadline_s=600.0)
    tied_student.end_of_turn = END
