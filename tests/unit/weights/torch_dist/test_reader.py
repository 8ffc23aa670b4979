"""Reading torch_dist checkpoints: full tensors are returned, damaged and malicious files are refused.

The files are written by torch.distributed.checkpoint itself, with layers stacked as Megatron does. Checkpoints written
by Megatron are read in tests/integration/test_bridge_vllm.py.
"""

import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_dagger.config import ModelConfig, ParallelConfig
from megatron_dagger.weights import families
from megatron_dagger.weights.blocks import Box
from megatron_dagger.weights.errors import CheckpointReadError
from megatron_dagger.weights.layouts import SourceLayout
from megatron_dagger.weights.torch_dist.metadata import read_metadata
from megatron_dagger.weights.torch_dist.reader import MegatronCheckpoint
from megatron_dagger.weights.torch_dist.writer import write_megatron

MODEL = ModelConfig(num_layers=3, hidden_size=8, ffn_hidden_size=6, kv_channels=4, vocab_size=10)


def weights(model: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {name: torch.randn(shape).to(dtype) for name, shape in families.canonical_names(model).items()}


def write(
    directory: Path, model: ModelConfig, dtype: torch.dtype = torch.float32, *, prefix: str = "", optimizer: str = ""
) -> dict[str, torch.Tensor]:
    """Write a checkpoint of random weights with stacked layers and an optimizer's tensor; returns the weights."""
    tensors = weights(model, dtype)
    stacked: dict[str, list[torch.Tensor]] = {}
    for name, entry in families.lookup(model).megatron_tensors(model).items():
        rows = 16 if entry.padded else None
        head, _, rest = name.rpartition(".layers.")
        key = f"{head}.layers.{rest.partition('.')[2]}" if head else name
        full = families.from_canonical(name, tensors, model, padded_rows=rows)
        stacked.setdefault(key, []).append(full)
    state = {key: torch.stack(parts) if ".layers." in key else parts[0] for key, parts in stacked.items()}
    state = {f"{prefix}{key}": tensor for key, tensor in state.items()}
    state[f"{optimizer}optimizer.state.exp_avg.decoder.final_layernorm.weight"] = torch.zeros(8)
    dcp.save(state, checkpoint_id=str(directory), no_dist=True)
    return tensors


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint") / "it"
    return directory, write(directory, MODEL)


@pytest.fixture
def copy(written, tmp_path):
    directory = tmp_path / "copy"
    shutil.copytree(written[0], directory)
    return directory


def data_file(directory: Path) -> Path:
    return next(directory.glob("*.distcp"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_canonical_tensors_are_bit_exact_and_in_order(tmp_path, dtype, tied):
    model = ModelConfig(num_layers=2, hidden_size=8, ffn_hidden_size=6, vocab_size=10, tie_embeddings=tied)
    tensors = write(tmp_path, model, dtype)
    read = list(MegatronCheckpoint(tmp_path).canonical_tensors(model))
    assert [name for name, _ in read] == list(tensors)
    for name, tensor in read:
        assert tensor.is_contiguous()
        assert torch.equal(tensor, tensors[name]), name
        assert tensor.dtype == dtype


@pytest.mark.parametrize("prefix, optimizer", [("module.", ""), ("", "chained_0."), ("model.", "chained_1.")])
def test_names_with_the_prefixes_of_other_programs_are_read(tmp_path, prefix, optimizer):
    tensors = write(tmp_path, MODEL, prefix=prefix, optimizer=optimizer)
    checkpoint = MegatronCheckpoint(tmp_path)
    assert checkpoint.has_optimizer
    read = dict(checkpoint.canonical_tensors(MODEL))
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_parts_yields_views_of_the_files_chunk_by_chunk(tmp_path):
    model = ModelConfig(num_layers=2, hidden_size=8, ffn_hidden_size=6, vocab_size=10)
    ranks = SourceLayout.of_trainer(model, ParallelConfig(world_size=2, tensor_model_parallel_size=2))
    tensors = weights(model)
    rows = ranks.padded_vocab_size
    full = {
        name: families.from_canonical(name, tensors, model, padded_rows=rows if entry.padded else None)
        for name, entry in families.lookup(model).megatron_tensors(model).items()
    }
    write_megatron(tmp_path, model, full.__getitem__, ranks, "float32")
    checkpoint = MegatronCheckpoint(tmp_path)
    counts = {}
    for source in checkpoint.sources(model):
        box = Box((0,) * len(source.shape), source.shape)
        assembled = torch.full(source.shape, torch.nan)
        for part, values in checkpoint.parts(source, box):
            assembled[part.slices] = values
            values.fill_(7.0)  # changes this process's memory map only
            counts[source.name] = counts.get(source.name, 0) + 1
        assert torch.equal(assembled, full[source.name]), source.name
        assert (checkpoint.read(source) == 7.0).all(), f"{source.name}: the parts were copies"
    assert counts["decoder.layers.1.mlp.linear_fc2.weight"] == 2
    assert counts["decoder.layers.1.mlp.linear_fc1.weight"] == 4  # gate and up of each rank
    assert counts["decoder.final_layernorm.weight"] == 1


def test_the_index_agrees_with_torchs_own_reader(written):
    directory, _ = written
    reference = dcp.FileSystemReader(str(directory)).read_metadata().state_dict_metadata
    tensors = read_metadata(directory)
    assert set(tensors) == set(reference)
    for name, stored in tensors.items():
        assert stored.shape == tuple(reference[name].size)
        assert getattr(torch, stored.dtype) == reference[name].properties.dtype


def test_chunks_that_leave_a_gap_are_refused(copy):
    checkpoint = MegatronCheckpoint(copy)
    source = next(source for source in checkpoint.sources(MODEL) if source.lead == ())
    (chunk,) = source.stored.chunks
    part = replace(chunk, sizes=(chunk.sizes[0] - 1, *chunk.sizes[1:]))
    gap = replace(source, stored=replace(source.stored, chunks=(part,)))
    checkpoint = MegatronCheckpoint(copy)
    checkpoint._views[gap.stored.name, part] = torch.zeros(part.sizes)
    with pytest.raises(CheckpointReadError, match="do not cover"):
        checkpoint.read(gap)


class Bomb:
    """Creates a file when it is unpickled by pickle.load."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_code_in_the_index_is_refused_by_name_and_not_run(copy, tmp_path):
    victim = tmp_path / "executed"
    (copy / ".metadata").write_bytes(pickle.dumps(Bomb(victim)))
    with pytest.raises(CheckpointReadError, match=r"refused: .*(getattr|touch)"):
        MegatronCheckpoint(copy)
    assert not victim.exists()
    for code in (
        b"cos\nsystem\n(S'touch " + str(victim).encode() + b"'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
    ):
        (copy / ".metadata").write_bytes(code)
        with pytest.raises(CheckpointReadError, match=r"refused: .*(os\.system|builtins\.eval)"):
            MegatronCheckpoint(copy)
    assert not victim.exists()


def test_code_in_a_chunk_is_refused_and_not_run(copy, tmp_path):
    victim = tmp_path / "executed"
    for stored in read_metadata(copy).values():
        for chunk in stored.chunks:
            bomb = pickle.dumps(Bomb(victim))
            with open(copy / chunk.file, "r+b") as file:
                file.seek(chunk.start)
                file.write(bomb.ljust(chunk.length, b"\0")[: chunk.length])
    with pytest.raises(CheckpointReadError, match=r"distcp.* is damaged"):
        list(MegatronCheckpoint(copy).canonical_tensors(MODEL))
    assert not victim.exists()


def test_a_chunk_outside_the_checkpoint_is_refused(copy):
    text, name = (copy / ".metadata").read_bytes(), data_file(copy).name
    (copy / ".metadata").write_bytes(text.replace(name.encode(), b"../" + name.encode()[3:]))
    with pytest.raises(CheckpointReadError, match="outside the checkpoint"):
        MegatronCheckpoint(copy)


def test_a_missing_checkpoint_file_or_index_is_named(copy, tmp_path):
    with pytest.raises(CheckpointReadError, match="nowhere is not a complete Megatron checkpoint"):
        MegatronCheckpoint(tmp_path / "nowhere")
    file = data_file(copy)
    file.rename(copy / "elsewhere")
    with pytest.raises(CheckpointReadError, match=f"{file.name} is missing"):
        MegatronCheckpoint(copy).sources(MODEL)


def test_a_truncated_file_is_named_before_anything_is_read(copy):
    file = data_file(copy)
    with open(file, "r+b") as opened:
        opened.truncate(file.stat().st_size - 100)
    with pytest.raises(CheckpointReadError, match=f"{file.name} is truncated"):
        MegatronCheckpoint(copy).sources(MODEL)


@pytest.mark.parametrize("keep", [0, 1, 100, 1000])
def test_a_truncated_index_is_an_error_that_names_it(copy, keep):
    path = copy / ".metadata"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointReadError, match=r"\.metadata is damaged"):
        MegatronCheckpoint(copy)


def test_another_models_checkpoint_is_refused(written):
    directory, _ = written
    checkpoint = MegatronCheckpoint(directory)
    for change, message in [
        ({"num_layers": 4}, "lacks 'decoder.layers.3"),
        ({"num_layers": 2}, r"another model.*decoder\.layers\.2"),
        ({"tie_embeddings": False}, "lacks 'output_layer.weight'"),
        ({"hidden_size": 12}, r"another model.*\(16, 8\)"),
        ({"vocab_size": 17}, r"another model.*word_embeddings"),
    ]:
        other = ModelConfig(**{**{f: getattr(MODEL, f) for f in MODEL.__dataclass_fields__}, **change})
        with pytest.raises(CheckpointReadError, match=message):
            checkpoint.sources(other)
