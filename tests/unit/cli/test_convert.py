"""Interrupted conversions: the same command resumes them, a different one starts from scratch."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

from megatron_dagger.cli.main import main
from megatron_dagger.store.lock import exclusive
from megatron_dagger.weights import families
from megatron_dagger.weights.checkpoints import open_checkpoint
from megatron_dagger.weights.hf_files import HfCheckpoint, write_hf
from megatron_dagger.weights.torch_dist.reader import MegatronCheckpoint
from megatron_dagger.weights.verify.digest import canonical_digests
from tests.unit.weights.sample_models import sample_model

MODEL = sample_model("qwen3", tie_embeddings=False)
SOURCES = {"hf-to-megatron": "hf", "reshard": "megatron", "megatron-to-hf": "megatron"}
SMALL = ("--shard-mib", "0")  # a file for each tensor


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """a/ and b/: two models' weights, each as hf/ and as megatron/; all files of one size."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        tensors = {key: torch.randn(shape) for key, shape in families.canonical_names(MODEL).items()}
        (root / name / "hf").mkdir(parents=True)
        write_hf(root / name / "hf", MODEL, tensors.__getitem__, "float32")
        assert run("hf-to-megatron", root / name / "hf", root / name / "megatron") == 0
    return root


def run(*arguments: object) -> int:
    return main(["convert", *map(str, arguments)])


def interrupted(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> dict[Path, int]:
    """Run the command until the disk fails at the eleventh tensor; return the finished files and their mtimes."""
    successes = iter(range(10))

    def failing(read: Callable) -> Callable:
        def reading(self, *args):
            if next(successes, None) is None:
                raise OSError("the disk is gone")
            return read(self, *args)

        return reading

    with monkeypatch.context() as patch:
        for kind in (HfCheckpoint, MegatronCheckpoint):
            patch.setattr(kind, "read", failing(kind.read))
        assert run(*arguments) == 2
    partial = Path(arguments[2]).parent / f".{Path(arguments[2]).name}.partial"
    written = {
        path: path.stat().st_mtime_ns for path in partial.glob("*") if path.suffix in (".safetensors", ".distcp")
    }
    assert 5 < len(written) <= 10
    (partial / ".tmp-left-behind").write_text("half of a file")
    return written


def digests(directory: Path) -> dict[str, str]:
    return canonical_digests(open_checkpoint(directory).canonical_tensors(), MODEL)


@pytest.mark.parametrize("command", SOURCES)
def test_the_repeated_command_resumes(models, tmp_path, monkeypatch, command):
    source, target = models / "a" / SOURCES[command], tmp_path / "out"
    written = interrupted(monkeypatch, command, source, target, *SMALL)
    assert run(command, source, target, *SMALL) == 0
    for path, mtime in written.items():
        assert (target / path.name).stat().st_mtime_ns == mtime, "finished files are not written again"
    assert digests(target) == digests(source)
    assert run(command, source, tmp_path / "at-once", *SMALL) == 0
    assert {path.name for path in target.iterdir()} == {path.name for path in (tmp_path / "at-once").iterdir()}


@pytest.mark.parametrize("command", SOURCES)
def test_tensors_of_another_source_are_not_mixed_in(models, tmp_path, monkeypatch, caplog, command):
    target = tmp_path / "out"
    interrupted(monkeypatch, command, models / "a" / SOURCES[command], target, *SMALL)
    assert run(command, models / "b" / SOURCES[command], target, *SMALL) == 0
    assert digests(target) == digests(models / "b" / "hf")
    reason = "started with another source or other settings; it is removed, and writing starts from scratch"
    assert reason in caplog.text


def test_tensors_of_a_source_that_changed_are_not_mixed_in(models, tmp_path, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "out"
    shutil.copytree(models / "a" / "hf", source)
    interrupted(monkeypatch, "hf-to-megatron", source, target, *SMALL)
    shutil.copyfile(models / "b" / "hf" / "model.safetensors", source / "model.safetensors")
    os.utime(source / "model.safetensors", ns=(0, 1))
    assert run("hf-to-megatron", source, target, *SMALL) == 0
    assert digests(target) == digests(models / "b" / "hf")


@pytest.mark.parametrize("command", SOURCES)
@pytest.mark.parametrize("setting", [("--dtype", "bfloat16"), ("--shard-mib", "1")])
def test_tensors_written_with_other_settings_are_not_mixed_in(models, tmp_path, monkeypatch, command, setting):
    source, new_settings = models / "a" / SOURCES[command], [*SMALL, *setting]
    interrupted(monkeypatch, command, source, tmp_path / "out", *SMALL)
    for target in ("out", "at-once"):
        assert run(command, source, tmp_path / target, *new_settings) == 0
    out, at_once = ({path.name: path for path in (tmp_path / name).iterdir()} for name in ("out", "at-once"))
    assert out.keys() == at_once.keys(), "no stale files"
    assert digests(tmp_path / "out") == digests(tmp_path / "at-once")


def test_two_commands_do_not_write_to_the_same_target(models, tmp_path, capsys):
    source, target = models / "a" / "hf", tmp_path / "out"
    with exclusive(tmp_path / ".out.lock"):
        assert run("hf-to-megatron", source, target) == 2
    assert f"the holder is process {os.getpid()}" in capsys.readouterr().err
    assert run("hf-to-megatron", source, target) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_resharding_says_that_it_drops_the_optimizer_state(models, tmp_path, capsys):
    source = models / "a" / "megatron"
    assert run("reshard", source, tmp_path / "weights") == 0
    assert "optimizer" not in capsys.readouterr().out
    shapes = FileSystemReader(source).read_metadata().state_dict_metadata
    state = {name: torch.empty(entry.size) for name, entry in shapes.items()}
    dcp.load(state, checkpoint_id=str(source), no_dist=True)
    trained = {**state, "optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.zeros(8)}
    dcp.save(trained, checkpoint_id=str(tmp_path / "trained"), no_dist=True)
    shutil.copyfile(source / "complete.json", tmp_path / "trained" / "complete.json")
    assert run("reshard", tmp_path / "trained", tmp_path / "out") == 0
    assert "the optimizer's state was left out" in capsys.readouterr().out
    assert digests(tmp_path / "out") == digests(source)
